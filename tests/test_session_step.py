"""`Session.step` gives the numbers of one process, under any number of data workers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training_cases import (
    adam,
    assert_all_equal,
    assert_equal,
    mse,
    network,
    normed_network,
    points,
    session,
    under,
    weights,
)

from allfuse.base.errors import UserError
from allfuse.split.data import as_source, plan_batches

WORKERS = (2, 3, 4)


def run(
    plan: str,
    *,
    model: Callable[[], nn.Module] = network,
    data: Any = None,
    loss: Any = mse,
    optimizer: Any = adam,
    forward: Any = None,
    batch_size: int = 6,
    epochs: int = 2,
    prepare: Callable[..., None] | None = None,
    **settings: Any,
) -> tuple[dict[str, Tensor], list[float]]:
    """Train by `s.step`; the weights, equal on all ranks, and the losses that rank 0 saw."""

    def train() -> tuple[dict[str, Tensor], list[float]]:
        with session(**settings) as s:
            net = s.model(model)
            chosen = s.optimizer(optimizer(net.parameters()))
            if prepare is not None:
                prepare(s, net, chosen)
            samples = points(16) if data is None else data
            losses = [
                s.step(batch, loss, forward=forward)
                for batch in s.batches(samples, batch_size, epochs)
            ]
            return weights(net), losses

    results = under(plan, train)
    assert_all_equal([found for found, _ in results])
    for _, losses in results:
        assert losses == results[0][1]
    return results[0]


def check_exact(workers: int, **options: Any) -> None:
    """data(n) equals data(1), to rounding: weights and every loss."""
    alone, losses = run("data(1)", **options)
    together, same_losses = run(f"data({workers})", **options)
    assert_equal(alone, together)
    assert losses == pytest.approx(same_losses, rel=1e-9)
    assert all(torch.isfinite(value).all() for value in alone.values())


def plain_loop(steps: int, batch_size: int = 6) -> dict[str, Tensor]:
    """What a person writes without allfuse, over the same batches."""
    torch.manual_seed(0)
    net = network()
    optimizer = adam(net.parameters())
    source = as_source(points(16))
    batches = plan_batches(source, batch_size=batch_size)
    epoch, done = 0, 0
    while done < steps:
        for indices in batches.batches(epoch):
            batch = source.fetch(indices)
            optimizer.zero_grad()
            mse(net(batch[0]), batch).backward()
            optimizer.step()
            done += 1
        epoch += 1
    return weights(net)


def test_one_worker_gives_the_bits_of_a_hand_written_loop() -> None:
    assert_equal(run("data(1)")[0], plain_loop(6), exact=True)


# 16 samples in batches of 6: the last one of an epoch has 4.
@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("batch_size", [4, 5, 6, 7, 16, 30])
def test_batches_that_cut_unevenly_give_the_same_numbers(workers: int, batch_size: int) -> None:
    check_exact(workers, batch_size=batch_size)


@pytest.mark.parametrize("workers", WORKERS)
def test_a_last_batch_smaller_than_the_number_of_ranks_counts_only_its_samples(
    workers: int,
) -> None:
    check_exact(workers, data=points(9), batch_size=4)  # batches of 4, 4 and 1


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("accumulate", [2, 3, 4, 50])
def test_accumulation_changes_nothing(workers: int, accumulate: int) -> None:
    whole, losses = run("data(1)", data=points(9), batch_size=4)
    cut, same_losses = run(f"data({workers})", data=points(9), batch_size=4, accumulate=accumulate)
    assert_equal(whole, cut)
    assert losses == pytest.approx(same_losses, rel=1e-9)


def token_loss(outputs: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
    """A mean over tokens: sample i has i % 5 of them, some have none."""
    errors = (outputs - batch["y"]).square().squeeze(1)
    return (errors * batch["tokens"]).sum(), batch["tokens"].sum()


def token_data(count: int) -> dict[str, Tensor]:
    x, y = points(count)
    return {"x": x, "y": y, "tokens": torch.arange(count) % 5}


def read_x(model: nn.Module, batch: Any) -> Tensor:
    return model(batch["x"])  # type: ignore[no-any-return]


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_mean_over_tokens_weighs_tokens_not_samples(workers: int, accumulate: int) -> None:
    options: dict[str, Any] = {"data": token_data(11), "loss": token_loss, "forward": read_x}
    whole, losses = run("data(1)", **options)
    cut, same = run(f"data({workers})", **options, accumulate=accumulate)
    assert_equal(whole, cut)
    assert losses == pytest.approx(same, rel=1e-9)


def test_a_token_loss_equals_the_mean_over_the_tokens_of_the_batch() -> None:
    data = token_data(6)
    torch.manual_seed(0)
    net = network()
    total, count = token_loss(net(data["x"]), data)
    _, losses = run("data(3)", data=data, loss=token_loss, forward=read_x, epochs=1)
    assert losses == pytest.approx([float(total.detach() / count)], rel=1e-12)


@pytest.mark.parametrize("workers", WORKERS)
def test_a_rank_without_a_token_takes_part_with_weight_0(workers: int) -> None:
    data = token_data(8)
    data["tokens"] = torch.tensor([0, 0, 0, 0, 0, 0, 3, 1])
    check_exact(
        workers,
        data=data,
        loss=token_loss,
        forward=read_x,
        batch_size=8,
        optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
    )


@pytest.mark.parametrize("workers", WORKERS)
def test_a_loss_of_one_value_for_each_sample_is_their_mean(workers: int) -> None:
    def each(outputs: Tensor, batch: Any) -> Tensor:
        return (outputs - batch[1]).square()  # (rows, 1)

    check_exact(workers, loss=each)
    assert_equal(run("data(1)", loss=each)[0], run("data(1)")[0])


@pytest.mark.parametrize("workers", WORKERS)
def test_clipping_is_by_the_norm_of_the_whole_gradient(workers: int) -> None:
    check_exact(workers, clip=1e-3, optimizer=lambda p: torch.optim.SGD(p, lr=1.0))


def test_clipping_bounds_the_step() -> None:
    before, _ = run("data(2)", epochs=0)
    after, _ = run(
        "data(2)",
        batch_size=16,
        epochs=1,
        clip=1e-3,
        optimizer=lambda p: torch.optim.SGD(p, lr=1.0),
    )
    way = torch.cat([(after[name] - before[name]).reshape(-1) for name in before])
    assert float(way.norm()) == pytest.approx(1e-3, rel=1e-3)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    """Adam would blow up the rounding noise of biases before BatchNorm, whose gradient is 0."""
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("count", [16, 10])
def test_batch_norm_sees_the_global_batch(workers: int, count: int) -> None:
    check_exact(workers, model=normed_network, data=points(count), batch_size=4, optimizer=sgd)


@pytest.mark.parametrize("workers", WORKERS)
def test_batch_norm_with_accumulation_neither_hangs_nor_differs_between_ranks(
    workers: int,
) -> None:
    # Ranks have different numbers of rows; in the last batch, of 2, some have none.
    found, _ = run(
        f"data({workers})", model=normed_network, data=points(16), batch_size=7, accumulate=3
    )
    assert all(torch.isfinite(value).all() for value in found.values())


def test_batch_norm_of_two_models_do_not_mix() -> None:
    def train() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        with session() as s:
            first = s.model(normed_network, "first")
            second = s.model(normed_network, "second")
            one = s.optimizer(sgd(first.parameters()))
            two = s.optimizer(sgd(second.parameters()))
            for batch in s.batches(points(10), 5, 2):
                s.step(batch, mse, model=first, optimizer=one)
                s.step(batch, mse, model=second, optimizer=two)
            return weights(first), weights(second)

    ((alone, other),) = under("data(1)", train)
    for first, second in under("data(2)", train):
        assert_equal(alone, first)
        assert_equal(other, second)


class Branches(nn.Module):
    """The second branch is used for batches whose first input is positive only."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 1).double(), nn.Linear(4, 1).double()
        self.never = nn.Linear(4, 1).double()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.one(x)
        chosen = x[:, 0] > 0.9
        if bool(chosen.any()):
            out = out + torch.where(chosen[:, None], self.two(x), 0.0)
        return out


