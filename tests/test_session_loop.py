"""Loops of a script's own: backward and optimizer.step, several models, several loops, hooks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training_cases import (
    Recorded,
    adam,
    assert_all_equal,
    assert_equal,
    mse,
    network,
    points,
    session,
    under,
    weights,
)

from allfuse.base.errors import UserError
from allfuse.split.data import as_source, plan_batches

PLANS = ("data(1)", "data(2)", "data(3)")


def plain(update: Any, epochs: int = 2, count: int = 9, batch_size: int = 4) -> dict[str, Tensor]:
    """A loop without allfuse over the same batches; `update(net, optimizer, batch)`."""
    torch.manual_seed(0)
    net = network()
    optimizer = adam(net.parameters())
    source = as_source(points(count))
    batches = plan_batches(source, batch_size=batch_size)
    for epoch in range(epochs):
        for indices in batches.batches(epoch):
            update(net, optimizer, source.fetch(indices))
    return weights(net)


def loop(plan: str, update: Any, **settings: Any) -> dict[str, Tensor]:
    """The same loop in a session; `update(session, net, optimizer, batch)`."""

    def train() -> dict[str, Tensor]:
        with session(**settings) as s:
            net = s.model(network)
            optimizer = s.optimizer(adam(net.parameters()))
            for batch in s.batches(points(9), 4, 2):  # batches of 4, 4 and 1
                update(s, net, optimizer, batch)
            assert s.steps == 6
            return weights(net)

    results = under(plan, train)
    assert_all_equal(results)
    return results[0]


def update_plainly(net: nn.Module, optimizer: torch.optim.Optimizer, batch: Any) -> None:
    optimizer.zero_grad()
    mse(net(batch[0]), batch).backward()
    optimizer.step()


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("to_none", [True, False])
@pytest.mark.parametrize("when", ["before", "after"])
def test_backward_and_step_give_the_numbers_of_one_process(
    plan: str, to_none: bool, when: str
) -> None:
    def update(s: Any, net: nn.Module, optimizer: Any, batch: Any) -> None:
        if when == "before":
            optimizer.zero_grad(set_to_none=to_none)
        s.backward(mse(net(batch[0]), batch))
        optimizer.step()
        if when == "after":
            optimizer.zero_grad(set_to_none=to_none)

    assert_equal(loop(plan, update), plain(update_plainly))


@pytest.mark.parametrize("plan", PLANS)
def test_torchs_own_clipping_works_between_backward_and_step(plan: str) -> None:
    def update(s: Any, net: nn.Module, optimizer: Any, batch: Any) -> None:
        optimizer.zero_grad()
        s.backward(mse(net(batch[0]), batch))
        nn.utils.clip_grad_norm_(net.parameters(), 0.01)
        optimizer.step()

    def same(net: nn.Module, optimizer: torch.optim.Optimizer, batch: Any) -> None:
        optimizer.zero_grad()
        mse(net(batch[0]), batch).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 0.01)
        optimizer.step()

    assert_equal(loop(plan, update), plain(same))


@pytest.mark.parametrize("plan", PLANS)
def test_pieces_of_a_batch_add_up_with_their_counts(plan: str) -> None:
    def update(s: Any, net: nn.Module, optimizer: Any, batch: Any) -> None:
        optimizer.zero_grad()
        x, y = batch
        middle = len(x) // 2
        if middle:
            piece = (x[:middle], y[:middle])
            s.backward(mse(net(piece[0]), piece), count=middle, last=False)
        piece = (x[middle:], y[middle:])
        s.backward(mse(net(piece[0]), piece), count=len(piece[0]))
        optimizer.step()

    assert_equal(loop(plan, update), plain(update_plainly))


@pytest.mark.parametrize("plan", PLANS)
def test_several_losses_in_one_step_add_up(plan: str) -> None:
    def second(net: nn.Module, batch: Any) -> Tensor:
        return net(batch[0]).abs().mean()  # type: ignore[no-any-return]

    def update(s: Any, net: nn.Module, optimizer: Any, batch: Any) -> None:
        optimizer.zero_grad()
        s.backward(mse(net(batch[0]), batch))
        s.backward(second(net, batch))
        optimizer.step()

    def same(net: nn.Module, optimizer: torch.optim.Optimizer, batch: Any) -> None:
        optimizer.zero_grad()
        (mse(net(batch[0]), batch) + second(net, batch)).backward()
        optimizer.step()

    assert_equal(loop(plan, update), plain(same))


@pytest.mark.parametrize("plan", PLANS)
def test_gradients_of_several_batches_add_up_to_one_step(plan: str) -> None:
    """A step of the optimizer after every second batch, without clearing between them."""

    def update(s: Any, net: nn.Module, optimizer: Any, batch: Any) -> None:
        s.backward(mse(net(batch[0]), batch))
        if s.due(2):
            optimizer.step()
            optimizer.zero_grad()

    done = 0

    def same(net: nn.Module, optimizer: torch.optim.Optimizer, batch: Any) -> None:
        nonlocal done
        mse(net(batch[0]), batch).backward()
        done += 1
        if done % 2 == 0:
            optimizer.step()
            optimizer.zero_grad()

    with pytest.raises(UserError, match=r"between backward and optimizer.step"):
        loop(plan, update)

    def counted(s: Any, net: nn.Module, optimizer: Any, batch: Any) -> None:
        s.backward(mse(net(batch[0]), batch))
        if s.steps % 2 == 1:
            optimizer.step()
            optimizer.zero_grad()

    assert_equal(loop(plan, counted), plain(same))


@pytest.mark.parametrize("plan", ["data(1)", "data(2)"])
def test_backward_returns_the_mean_loss_of_the_whole_batch(plan: str) -> None:
    seen: list[float] = []
    told: list[float] = []

    def update(s: Any, net: nn.Module, optimizer: Any, batch: Any) -> None:
        optimizer.zero_grad()
        told.append(s.backward(mse(net(batch[0]), batch)))
        optimizer.step()

    def same(net: nn.Module, optimizer: torch.optim.Optimizer, batch: Any) -> None:
        optimizer.zero_grad()
        loss = mse(net(batch[0]), batch)
        loss.backward()
        seen.append(loss.item())
        optimizer.step()

    loop(plan, update)
    plain(same)
    workers = 1 if plan == "data(1)" else 2
    assert sorted(told) == pytest.approx(sorted(seen * workers), rel=1e-9)


def test_plain_backward_under_a_data_plan_is_refused() -> None:
    def update(s: Any, net: nn.Module, optimizer: Any, batch: Any) -> None:
        mse(net(batch[0]), batch).backward()
        optimizer.step()

    with pytest.raises(UserError, match=r"s\.backward\(loss\) instead of loss\.backward\(\)"):
        loop("data(2)", update)


@pytest.mark.parametrize("plan", ["data(1)", "data(2)"])
def test_a_step_before_the_last_piece_is_refused(plan: str) -> None:
    def update(s: Any, net: nn.Module, optimizer: Any, batch: Any) -> None:
        s.backward(mse(net(batch[0]), batch), count=4, last=False)
        optimizer.step()

    with pytest.raises(UserError, match="last=True"):
        loop(plan, update)


# Two models and two optimizers.


def gan(plan: str, *, named: bool = True) -> list[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """A small GAN on plain batches of noise and samples, the generator stepped second."""

    def train() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        with session() as s:
            maker = s.model(lambda: nn.Linear(4, 4).double(), "maker")
            judge = s.model(network, "judge")
            makes = s.optimizer(torch.optim.SGD(maker.parameters(), lr=0.1))
            judges = s.optimizer(adam(judge.parameters()))
            for noise, real in s.batches((points(9)[0].flip(0), points(9)[0]), 4, 2):
                judges.zero_grad()
                bad = judge(maker(noise).detach()).square().mean()
                good = (judge(real) - 1).square().mean()
                s.backward(bad + good, optimizer=judges if named else None)
                judges.step()
                makes.zero_grad()
                s.backward((judge(maker(noise)) - 1).square().mean(), optimizer=makes)
                makes.step()
            assert s.steps == 6
            return weights(maker), weights(judge)

    return under(plan, train)


@pytest.mark.parametrize("plan", ["data(2)", "data(3)"])
def test_two_models_and_two_optimizers_equal_one_process(plan: str) -> None:
    ((maker, judge),) = gan("data(1)")
    for found in gan(plan):
        assert_equal(maker, found[0])
        assert_equal(judge, found[1])


def test_of_several_optimizers_one_must_be_named() -> None:
    with pytest.raises(UserError, match="2 optimizers; next: name the one to step"):
        gan("data(1)", named=False)


def test_models_made_by_functions_have_numbers_of_their_own() -> None:
    with session(seed=5) as s:
        one, two = s.model(network), s.model(network)
    torch.manual_seed(5)
    assert_equal(weights(one), weights(network()), exact=True)
    torch.manual_seed(6)
    assert_equal(weights(two), weights(network()), exact=True)
    assert list(s.models) == ["model", "model1"]


def test_an_optimizer_for_a_second_phase_may_hold_the_same_parameters() -> None:
    def train() -> dict[str, Tensor]:
        with session() as s:
            net = s.model(network)
            first = s.optimizer(adam(net.parameters()))
            for batch in s.batches(points(9), 4, 1):
                s.step(batch, mse, optimizer=first)
            second = s.optimizer(torch.optim.SGD(net.parameters(), lr=0.1))
            for batch in s.batches(points(9), 4, 1):
                s.step(batch, mse, optimizer=second)
            assert s.steps == 6
            return weights(net)

    (alone,) = under("data(1)", train)
    for found in under("data(2)", train):
        assert_equal(alone, found)


# What is counted, and when things are due.


@pytest.mark.parametrize("plan", ["data(1)", "data(2)", "site(2)"])
def test_due_means_the_same_at_the_top_and_at_the_bottom_of_a_loop(plan: str) -> None:
    def train() -> tuple[list[int], list[int], list[int]]:
        with session() as s:
            net = s.model(network)
            optimizer = s.optimizer(adam(net.parameters()))
            top, bottom, epochs = [], [], []
            for batch in s.batches(points(9), 4, 2):
                if s.due(2):
                    top.append(s.steps)
                    s.evaluate({"loss": mse}, points(5))
                s.backward(mse(net(batch[0]), batch))
                optimizer.step()
                optimizer.zero_grad()
                if s.due(2):
                    bottom.append(s.steps)
                if s.due("epoch"):
                    epochs.append(s.steps)
            assert s.steps == 6
            return top, bottom, epochs

    for found in under(plan, train):
        assert found == ([2, 4], [2, 4, 6], [3, 6])


def test_asking_at_the_top_of_a_loop_changes_no_number() -> None:
    def update(s: Any, net: nn.Module, optimizer: Any, batch: Any) -> None:
        s.due(1)
        s.save()
        s.evaluate({"loss": mse}, points(5))
        optimizer.zero_grad()
        s.backward(mse(net(batch[0]), batch))
        optimizer.step()

    assert_equal(loop("data(2)", update), plain(update_plainly))


def test_saving_between_backward_and_step_is_refused() -> None:
    def update(s: Any, net: nn.Module, optimizer: Any, batch: Any) -> None:
        s.backward(mse(net(batch[0]), batch))
        s.save()
        optimizer.step()

    with pytest.raises(UserError, match="call it after the optimizer's step"):
        loop("data(1)", update)


@pytest.mark.parametrize("every", [0, "epochs", 1.5, True])
def test_due_refuses_what_is_no_interval(every: Any) -> None:
    def update(s: Any, net: nn.Module, optimizer: Any, batch: Any) -> None:
        s.step(batch, mse)
        s.due(every)

    with pytest.raises(UserError, match="whole number from 1"):
        loop("data(1)", update)


def test_a_batch_that_is_skipped_counts_as_used_and_learns_nothing() -> None:
    def update(s: Any, net: nn.Module, optimizer: Any, batch: Any) -> None:
        if s.steps % 2 == 0:
            s.step(batch, mse)

    found = loop("data(2)", update)
    done = 0

    def same(net: nn.Module, optimizer: torch.optim.Optimizer, batch: Any) -> None:
        nonlocal done
        if done % 2 == 0:
            update_plainly(net, optimizer, batch)
        done += 1

    assert_equal(found, plain(same))


@pytest.mark.parametrize("plan", ["data(1)", "data(2)"])
def test_steps_on_batches_of_the_scripts_own_are_counted(plan: str) -> None:
    def train() -> tuple[dict[str, Tensor], int]:
        with session() as s:
            net = s.model(network)
            optimizer = s.optimizer(adam(net.parameters()))
            x, y = points(8)
            for start in range(0, 8, 4):
                mine = slice(start + 4 * s.rank // s.plan.workers, None)
                mine = slice(mine.start, mine.start + 4 // s.plan.workers)
                optimizer.zero_grad()
                s.backward(mse(net(x[mine]), (x[mine], y[mine])))
                optimizer.step()
            whole = slice(4 * s.rank // s.plan.workers, 4 * (s.rank + 1) // s.plan.workers)
            s.step((x[whole], y[whole]), mse)
            s.step((x[whole], y[whole]), mse)
            s.due(1)
            return weights(net), s.steps

    ((alone, _),) = under("data(1)", train)
    for found, steps in under(plan, train):
        assert_equal(alone, found)
        assert steps == 4


def test_the_events_of_steps_tell_what_was_done() -> None:
    def train() -> list[Any]:
        recorded = Recorded()
        with session() as s:
            recorded.attach(s)
            net = s.model(network)
            s.optimizer(adam(net.parameters()))
            for batch in s.batches(points(9), 4, 1):
                s.step(batch, mse)
        (end,) = recorded.named("end")
        assert end.data["samples"] == 9
        assert end.data["reason"] == "1 epoch is done"
        return [
            (e.step, e.data["epoch"], e.data["samples"], e.data["shares"])
            for e in recorded.named("step")
        ]

    expected = [(1, 0, 4, [2, 2]), (2, 0, 4, [2, 2]), (3, 0, 1, [0, 1])]
    assert under("data(2)", train) == [expected, expected]


def test_the_bytes_that_were_fused_are_counted_once() -> None:
    def train() -> float:
        recorded = Recorded()
        with session() as s:
            recorded.attach(s)
            net = s.model(network)
            s.optimizer(adam(net.parameters()))
            for batch in s.batches(points(8), 4, 1):
                s.step(batch, mse)
        return float(recorded.named("step")[1].data["fused_bytes"])

    parameters = 49  # and one flag for each of the 4 tensors, and 2 x 4 numbers of two words each
    assert under("data(2)", train) == [8.0 * (parameters + 4 + 16)] * 2


# Leaving a loop, and several loops in a row.


@pytest.mark.parametrize("plan", ["data(1)", "data(2)"])
def test_a_loop_may_be_left_and_another_one_goes_on(plan: str) -> None:
    def train() -> tuple[list[int], list[int], int]:
        with session() as s:
            net = s.model(network)
            s.optimizer(adam(net.parameters()))
            before, after = [], []
            for batch in s.batches(points(9), 4, 5):
                s.step(batch, mse)
                before.append(s.steps)
                if s.steps == 4:
                    break
            assert s.stop_reason is None
            s.evaluate({"loss": mse}, points(5))
            for batch in s.batches(points(9), 4, 1):
                s.step(batch, mse)
                after.append(s.steps)
            return before, after, s.steps

    for found in under(plan, train):
        assert found == ([1, 2, 3, 4], [5, 6, 7], 7)


def test_a_batch_that_a_loop_was_left_with_is_not_used_up() -> None:
    seen: list[list[Tensor]] = []
    for leave_at in (2, None):
        with session() as s:
            net = s.model(network)
            s.optimizer(adam(net.parameters()))
            batches = []
            for batch in s.batches(points(9), 4, 1):
                if s.steps == leave_at:
                    break
                s.step(batch, mse)
                batches.append(batch[0])
            assert s.steps == len(batches) == (leave_at or 3)
        seen.append(batches)
    assert torch.equal(seen[0][0], seen[1][0])


def test_loops_in_a_row_count_their_own_epochs_and_see_orders_of_their_own() -> None:
    orders: list[list[float]] = []
    with session() as s:
        net = s.model(network)
        s.optimizer(adam(net.parameters()))
        for _ in range(3):
            order: list[float] = []
            for batch in s.batches(points(8), 4, epochs=1):
                s.step(batch, mse)
                order += batch[1].flatten().tolist()
            orders.append(order)
            assert s.stop_reason == "1 epoch is done"
        for batch in s.batches(points(8), 4, steps=3):
            s.step(batch, mse)
        assert s.stop_reason == "3 steps are done"
        assert s.steps == 9
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(orders[2])
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_a_loop_of_epochs_equals_loops_of_one_epoch() -> None:
    def train(calls: int, epochs: int) -> dict[str, Tensor]:
        with session() as s:
            net = s.model(network)
            s.optimizer(adam(net.parameters()))
            for _ in range(calls):
                for batch in s.batches(points(9), 4, epochs):
                    s.step(batch, mse)
            return weights(net)

    assert_equal(train(1, 3), train(3, 1), exact=True)


def test_stopping_ends_all_loops_that_follow() -> None:
    def train() -> tuple[int, str | None]:
        with session() as s:
            net = s.model(network)
            s.optimizer(adam(net.parameters()))
            for _ in range(3):
                for batch in s.batches(points(9), 4, 1):
                    s.step(batch, mse)
                    if s.steps == 2 and s.rank == 0:
                        s.stop("enough")
            return s.steps, s.stop_reason

    (first, second) = under("data(2)", train)
    assert first == (3, "enough")  # the others hear of it with the next step
    assert second == (3, "another worker asked to stop")


def test_two_loops_at_once_are_refused() -> None:
    with session() as s:
        s.optimizer(adam(s.model(network).parameters()))
        with pytest.raises(UserError, match="one loop at a time"):
            for _ in zip(s.batches(points(9), 4, 1), s.batches(points(9), 4, 1), strict=True):
                pass


def test_an_exception_in_the_loop_leaves_it_and_is_told() -> None:
    recorded = Recorded()
    closed: list[str] = []
    with pytest.raises(ZeroDivisionError):
        with session() as s:
            recorded.attach(s)
            s.at_close(lambda: closed.append("first"))
            s.at_close(lambda: closed.append("second"))
            s.optimizer(adam(s.model(network).parameters()))
            for batch in s.batches(points(9), 4, 1):
                s.step(batch, mse)
                1 / 0  # noqa: B018
    (end,) = recorded.named("end")
    assert end.data["reason"] == "ZeroDivisionError: division by zero"
    assert end.data["steps"] == 1
    assert closed == ["first", "second"]


def test_all_that_a_session_holds_is_closed_even_if_closing_fails() -> None:
    closed: list[str] = []

    def fail() -> None:
        raise OSError("no")

    with pytest.raises(OSError, match="no"):
        with session() as s:
            s.at_close(fail)
            s.at_close(lambda: closed.append("second"))
    assert closed == ["second"]


def test_randomness_of_a_step_depends_on_seed_step_and_rank_alone() -> None:
    def draws(seed: int, disturb: bool) -> list[float]:
        found = []
        with session(seed=seed) as s:
            s.optimizer(adam(s.model(network).parameters()))
            for batch in s.batches(points(9), 4, 1):
                found.append(float(torch.rand(())))
                s.step(batch, mse)
                if disturb:
                    torch.rand(100)
        return found

    assert draws(0, False) == draws(0, True) != draws(1, False)
    assert len(set(draws(0, False))) == 3


def test_what_is_remembered_must_have_a_state_and_a_name_of_its_own() -> None:
    with session() as s:
        part = nn.Linear(1, 1)
        assert s.remember("part", part) is part
        with pytest.raises(UserError, match="is there already"):
            s.remember("part", part)
        with pytest.raises(UserError, match=r"a dict has no state_dict\(\)"):
            s.remember("other", {})


def test_hooks_run_on_every_rank_and_may_use_collectives() -> None:
    def train() -> tuple[list[float], int]:
        found: list[float] = []

        def measure(s: Any, event: Any) -> None:
            found.append(s.evaluate({"loss": mse}, points(5))["loss"])
            if s.rank == 1 and event.step == 2:
                s.stop("seen enough")

        with session() as s:
            s.on("step", measure)
            s.optimizer(adam(s.model(network).parameters()))
            for batch in s.batches(points(9), 4, 5):
                s.step(batch, mse)
            return found, s.steps

    first, second = under("data(2)", train)
    assert first == second
    assert first[1] == 3


def test_a_hook_for_an_event_that_there_is_not_is_refused() -> None:
    with session() as s:
        with pytest.raises(UserError, match="did you mean 'step'"):
            s.on("steps", lambda *_: None)


def test_printing_is_for_the_first_rank(capsys: pytest.CaptureFixture[str]) -> None:
    def say() -> bool:
        with session() as s:
            s.print("hello", s.plan.workers)
            return s.is_main

    assert under("data(2)", say) == [True, False]
    assert capsys.readouterr().out == "hello 2\n"


@pytest.mark.parametrize("plan", PLANS)
def test_gradients_that_did_not_come_through_the_session_are_refused(plan: str) -> None:
    def work() -> None:
        with session() as s:
            net = s.model(network)
            optimizer = s.optimizer(adam(net.parameters()))
            for batch in s.batches(points(8), 4, 1):
                mse(net(batch[0]), batch).backward()
                with pytest.raises(UserError, match=r"s\.backward\(loss\) instead"):
                    optimizer.step()

    under(plan, work)
