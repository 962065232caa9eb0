"""Bad input ends in one clear message: what happened, what was received, allowed, what to do."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training_cases import (
    adam,
    assert_equal,
    job,
    mse,
    network,
    points,
    session,
    train,
    under,
    weights,
    workers_of,
)

from allfuse.base.errors import (
    AllfuseError,
    DataError,
    JobError,
    NonFiniteLoss,
    PeerLost,
    PlanError,
    UserError,
)
from allfuse.job import Stop
from allfuse.launcher import current_world
from allfuse.launcher.thread import launch_threads
from allfuse.store.checkpoint import Checkpoints
from allfuse.training.loop import train_job

PLANS = ("data(1)", "data(2)", "data(3)")


# Numbers that are not finite.


def poisoned(value: float, row: float) -> Any:
    """A loss that is not finite for one sample, which has this target."""

    def loss(outputs: Tensor, batch: Any) -> Tensor:
        bad = (batch[1] == row).any()
        return mse(outputs, batch) + (torch.tensor(value).double() if bad else 0.0)

    return loss


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("plan", PLANS)
def test_a_loss_that_is_not_finite_stops_all_ranks_and_changes_nothing(
    plan: str, value: float, tmp_path: Path
) -> None:
    data = points(24)
    before: dict[int, dict[str, Tensor]] = {}
    after: dict[int, dict[str, Tensor]] = {}
    ranks_of_row: list[int] = []

    def work() -> None:
        with session(out=tmp_path / "run") as s:
            net = s.model(network)
            s.optimizer(adam(net.parameters()))
            target = 0.0
            for batch in s.batches(data, 6, 1):
                if s.steps == 2:
                    before[s.rank] = weights(net)
                    rank = s.plan.workers - 1  # the last one has the bad sample
                    target = float(batch[1][0]) if s.rank == rank else 1e9
                    ranks_of_row.append(rank)
                try:
                    s.step(batch, poisoned(value, target))
                finally:
                    after[s.rank] = weights(net)
                s.save()

    results = launch_threads(work, workers_of(plan), plan=plan)
    for rank, result in enumerate(results):
        assert isinstance(result, NonFiniteLoss), result
        assert f"the loss is {value} on rank {ranks_of_row[0]} at step 2" in str(result)
        assert "the weights were not changed" in str(result)
        whole = "the checkpoint of step 2 is whole: go on with resume=True"
        assert (whole if rank == 0 else "the last whole checkpoint") in str(result)
        assert_equal(before[rank], after[rank], exact=True)
    assert Checkpoints(tmp_path / "run" / "checkpoints").steps() == [2, 1]


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("clip", [None, 1.0])
def test_an_infinite_gradient_stops_all_ranks_before_the_step(
    plan: str, clip: float | None
) -> None:
    def work() -> dict[str, Tensor]:
        with session(clip=clip) as s:
            s.stepper.always_norm = True
            net = s.model(network)
            s.optimizer(adam(net.parameters()))
            before = weights(net)
            for batch in s.batches(points(12), 6, 1):
                with pytest.raises(NonFiniteLoss, match=r"norm of the gradient is (inf|nan) at"):
                    # finite, with an infinite derivative on one rank
                    bad = 0.0 if s.rank == 0 else 1.0
                    s.step(batch, lambda o, b: (o * 0 + bad).abs().sqrt().mean() + mse(o, b))  # noqa: B023
                break
            assert_equal(before, weights(net), exact=True)
            return before

    under(plan, work)


def test_all_ranks_look_at_the_norm_in_the_same_steps() -> None:
    """They share one clock, so that all stop at the same step when it is not finite."""

    def work() -> list[bool]:
        looked = []
        with session() as s:
            s.optimizer(adam(s.model(network).parameters()))
            s.on("step", lambda _, event: looked.append(event.data["grad_norm"] is not None))
            for batch in s.batches(points(40), 4, 1):
                s.stepper._busy_s = 0.1 * s.rank  # what the others are told with this step
                s.step(batch, mse)
        return looked

    first, second, third = under("data(3)", work)
    assert first == second == third
    assert first[0]
    assert 2 <= sum(first) <= 5


def test_a_mean_over_nothing_is_refused() -> None:
    with pytest.raises(NonFiniteLoss, match=r"the count that the loss is a mean over is 0\.0"):
        with session() as s:
            s.optimizer(adam(s.model(network).parameters()))
            for batch in s.batches(points(6), 6, 1):
                s.step(batch, lambda outputs, b: (outputs.sum() * 0, 0))


# Data.


@pytest.mark.parametrize("plan", ["data(1)", "data(2)"])
def test_an_empty_data_set_is_refused(plan: str) -> None:
    for empty in (points(0), [], ()):
        with pytest.raises(DataError, match="empty"):
            train(job(train=empty), plan)


def test_more_replicas_than_samples_in_a_batch_are_refused() -> None:
    for plan in ("data(4)", "site(2) * data(2)"):
        with pytest.raises(UserError, match=r"batch_size=3: plan .* cuts each batch into 4 shares"):
            train(job(batch_size=3), plan)


def test_samples_of_unequal_shape_are_named() -> None:
    samples = [(torch.zeros(4 + (i == 3)).double(), torch.zeros(1).double()) for i in range(6)]
    with pytest.raises(DataError, match="unequal shapes"):
        train(job(train=samples), "data(2)")


def test_a_batch_without_a_tensor_cannot_be_cut() -> None:
    words = [f"word {number}" for number in range(4)]

    def encode(net: nn.Module, batch: Any) -> Tensor:
        return net(torch.tensor([[float(word[5:])] * 4 for word in batch]).double())  # type: ignore[no-any-return]

    def loss(outputs: Tensor, batch: Any) -> Tensor:
        return outputs.square().mean()

    options: dict[str, Any] = {"train": words, "forward": encode, "loss": loss, "batch_size": 2}
    (alone,) = train(job(**options))
    for result in train(job(**options), "data(2)"):
        assert_equal(alone.weights, result.weights)
    with pytest.raises(DataError, match="cannot be counted"):
        train(job(**options, accumulate=2))


def test_an_error_of_the_data_set_says_which_sample() -> None:
    class Bad:
        def __len__(self) -> int:
            return 6

        def __getitem__(self, index: int) -> Tensor:
            raise OSError("unreadable")

    with pytest.raises(OSError, match="unreadable") as failure:
        train(job(train=Bad()))
    assert any("while reading sample" in note for note in failure.value.__notes__)


# What functions return.


@pytest.mark.parametrize("plan", ["data(1)", "data(2)"])
@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (lambda o, b: None, "the loss returned None"),
        (lambda o, b: {"loss": 1}, "the loss returned a dict"),
        (lambda o, b: o.squeeze(1)[:1].expand(2, 2), r"shape \(2, 2\)"),
        (lambda o, b: (o.squeeze(1), 3), "a sum of one number"),
        (lambda o, b: (o.sum(), -1), "a count from 0"),
        (lambda o, b: 0.5, "does not depend on any parameter"),
        (lambda o, b: mse(o, b).detach(), "does not depend on any parameter"),
    ],
)
def test_a_loss_of_a_wrong_kind_is_refused(plan: str, loss: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        train(job(loss=loss), plan)


@pytest.mark.parametrize("made", [None, "net", torch.zeros(3)])
def test_a_model_of_a_wrong_kind_is_refused(made: Any) -> None:
    with pytest.raises(JobError, match="the model function returned"):
        train(job(model=lambda: made))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda parameters: None, "the optimizer is a NoneType; allowed: a torch.optim.Optimizer"),
        (lambda parameters: list(parameters), "the optimizer is a list"),
        (lambda parameters: torch.optim.SGD([], lr=1.0), "empty parameter list"),
        (lambda parameters: torch.optim.SGD(parameters, lr=-1.0), "Invalid learning rate"),
        (
            lambda parameters: torch.optim.SGD(nn.Linear(3, 5).parameters(), lr=1.0),
            r"2 parameters that no s\.model\(\.\.\.\) knows \(the first of shape \(5, 3\)\)",
        ),
    ],
)
def test_an_optimizer_of_a_wrong_kind_is_refused(make: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        train(job(optimizer=make))


@pytest.mark.parametrize(
    ("make", "every", "said"),
    [
        (lambda o: None, "step", r"type NoneType has no step\(\)"),
        (lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o), "step", "needs metrics"),
        (lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o), "epoch", "every='evaluation'"),
    ],
)
def test_a_scheduler_of_a_wrong_kind_is_refused(make: Any, every: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        train(job(scheduler=make, scheduler_every=every))


def test_a_scheduler_is_stepped_at_moments_that_there_are() -> None:
    with session() as s:
        optimizer = s.optimizer(adam(s.model(network).parameters()))
        with pytest.raises(UserError, match="allowed: 'step', 'epoch', 'evaluation'"):
            s.scheduler(torch.optim.lr_scheduler.StepLR(optimizer, 1), "steps")


def test_what_a_script_forgot_to_hand_over_is_named() -> None:
    net = network()
    with session() as s:
        with pytest.raises(UserError, match=r"does not know the optimizer; next: .*s\.optimizer"):
            s.step(points(4), mse)
        with pytest.raises(UserError, match=r"no s\.model"):
            s.optimizer(adam(net.parameters()))
        net = s.model(net)
        optimizer = s.optimizer(adam(net.parameters()))
        with pytest.raises(UserError, match="does not know the optimizer"):
            s.step(points(4), mse, optimizer=adam(net.parameters()))
        with pytest.raises(UserError, match="'model' is there already"):
            s.model(network, "model")
        assert s.step(points(4), mse, optimizer=optimizer) > 0


@pytest.mark.parametrize(
    ("loss", "said"), [(torch.zeros(2), r"of shape \(2,\)"), (1.0, "received a float")]
)
def test_backward_takes_one_number(loss: Any, said: str) -> None:
    with session() as s:
        s.optimizer(adam(s.model(network).parameters()))
        with pytest.raises(UserError, match=said):
            s.backward(loss)


def test_a_piece_of_a_batch_needs_its_count() -> None:
    with session() as s:
        net = s.model(network)
        s.optimizer(adam(net.parameters()))
        x, y = points(4)
        with pytest.raises(UserError, match="needs count="):
            s.backward(mse(net(x), (x, y)), last=False)
        s.backward(mse(net(x), (x, y)), count=4, last=False)
        with pytest.raises(UserError, match="needs count="):
            s.backward(mse(net(x), (x, y)))


def test_backward_with_fp16_is_refused() -> None:
    with session(precision="fp16") as s:
        net = s.model(network)
        s.optimizer(adam(net.parameters()))
        with pytest.raises(UserError, match="allowed: bf16 or fp32 here"):
            s.backward(net(points(4)[0]).mean())


# Settings.


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"precision": "bf8"},
            "session.precision=.*did you mean 'bf16'.*allowed: fp32, bf16, fp16",
        ),
        ({"accumulate": 0}, "a whole number from 1"),
        ({"accumulate": 2.0}, "a whole number from 1"),
        ({"keep": 0}, "a whole number from 1"),
        ({"clip": -1.0}, "a number above 0"),
        ({"clip": math.nan}, "a number above 0"),
        ({"batch_statistics": "none"}, "allowed: global, local"),
        ({"seed": "x"}, "a whole number"),
    ],
)
def test_settings_of_a_wrong_kind_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        with session(**settings):
            pass


@pytest.mark.parametrize("device", ["gpu", "cuda", "meta"])
def test_a_device_that_is_not_there_is_refused(device: str) -> None:
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(UserError, match="--device"):
        with session(device=device):
            pass


def test_a_plan_for_another_number_of_workers_is_refused() -> None:
    with pytest.raises(PlanError, match="nearest that can: data\\(1\\)"):
        with session(plan="data(2)"):
            pass


@pytest.mark.parametrize("limit", [{"epochs": -1}, {"steps": 1.5}, {"epochs": "all"}])
def test_limits_of_a_loop_are_whole_numbers(limit: dict[str, Any]) -> None:
    with session() as s:
        s.optimizer(adam(s.model(network).parameters()))
        with pytest.raises(UserError, match="a whole number from 0"):
            next(s.batches(points(4), 2, **limit))


# Failures of one rank.


def test_the_failure_of_one_rank_ends_the_others_with_its_name() -> None:
    def work() -> None:
        with session() as s:
            s.optimizer(adam(s.model(network).parameters()))
            for batch in s.batches(points(12), 4, 2):
                if s.rank == 1 and s.steps == 2:
                    raise ZeroDivisionError
                s.step(batch, mse)

    first, second, third = launch_threads(work, 3, plan="data(3)")
    assert isinstance(second, ZeroDivisionError)
    for other in (first, third):
        assert isinstance(other, PeerLost)
        assert other.peer == 1
        assert other.step == 2


def test_refusals_are_user_errors_and_divergence_is_none() -> None:
    assert issubclass(JobError, UserError)
    assert not issubclass(NonFiniteLoss, UserError)
    assert issubclass(NonFiniteLoss, AllfuseError)


def test_nothing_is_written_when_input_is_refused(tmp_path: Path) -> None:
    for bad in ({"train": []}, {"batch_size": 1}, {"model": lambda: None}):
        with pytest.raises(UserError):
            train(job(stop=Stop(steps=1), **bad), "data(2)", out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(DataError, match="nothing to train on"):
        train_job(job(train=None), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_data_that_differs_from_rank_to_rank_is_refused_on_all_of_them() -> None:
    def work() -> None:
        with session() as s:
            s.optimizer(adam(s.model(network).parameters()))
            x, y = points(8)
            for batch in s.batches((x + s.rank, y), 4, 1):
                s.step(batch, mse)

    for result in launch_threads(work, 3):
        assert isinstance(result, DataError)
        assert "rank 1 is not that of rank 0" in str(result)


def test_other_plans_on_other_ranks_are_refused() -> None:
    """Messages of these codecs would be read as they come, and weights differ from rank to rank."""

    def work() -> None:
        world = current_world()
        assert world is not None
        plan = ("data(2, codec=int8)", "data(2, codec=int8(stochastic=true))")[world.rank]
        with session(plan=plan):
            pass

    _, second = launch_threads(work, 2, timeout_s=5)
    assert isinstance(second, PlanError)
    assert "rank 1 was given this plan, and rank 0 data(2, codec=int8)" in str(second)