@pytest.mark.parametrize("workers", WORKERS)
def test_a_parameter_unused_on_some_ranks_in_some_steps_learns_as_in_one_process(
    workers: int,
) -> None:
    x, y = points(16)
    check_exact(workers, model=Branches, data=(x, y), batch_size=4, epochs=3)


def test_a_parameter_that_nobody_used_is_left_alone_by_its_optimizer() -> None:
    def decaying(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.5)

    before, _ = run("data(2)", model=Branches, epochs=0)
    after, _ = run("data(2)", model=Branches, optimizer=decaying)
    assert torch.equal(before["never.weight"], after["never.weight"])
    assert not torch.equal(before["one.weight"], after["one.weight"])


class Mixed(nn.Module):
    """Parameters of three types in one model."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.middle = nn.Linear(4, 4).double(), nn.Linear(4, 4)
        self.short = nn.Linear(4, 1).bfloat16()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.short(self.middle(self.wide(x).float()).bfloat16())
        return out.double()


def test_parameters_of_several_types_train_together() -> None:
    alone, _ = run("data(1)", model=Mixed, epochs=1)
    together, _ = run("data(2)", model=Mixed, epochs=1)
    for name, value in alone.items():
        torch.testing.assert_close(value, together[name], rtol=2e-2, atol=2e-2)
        assert value.dtype == together[name].dtype


OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3),
    "groups": lambda p: torch.optim.SGD(
        [{"params": [q], "lr": 0.01 * (i + 1)} for i, q in enumerate(p)], lr=1.0
    ),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_optimizer_gets_the_same_gradients(name: str) -> None:
    check_exact(3, optimizer=OPTIMIZERS[name])


SCHEDULERS: dict[str, Any] = {
    "step": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=7),
    "epoch": lambda o: torch.optim.lr_scheduler.StepLR(o, step_size=1, gamma=0.5),
    "evaluation": lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=0),
}


@pytest.mark.parametrize("every", SCHEDULERS)
def test_schedulers_are_stepped_when_they_ask_for_it(every: str) -> None:
    def rates(plan: str) -> list[list[float]]:
        def train() -> list[float]:
            with session() as s:
                net = s.model(network)
                optimizer = s.optimizer(torch.optim.SGD(net.parameters(), lr=1.0))
                s.scheduler(SCHEDULERS[every](optimizer), every)
                seen = []
                for batch in s.batches(points(16), 6, 2):
                    s.step(batch, mse)
                    if s.due("epoch"):
                        s.evaluated(1.0)  # never better than before
                    seen.append(optimizer.param_groups[0]["lr"])
                return seen

        return under(plan, train)

    (found,) = rates("data(1)")
    assert rates("data(2)") == [found, found]
    expected = {
        "step": sorted(found, reverse=True) == found and found[-1] == pytest.approx(4e-7),
        "epoch": found == [1.0, 1.0, 0.5, 0.5, 0.5, 0.25],
        "evaluation": found == [1.0, 1.0, 1.0, 1.0, 1.0, 0.1],
    }
    assert expected[every], found


NESTS: dict[str, tuple[Any, Any, Any]] = {
    "tuple": (lambda x, y: (x, y), None, mse),
    "dict": (
        lambda x, y: {"x": x, "y": y, "mask": torch.ones(len(x))},
        None,
        lambda outputs, b: nn.functional.mse_loss(outputs, b["y"]),
    ),
    "nested": (
        lambda x, y: {"in": (x[:, :2], [x[:, 2:]]), "out": {"y": y}},
        lambda net, b: net(torch.cat([b["in"][0], b["in"][1][0]], dim=1)),
        lambda outputs, b: nn.functional.mse_loss(outputs, b["out"]["y"]),
    ),
}


class Named(nn.Module):
    """Takes its input by keyword, and not every column."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.net(x)
        return found


