"""Plans with a `site` axis: sites step on their own and fuse their weights now and then."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training_cases import (
    Recorded,
    adam,
    assert_all_equal,
    assert_equal,
    job,
    mse,
    network,
    normed_network,
    points,
    session,
    train,
    under,
    weights,
)

from allfuse.base.tensors import share
from allfuse.job import Stop
from allfuse.split.data import as_source, plan_batches


def run(plan: str, count: int = 16, batch_size: int = 6, epochs: int = 2) -> list[Any]:
    """Per rank: weights after each step, and at the end."""

    def work() -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        with session() as s:
            net = s.model(network)
            s.optimizer(torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9))
            seen = []
            for batch in s.batches(points(count), batch_size, epochs):
                s.step(batch, mse)
                s.due(1)
                seen.append(weights(net))
            return seen, weights(net)

    return under(plan, work)


def replay(
    sites: int, every: int, count: int = 16, batch_size: int = 6, epochs: int = 2
) -> dict[str, Tensor]:
    """The same in one process, one model for each site, written out."""
    torch.manual_seed(0)
    nets: list[nn.Module] = [network()]
    nets += [copy.deepcopy(nets[0]) for _ in range(sites - 1)]
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9) for net in nets]
    source = as_source(points(count))
    batches = plan_batches(source, batch_size=batch_size)
    learned, steps = [0] * sites, 0

    def fuse() -> None:
        total = sum(learned)
        states = [net.state_dict() for net in nets]
        for name in states[0]:
            mean = sum(
                (state[name] * (own / total) for state, own in zip(states, learned, strict=True)),
                torch.zeros(()).double(),
            )
            for state in states:
                state[name].copy_(mean)
        learned[:] = [0] * sites

    for epoch in range(epochs):
        for indices in batches.batches(epoch):
            for site, (net, optimizer) in enumerate(zip(nets, optimizers, strict=True)):
                start, stop = share(len(indices), sites, site)
                if start < stop:
                    batch = source.fetch(indices[start:stop])
                    optimizer.zero_grad()
                    mse(net(batch[0]), batch).backward()
                    optimizer.step()
                    learned[site] += stop - start
            steps += 1
            if steps % every == 0:
                fuse()
    if any(learned):
        fuse()
    return weights(nets[0])


# Batches of 6, 6 and 4 samples; or 4, 4 and 1, of which a site gets none.
@pytest.mark.parametrize("sites", [2, 3])
@pytest.mark.parametrize("every", [1, 2, 4])
@pytest.mark.parametrize(("count", "batch_size"), [(16, 6), (9, 4)])
def test_sites_equal_their_plan_executed_serially(
    sites: int, every: int, count: int, batch_size: int
) -> None:
    results = run(f"site({sites}, every={every})", count, batch_size)
    assert_all_equal([end for _, end in results])
    assert_equal(results[0][1], replay(sites, every, count, batch_size))


def test_sites_differ_between_rounds_and_are_equal_after_each() -> None:
    first, second = run("site(2, every=2)")
    for step, (one, other) in enumerate(zip(first[0], second[0], strict=True), start=1):
        same = all(torch.equal(one[name], other[name]) for name in one)
        assert same == (step % 2 == 0)


def test_every_end_fuses_once() -> None:
    def work() -> int:
        recorded = Recorded()
        with session() as s:
            recorded.attach(s)
            s.optimizer(adam(s.model(network).parameters()))
            for batch in s.batches(points(16), 6, 2):
                s.step(batch, mse)
        return len(recorded.named("round"))

    assert under("site(2, every=end)", work) == [1, 1]
    assert under("site(2, every=3)", work) == [2, 2]
    assert under("site(2, every=4)", work) == [2, 2]
    results = run("site(3, every=end)")
    assert_all_equal([end for _, end in results])
    assert_equal(results[0][1], replay(3, 1000))


def test_a_site_of_data_workers_equals_a_site_of_one() -> None:
    (_, alone), *_ = run("site(2, every=2)", count=8, batch_size=4)
    results = run("site(2, every=2) * data(2)", count=8, batch_size=4)
    assert_all_equal([end for _, end in results])
    assert_equal(alone, results[0][1])


def test_sites_of_data_workers_with_uneven_shares_end_equal() -> None:
    results = run("site(2, every=2) * data(2)", count=9, batch_size=5)
    assert_all_equal([end for _, end in results])


def test_one_site_is_no_site() -> None:
    ((_, alone),) = run("data(1)")
    ((_, site),) = run("site(1, every=2)")
    assert_equal(alone, site, exact=True)


def test_data_workers_of_a_site_stay_equal_all_the_time() -> None:
    results = run("site(2, every=4) * data(2)", count=12, batch_size=6)
    for left, right in ((0, 1), (2, 3)):
        for one, other in zip(results[left][0], results[right][0], strict=True):
            assert_equal(one, other, exact=True)


def test_a_site_without_samples_goes_on_with_the_others_and_evaluates_with_them() -> None:
    """The last batch has one sample, so the other site runs its loop body on nothing."""

    def work() -> tuple[list[float], list[float], int]:
        with session() as s:
            net = s.model(network)
            s.optimizer(adam(net.parameters()))
            losses, figures = [], []
            for batch in s.batches(points(5), 2, 2):
                losses.append(s.step(batch, mse))
                if s.due("epoch"):
                    figures.append(s.evaluate({"loss": mse}, points(7))["loss"])
            return losses, figures, s.steps

    first, second = under("site(2, every=2)", work)
    assert first[2] == second[2] == 6
    assert first[1] == second[1]
    assert len(first[1]) == 2
    nothing = [loss != loss for loss in first[0]]  # NaN
    assert nothing == [False, False, True] * 2
    assert not any(loss != loss for loss in second[0])


def test_a_site_without_samples_changes_nothing_in_an_own_loop() -> None:
    def work() -> list[bool]:
        with session() as s:
            net = s.model(network)
            optimizer = s.optimizer(torch.optim.AdamW(net.parameters(), lr=0.1, weight_decay=0.5))
            s.scheduler(torch.optim.lr_scheduler.StepLR(optimizer, 1))
            changed = []
            for batch in s.batches(points(5), 2, 1):
                before = weights(net)
                optimizer.zero_grad(set_to_none=True)
                s.backward(mse(net(batch[0]), batch))
                optimizer.step()
                changed.append(not torch.equal(before["0.weight"], net[0].weight))
            return changed

    first, second = under("site(2, every=end)", work)
    assert first == [True, True, False]
    assert second == [True, True, True]


@pytest.mark.parametrize("to_none", [True, False])
def test_a_site_of_data_workers_without_samples_steps_with_no_old_gradient(to_none: bool) -> None:
    def work() -> list[bool]:
        with session() as s:
            net = s.model(network)
            optimizer = s.optimizer(adam(net.parameters()))
            changed = []
            for batch in s.batches(points(9), 4, 1):  # batches of 4, 4 and 1
                before = weights(net)
                s.backward(mse(net(batch[0]), batch))
                optimizer.step()
                optimizer.zero_grad(set_to_none=to_none)
                changed.append(not torch.equal(before["0.weight"], net[0].weight))
            return changed

    idle, learning = [True, True, False], [True, True, True]
    assert under("site(2, every=end) * data(2)", work) == [idle, idle, learning, learning]


def test_training_a_job_whose_last_batch_leaves_a_site_without_samples() -> None:
    made = job(train=points(5), batch_size=2, validation=points(7), stop=Stop(epochs=2))
    results = train(made, "site(2, every=2)")
    assert results[0].metrics == results[1].metrics
    assert_equal(results[0].weights, results[1].weights, exact=True)
    assert results[0].steps == 6


def test_evaluation_measures_the_mean_and_leaves_every_site_as_it_was() -> None:
    def work() -> tuple[bool, float, dict[str, Tensor], float]:
        with session() as s:
            net = s.model(normed_network)
            s.optimizer(torch.optim.SGD(net.parameters(), lr=0.1))
            for batch in s.batches(points(16), 8, steps=3):
                s.step(batch, mse)
                if s.steps == 2:
                    s.due(1)
                    before = weights(net)
                    figure = s.evaluate({"loss": mse}, points(7))["loss"]
                    after = weights(net)
            same = all(torch.equal(before[name], after[name]) for name in before)
            return same, figure, before, s.rounds.samples

    first, second = under("site(2, every=end)", work)
    assert first[0]
    assert second[0]
    assert first[1] == second[1]
    net = normed_network()
    mean = {n: (v + second[2][n]) / 2 for n, v in first[2].items()}
    net.load_state_dict({**mean, "1.num_batches_tracked": torch.tensor(0)})
    net.eval()
    x, y = points(7)
    assert first[1] == pytest.approx(float(mse(net(x).detach(), (x, y))), rel=1e-9)


def test_evaluating_does_not_change_where_training_ends() -> None:
    def ends(every: int | None) -> dict[str, Tensor]:
        made = job(
            train=points(16), validation=points(7), evaluate_every=every, stop=Stop(epochs=3)
        )
        return train(made, "site(2, every=4)")[0].weights

    assert_equal(ends(None), ends(1), exact=True)


def test_a_wish_to_stop_is_met_at_the_next_round_by_all() -> None:
    def work() -> int:
        with session() as s:
            s.optimizer(adam(s.model(network).parameters()))
            for batch in s.batches(points(60), 6, 3):
                s.step(batch, mse)
                if s.steps == 2 and s.rank == 3:
                    s.stop("one of four is tired")
            return s.steps

    assert under("site(2, every=4) * data(2)", work) == [4] * 4
    assert under("site(4, every=end)", work) == [10] * 4  # they meet at the end of an epoch


def test_leaving_a_loop_leaves_sites_apart_and_the_session_exports_their_mean(
    tmp_path: Any,
) -> None:
    from allfuse.store.tensorfile import read_model

    def work() -> dict[str, Tensor]:
        with session(out=tmp_path / "run") as s:
            net = s.model(network)
            s.optimizer(adam(net.parameters()))
            for batch in s.batches(points(16), 6, 5):
                s.step(batch, mse)
                if s.steps == 2:
                    s.save()
                    break
            return weights(net)

    first, second = under("site(2, every=4)", work)
    assert not torch.equal(first["0.weight"], second["0.weight"])
    exported = read_model(tmp_path / "run" / "model.safetensors")
    assert_equal(exported, {name: (first[name] + second[name]) / 2 for name in first})