@pytest.mark.parametrize("name", NESTS)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_batches_are_any_nest(name: str, accumulate: int) -> None:
    make, forward, loss = NESTS[name]
    options: dict[str, Any] = {
        "data": make(*points(16)),
        "model": Named,
        "loss": loss,
        "forward": forward,
    }
    whole, _ = run("data(1)", **options)
    cut, _ = run("data(2)", **options, accumulate=accumulate)
    assert_equal(whole, cut)
    assert_equal({n.removeprefix("net."): v for n, v in whole.items()}, run("data(1)")[0])


def test_a_hugging_face_model_trains_on_dict_batches() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=20,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=8,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    generator = torch.Generator().manual_seed(0)
    data = {
        "input_ids": torch.randint(0, 20, (8, 6), generator=generator),
        "attention_mask": torch.ones(8, 6, dtype=torch.int64),
        "labels": torch.randint(0, 2, (8,), generator=generator),
    }
    options: dict[str, Any] = {
        "data": data,
        "model": lambda: transformers.BertForSequenceClassification(config).double(),
        "loss": lambda outputs, batch: outputs.loss,
        "optimizer": lambda p: torch.optim.SGD(p, lr=0.1),
        "batch_size": 4,
        "epochs": 1,
    }
    check_exact(2, **options)


def test_the_second_update_on_the_same_batch_is_weighed_like_the_first() -> None:
    def train() -> tuple[dict[str, Tensor], int]:
        with session() as s:
            net = s.model(network)
            s.optimizer(adam(net.parameters()))
            for batch in s.batches(points(9), 4, 1):  # the last batch has one sample
                s.step(batch, mse)
                s.step(batch, mse)
            return weights(net), s.steps

    ((alone, steps),) = under("data(1)", train)
    for found, counted in under("data(2)", train):
        assert_equal(alone, found)
        assert counted == steps == 3


@pytest.mark.parametrize("plan", ["data(1)", "data(2)"])
def test_parameters_may_be_frozen_thawed_and_added_between_steps(plan: str) -> None:
    def train() -> dict[str, Tensor]:
        with session() as s:
            net = s.model(network)
            head = s.model(lambda: nn.Linear(1, 1).double(), "head")
            for parameter in net[0].parameters():
                parameter.requires_grad_(False)
            optimizer = s.optimizer(torch.optim.SGD(net.parameters(), lr=0.1))
            for batch in s.batches(points(16), 4, 2):
                if s.steps == 2:
                    net[0].requires_grad_(True)
                if s.steps == 4:
                    optimizer.add_param_group({"params": head.parameters()})
                if s.steps == 6:
                    net[2].requires_grad_(False)
                s.step(batch, mse, model=net, forward=lambda m, b: head(m(b[0])))
            return {**weights(net), **{f"head.{n}": v for n, v in weights(head).items()}}

    ((alone),) = under("data(1)", train)
    for found in under(plan, train):
        assert_equal(alone, found)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("workers", [1, 2])
def test_autocast_trains(precision: str, workers: int) -> None:
    def small() -> nn.Module:
        return network().float()

    data = tuple(column.float() for column in points(16))
    before, _ = run(f"data({workers})", model=small, data=data, epochs=0)
    found, losses = run(
        f"data({workers})", model=small, data=data, epochs=8, precision=precision, accumulate=2
    )
    assert losses[-1] < losses[0]
    assert found["0.weight"].dtype == torch.float32
    assert not torch.equal(before["0.weight"], found["0.weight"])


def test_fp16_leaves_out_steps_that_overflow_and_so_does_the_scheduler() -> None:
    def train() -> tuple[bool, float, int, float]:
        with session(precision="fp16") as s:
            net = s.model(lambda: network().float())
            optimizer = s.optimizer(torch.optim.SGD(net.parameters(), lr=1.0))
            s.scheduler(torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5))
            before = weights(net)
            x, y = (column.float() for column in points(6))
            for batch in s.batches((x, y), 3, steps=1):
                s.step(batch, lambda outputs, b: mse(outputs, b) * 1e36)
            same = all(torch.equal(before[n], v) for n, v in weights(net).items())
            assert s.precision.scaler is not None
            rate = optimizer.param_groups[0]["lr"]
            return same, rate, s.steps, s.precision.scaler.get_scale()

    for same, rate, steps, scale in under("data(2)", train):
        assert same
        assert rate == 1.0
        assert steps == 1
        assert scale < 2.0**16


@pytest.mark.parametrize("plan", ["data(1)", "data(2)", "site(2, codec=int8)"])
def test_sparse_gradients_are_refused_also_where_they_are_not_fused(plan: str) -> None:
    def embedding() -> nn.Module:
        return nn.Sequential(nn.Embedding(5, 4, sparse=True), nn.Linear(4, 1)).double()

    def loss(outputs: Tensor, batch: Any) -> Tensor:
        return outputs.square().mean()

    with pytest.raises(UserError, match=r"the gradient of 0\.weight is sparse; allowed: dense"):
        run(plan, model=embedding, data=(torch.arange(12) % 5, torch.zeros(12)), loss=loss)


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["data(1)", "data(2)"])
def test_a_compiled_model_gives_the_same_numbers(plan: str) -> None:
    alone, _ = run("data(1)", epochs=1)
    found, _ = run(plan, epochs=1, compile=True)
    assert_equal(alone, found)
