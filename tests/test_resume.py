"""A run that was interrupted and resumed ends with the bits of one that was not."""

from __future__ import annotations

import errno
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from training_cases import (
    Recorded,
    adam,
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

from allfuse.base.errors import CheckpointError, NonFiniteLoss, RunError, UserError
from allfuse.base.tensors import digest
from allfuse.job import Job, Stop
from allfuse.launcher.thread import launch_threads
from allfuse.store import tensorfile
from allfuse.store.checkpoint import Checkpoints
from allfuse.store.run import RunFolder
from allfuse.store.tensorfile import read_model
from allfuse.training.keeper import Resume
from allfuse.training.loop import Result, train_job

STEPS = 8  # of batches of 6 from 21 samples: 4 an epoch, the last one of 3


def stepped(made: Job, steps: int) -> Job:
    return Job(**{**vars(made), "stop": Stop(steps=steps)})


def go(
    made: Job, plan: str, out: Path, steps: int, resume: Resume = False
) -> tuple[list[Result], list[Recorded]]:
    """Train up to so many steps in all; results and events of each rank."""
    recorded: dict[int, Recorded] = {}

    def watch(s: Any) -> None:
        recorded[s.rank] = Recorded()
        recorded[s.rank].attach(s)

    results = train(stepped(made, steps), plan, out=out, resume=resume, prepare=watch)
    return results, [recorded[rank] for rank in sorted(recorded)]


def states(out: Path, step: int) -> list[str]:
    """A digest of all that each writing rank saved at a step, the clock left out."""
    checkpoints = Checkpoints(out / "checkpoints")
    found = []
    for rank in checkpoints.writers(step):
        state, _ = checkpoints.read(step, rank=rank)
        state["parts"].get("stopping", {}).pop("seconds", None)
        found.append(digest(state))
    return found


def check_resumes_exactly(
    made: Job, plan: str, tmp_path: Path, stops: tuple[int, ...] = (1, 3, 4, 6)
) -> None:
    whole, events = go(made, plan, tmp_path / "whole", STEPS)
    expected = [recorded.steps() for recorded in events]
    for stop in stops:
        out = tmp_path / f"stopped-{stop}"
        _, first = go(made, plan, out, stop)
        assert [recorded.steps() for recorded in first] == [e[:stop] for e in expected]
        results, rest = go(made, plan, out, STEPS, resume=True)
        assert [recorded.steps() for recorded in rest] == [e[stop:] for e in expected]
        for one, other in zip(whole, results, strict=True):
            assert_equal(one.weights, other.weights, exact=True)
            assert one.metrics == other.metrics
            assert one.loss == other.loss
        assert states(out, STEPS) == states(tmp_path / "whole", STEPS)
        assert_equal(
            read_model(out / "model.safetensors"),
            read_model(tmp_path / "whole" / "model.safetensors"),
            exact=True,
        )


class Noisy:
    """Samples that are augmented by random numbers of three generators as they are read."""

    def __init__(self, count: int = 21) -> None:
        self.x, self.y = (column.float() for column in points(count))

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        noise = torch.rand(()) + float(np.random.rand()) + random.random()
        return self.x[index] + 0.01 * noise, self.y[index]


def dropping_network() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 1))


def warm(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.05, total_steps=STEPS + 1)


def everything(**changes: Any) -> Job:
    """A job that uses all that has a state."""
    return job(
        model=dropping_network,
        train=Noisy(),
        validation=Noisy(7),
        scheduler=warm,
        accumulate=2,
        clip=0.5,
        evaluate_every=2,
        save_every=None,
        **changes,
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_one_worker_with_dropout_augmentation_and_schedule(precision: str, tmp_path: Path) -> None:
    made = everything(precision=precision)
    whole = train_job(stepped(made, STEPS), out=tmp_path / "whole")
    for stop in (1, 3, 4):
        out = tmp_path / str(stop)
        train_job(stepped(made, stop), out=out)
        torch.rand(7)  # nobody else's use of the generators matters
        random.random()
        result = train_job(stepped(made, STEPS), out=out, resume=True)
        assert_equal(whole.weights, result.weights, exact=True)
        assert states(out, STEPS) == states(tmp_path / "whole", STEPS)


PLANS = ("data(1)", "data(2)", "site(2, every=3)", "site(2, every=end)", "site(2, every=2)*data(2)")


@pytest.mark.parametrize("plan", PLANS)
def test_plans_with_a_schedule_by_step_and_validation(plan: str, tmp_path: Path) -> None:
    made = job(train=points(21), validation=points(7), scheduler=warm, evaluate_every=2)
    check_resumes_exactly(made, plan, tmp_path)


@pytest.mark.parametrize("plan", ["data(2)", "site(2, every=3)"])
def test_momentum_statistics_and_a_schedule_that_follows_evaluations(
    plan: str, tmp_path: Path
) -> None:
    made = job(
        model=normed_network,
        train=points(21),
        validation=points(7),
        optimizer=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        scheduler=lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=0),
        scheduler_every="evaluation",
        evaluate_every=3,
        batch_size=7,
    )
    check_resumes_exactly(made, plan, tmp_path, stops=(2, 3, 5))


def test_streams_and_loader_processes(tmp_path: Path) -> None:
    class Numbers(torch.utils.data.IterableDataset[Any]):
        def __iter__(self) -> Any:
            x, y = points(21)
            for row in torch.randperm(21).tolist():
                yield x[row], y[row]

    check_resumes_exactly(job(train=Numbers()), "data(2)", tmp_path, stops=(3, 4))


def test_many_stops_in_a_row(tmp_path: Path) -> None:
    made = job(train=points(21))
    (whole,), _ = go(made, "data(1)", tmp_path / "whole", STEPS)
    for steps in range(1, STEPS + 1):
        (result,), _ = go(made, "data(1)", tmp_path / "run", steps, resume=steps > 1)
        assert result.steps == steps
    assert_equal(whole.weights, result.weights, exact=True)


def test_a_finished_run_stays_as_it_is(tmp_path: Path) -> None:
    made = job(train=points(21), validation=points(7), stop=Stop(epochs=2))
    for plan in ("data(1)", "site(2, every=3)"):
        out = tmp_path / plan[:4]
        first = train(made, plan, out=out)
        before = Checkpoints(out / "checkpoints").steps()
        recorded = Recorded()
        again = train(made, plan, out=out, resume=True, prepare=recorded.attach)
        assert recorded.named("step") == []
        for one, other in zip(first, again, strict=True):
            assert_equal(one.weights, other.weights, exact=True)
            assert other.metrics == one.metrics
            assert (other.steps, other.loss) == (one.steps, one.loss)
            assert other.reason == one.reason == "2 epochs are done"
        assert Checkpoints(out / "checkpoints").steps() == before


@pytest.mark.parametrize(
    ("rule", "reason"),
    [
        (Stop(epochs=9, target=0.5), "the target 0.5 is reached"),
        (Stop(epochs=9, patience=2), "no improvement for 2 evaluations"),
    ],
)
def test_a_run_that_ended_by_what_was_measured_does_not_begin_again(
    rule: Stop, reason: str, tmp_path: Path
) -> None:
    made = job(
        validation=points(7),
        metrics={"value": lambda outputs, batch: 0.5},
        evaluate_every=2,
        stop=rule,
    )
    (first,) = train(made, out=tmp_path / "run")
    (again,) = train(made, out=tmp_path / "run", resume=True)
    assert first.reason == again.reason == reason
    assert first.steps == again.steps
    assert again.metrics == first.metrics


# Another number of workers.


@pytest.mark.parametrize(
    ("before", "after"),
    [("data(2)", "data(1)"), ("data(1)", "data(3)"), ("data(2)", "data(3)")],
)
def test_another_number_of_data_workers_changes_rounding_only(
    before: str, after: str, tmp_path: Path
) -> None:
    made = job(train=points(21), scheduler=warm)
    (whole, *_), _ = go(made, "data(1)", tmp_path / "whole", STEPS)
    go(made, before, tmp_path / "run", 3)
    results, events = go(made, after, tmp_path / "run", STEPS, resume=True)
    for result in results:
        assert_equal(whole.weights, result.weights)
    assert len(events[0].named("step")) == STEPS - 3
    assert RunFolder.open(tmp_path / "run").record["plan"] == after


def test_sites_that_become_data_workers_start_from_their_weighted_mean(tmp_path: Path) -> None:
    made = job(train=points(21), batch_size=5, save_every=2)
    out = tmp_path / "run"
    go(made, "site(2, every=end)", out, 2)
    checkpoints = Checkpoints(out / "checkpoints")
    held = [checkpoints.read(2, rank=rank)[0] for rank in (0, 1)]
    samples = [state["rounds"]["samples"] for state in held]
    assert samples == [[4.0], [6.0]]
    seen: list[dict[str, Tensor]] = []
    moments: list[Tensor] = []

    def look(s: Any) -> None:
        def note(s: Any, event: Any) -> None:
            seen.append(weights(s.models["model"]))
            state = s.learners[0].optimizer.state_dict()["state"]
            moments.append(state[0]["exp_avg"].clone())
            assert float(state[0]["step"]) == 2.0

        s.on("start", note)

    train(stepped(made, 4), "data(2)", out=out, resume=True, prepare=look)
    mean = {
        name: 0.4 * held[0]["models"]["model"][name] + 0.6 * held[1]["models"]["model"][name]
        for name in seen[0]
    }
    for found in seen:
        assert_equal(found, mean)
    own = [state["optimizers"][0]["state"][0]["exp_avg"] for state in held]
    torch.testing.assert_close(moments[0], 0.4 * own[0] + 0.6 * own[1])


def test_data_workers_that_become_sites_start_equal(tmp_path: Path) -> None:
    made = job(train=points(21))
    (stopped, *_), _ = go(made, "data(2)", tmp_path / "run", 3)
    seen: list[dict[str, Tensor]] = []

    def look(s: Any) -> None:
        s.on("start", lambda s, event: seen.append(weights(s.models["model"])))

    results = train(
        stepped(made, 6), "site(3, every=2)", out=tmp_path / "run", resume=True, prepare=look
    )
    assert len(seen) == 3
    for found in seen:
        assert_equal(found, stopped.weights, exact=True)
    assert results[0].steps == 6


def test_a_site_that_never_learned_has_no_say_in_the_mean(tmp_path: Path) -> None:
    """With batches of one sample only the last site has any, and an optimizer state."""
    made = job(train=points(4), batch_size=2, stop=Stop(steps=2))
    out = tmp_path / "run"

    def alone() -> dict[str, Tensor]:
        with session(out=out) as s:
            net = s.model(network)
            s.optimizer(adam(net.parameters()))
            for batch in s.batches(points(3), 2, steps=2):
                if len(batch[0]) and s.steps == 0 and s.rank == 0:
                    continue  # the first site skips its only sample
                s.step(batch, mse)
            return weights(net)

    under("site(2, every=end)", alone)
    checkpoints = Checkpoints(out / "checkpoints")
    held = [checkpoints.read(2, rank=rank)[0] for rank in (0, 1)]
    assert held[0]["rounds"]["samples"] == [0.0]
    assert held[0]["optimizers"][0]["state"] == {}

    def resumed() -> tuple[dict[str, Tensor], Any]:
        with session(out=out, resume=True) as s:
            net = s.model(network)
            optimizer = s.optimizer(adam(net.parameters()))
            for _ in s.batches(points(3), 2, steps=2):
                pass
            return weights(net), optimizer.state_dict()["state"][0]["exp_avg"]

    ((found, moment),) = under("data(1)", resumed)
    assert_equal(found, dict(held[1]["models"]["model"]), exact=True)
    assert torch.equal(moment, held[1]["optimizers"][0]["state"][0]["exp_avg"])
    assert made.stop.steps == 2


# Scripts of one's own.


def script(out: Path, resume: bool, crash_at: int | None, seen: list[Any]) -> dict[str, Tensor]:
    """Pretraining, then fine-tuning with an optimizer of its own, with something to remember."""
    with session(out=out, resume=resume) as s:
        recorded = Recorded()
        recorded.attach(s)
        net = s.model(network)
        average = torch.optim.swa_utils.AveragedModel(net)
        s.remember("average", average)
        first = s.optimizer(adam(net.parameters()))

        def learn(batch: Any, optimizer: torch.optim.Optimizer) -> None:
            seen.append((s.steps, float(s.step(batch, mse, optimizer=optimizer))))
            average.update_parameters(net)
            s.save()
            if s.steps == crash_at:
                raise KeyboardInterrupt

        for batch in s.batches(points(9), 4, 2):
            learn(batch, first)
            if s.steps == 5:
                break
        with torch.no_grad():
            net[2].weight.mul_(0.5)  # done again on resume, when the weights are past it already
        second = s.optimizer(torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9))
        s.scheduler(torch.optim.lr_scheduler.StepLR(second, 2))
        for batch in s.batches(points(10), 5, 3, shuffle=False):
            learn(batch, second)
        return {**weights(net), **{f"average.{n}": v for n, v in weights(average).items()}}


@pytest.mark.parametrize(
    ("plan", "crash_at"),
    [
        *(("data(1)", crash_at) for crash_at in (2, 4, 6, 8, 9)),
        ("data(2)", 7),
        ("site(2, every=3)", 7),
        ("site(2, every=4)", 10),
    ],
)
def test_a_script_of_several_loops_goes_on_in_the_one_that_was_interrupted(
    plan: str, crash_at: int, tmp_path: Path
) -> None:
    def run(name: str, resume: bool, crash_at: int | None) -> tuple[list[Any], list[Any]]:
        seen: list[Any] = []
        try:
            ends = under(plan, lambda: script(tmp_path / name, resume, crash_at, seen))
        except KeyboardInterrupt:
            ends = []
        return ends, seen

    whole, expected = run("whole", False, None)
    ends, before = run("run", False, crash_at)
    assert ends == []
    saved = Checkpoints(tmp_path / "run" / "checkpoints").steps()[0]
    ends, after = run("run", True, None)
    kept = [entry for entry in before if entry[0] < saved]
    assert sorted(map(repr, kept + after)) == sorted(map(repr, expected))
    for one, other in zip(whole, ends, strict=True):
        assert_equal(one, other, exact=True)


def test_what_a_script_changes_after_saving_is_saved_as_it_was(tmp_path: Path) -> None:
    """Parts that are remembered may change at once: only weights wait for the copy."""
    part = nn.Linear(64, 64)
    with session(out=tmp_path / "run") as s:
        s.optimizer(adam(s.model(network).parameters()))
        s.remember("part", part)
        for batch in s.batches(points(12), 6, 2):
            s.step(batch, mse)
            with torch.no_grad():
                part.weight.fill_(float(s.steps))
            s.save()
            with torch.no_grad():
                part.weight.fill_(-1.0)
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints")
    for step in checkpoints.steps():
        held = checkpoints.read(step)[0]["parts"]["part"]["weight"]
        assert torch.equal(held, torch.full_like(held, float(step)))


def test_a_loop_that_was_left_is_gone_on_with(tmp_path: Path) -> None:
    def run(out: Path, leave_at: int | None, resume: bool) -> dict[str, Tensor]:
        with session(out=out, resume=resume) as s:
            net = s.model(network)
            s.optimizer(adam(net.parameters()))
            for batch in s.batches(points(9), 4, 2):
                s.step(batch, mse)
                if s.steps == leave_at:
                    break
            return weights(net)

    whole = run(tmp_path / "whole", None, False)
    run(tmp_path / "run", 2, False)
    assert_equal(whole, run(tmp_path / "run", None, True), exact=True)


# What goes wrong on the disk.


def stopped_run(out: Path, plan: str = "data(1)", steps: int = 4, **changes: Any) -> Job:
    made = job(train=points(21), save_every=1, **changes)
    go(made, plan, out, steps)
    return made


def damage(out: Path, step: int, how: Callable[[Path], None]) -> None:
    how(next((out / "checkpoints").glob(f"step-{step:08d}*")) / "rank-0.safetensors")


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("how", [truncate, flip, Path.unlink])
@pytest.mark.parametrize("plan", ["data(2)", "site(2, every=3)"])
def test_a_damaged_checkpoint_is_passed_over_and_that_is_told(
    how: Callable[[Path], None], plan: str, tmp_path: Path
) -> None:
    made = stopped_run(tmp_path / "run", plan)
    damage(tmp_path / "run", 4, how)
    results, events = go(made, plan, tmp_path / "run", STEPS, resume=True)
    names = [event.name for event in events[0].events]
    assert names[:2] == ["start", "warning"]  # so that events.jsonl has it too
    (warning,) = events[0].named("warning")
    assert "the checkpoint of step 4 cannot be used" in warning.data["text"]
    assert events[0].named("start")[0].data["resumed_step"] == 3
    whole, _ = go(made, plan, tmp_path / "whole", STEPS)
    assert_equal(whole[0].weights, results[0].weights, exact=True)


def test_a_run_with_damaged_checkpoints_only_does_not_begin_anew(tmp_path: Path) -> None:
    made = stopped_run(tmp_path / "run", "data(2)")
    for step in Checkpoints(tmp_path / "run" / "checkpoints").steps():
        damage(tmp_path / "run", step, truncate)
    results = launch_threads(
        lambda: train_job(stepped(made, STEPS), out=tmp_path / "run", resume=True),
        2,
        plan="data(2)",
    )
    assert all(isinstance(result, CheckpointError) for result in results)
    assert "none of its checkpoints can be used" in str(results[0])


def test_a_run_without_a_checkpoint_yet_begins_at_the_beginning(tmp_path: Path) -> None:
    made = stopped_run(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    _, events = go(made, "data(1)", tmp_path / "run", 2, resume=True)
    (note,) = events[0].named("note")
    assert "there is no checkpoint yet" in note.data["text"]
    assert len(events[0].named("step")) == 2


@pytest.mark.parametrize("plan", ["data(1)", "site(2, every=2)"])
def test_training_goes_on_when_the_disk_is_full(
    plan: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = job(train=points(21), save_every=1)
    whole, _ = go(made, plan, tmp_path / "whole", STEPS)
    written = tensorfile._stream
    full = False

    def fail(*arguments: Any) -> Any:
        if full:
            raise OSError(errno.ENOSPC, "No space left on device")
        return written(*arguments)

    monkeypatch.setattr(tensorfile, "_stream", fail)
    recorded: list[Recorded] = []

    def watch(s: Any) -> None:
        recorded.append(Recorded())
        recorded[-1].attach(s)

        def fill(s: Any, event: Any) -> None:
            nonlocal full
            s.keeper.checkpoints.wait()
            full = event.step > 2

        s.on("step", fill)

    results = train(stepped(made, STEPS), plan, out=tmp_path / "run", prepare=watch)
    assert_equal(whole[0].weights, results[0].weights, exact=True)
    told = [event for each in recorded for event in each.named("not_saved")]
    assert told[0].data["step"] == 3
    assert "the disk is full" in told[0].data["reason"]
    assert "the checkpoint of step 2 is still there" in told[0].data["reason"]
    assert any(
        "the model was not exported" in event.data["text"]
        for each in recorded
        for event in each.named("warning")
    )
    full = False
    results, _ = go(made, plan, tmp_path / "run", STEPS, resume=True)
    assert_equal(whole[0].weights, results[0].weights, exact=True)


def test_a_checkpoint_with_weights_that_are_not_finite_is_passed_over(tmp_path: Path) -> None:
    """The gradient of step 2 is infinite, and only the next loss shows it."""

    def curved(outputs: Tensor, batch: Any) -> Tensor:
        return (outputs * 0).abs().sqrt().mean() + mse(outputs, batch)

    out, steps = tmp_path / "run", 0

    def run(resume: bool) -> int:
        nonlocal steps
        with session(out=out, resume=resume) as s:
            recorded = Recorded()
            recorded.attach(s)
            s.stepper._since_norm_s = -1e9  # the norm is not looked at
            s.optimizer(adam(s.model(network).parameters()))
            for batch in s.batches(points(21), 6, 2):
                bad = s.steps == 2 and not resume
                s.step(batch, curved if bad else mse)
                s.save()
            steps = s.steps
            if resume:
                (warning,) = recorded.named("warning")
                assert "step 3 cannot be used: its weights" in warning.data["text"]
            return int(recorded.named("start")[0].data["resumed_step"])

    with pytest.raises(NonFiniteLoss) as failure:
        run(resume=False)
    assert "the loss is nan on rank 0 at step 3" in str(failure.value)
    assert "the weights are not finite" in str(failure.value)
    assert "the checkpoint of step 2 is whole" in str(failure.value)
    assert Checkpoints(out / "checkpoints").steps()[0] == 3
    assert run(resume=True) == 2
    assert steps == 8


# What is refused.


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"train": points(22)}, "fingerprint of the data"),
        ({"model": normed_network}, "fingerprint of the model"),
        ({"batch_size": 7}, "batch_size was 6 and is 7"),
        ({"seed": 1}, "seed was 0 and is 1"),
        ({"optimizer": lambda p: torch.optim.SGD(p, lr=1.0)}, "optimizers was"),
        ({"scheduler": warm}, "schedulers was"),
    ],
)
def test_resuming_with_something_else_is_refused(
    change: dict[str, Any], said: str, tmp_path: Path
) -> None:
    made = stopped_run(tmp_path / "run")
    before = (tmp_path / "run" / "run.json").read_bytes()
    with pytest.raises(RunError, match=said):
        go(Job(**{**vars(made), **change}), "data(1)", tmp_path / "run", STEPS, resume=True)
    assert (tmp_path / "run" / "run.json").read_bytes() == before


def test_resuming_with_other_arguments_or_another_job_file_is_refused(tmp_path: Path) -> None:
    def run(resume: bool, arguments: dict[str, Any], fingerprint: str) -> None:
        def prepare(s: Any) -> None:
            s.keeper.facts["arguments"] = arguments
            s.keeper.fingerprints["job"] = fingerprint

        made = stepped(job(), 2)
        train(made, out=tmp_path / "run", resume=resume, prepare=prepare)

    run(False, {"lr": 0.1}, "one")
    run(True, {"lr": 0.1}, "one")
    with pytest.raises(RunError, match=r"arguments: lr was 0.1 and is 0.2 now"):
        run(True, {"lr": 0.2}, "one")
    with pytest.raises(RunError, match="fingerprint of the job was one and is two"):
        run(True, {"lr": 0.1}, "two")


def test_another_order_of_samples_is_refused(tmp_path: Path) -> None:
    def run(resume: bool, **order: Any) -> None:
        with session(out=tmp_path / "run", resume=resume) as s:
            s.optimizer(adam(s.model(network).parameters()))
            for batch in s.batches(points(9), 4, steps=2, **order):
                s.step(batch, mse)

    run(False)
    for order in ({"seed": 1}, {"shuffle": False}, {"drop_last": True}):
        with pytest.raises(RunError, match=r"order: (seed|shuffle|drop_last) was"):
            run(True, **order)
    run(True)


@pytest.mark.parametrize("plan", ["data(1)", "data(2)"])
def test_a_folder_that_is_used_is_left_alone(plan: str, tmp_path: Path) -> None:
    made = stopped_run(tmp_path / "run")
    files = sorted(path.name for path in (tmp_path / "run").rglob("*"))
    with pytest.raises(RunError, match="exists already"):
        go(made, plan, tmp_path / "run", STEPS)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").touch()
    with pytest.raises(RunError, match="holds other files"):
        go(made, plan, tmp_path / "other", STEPS)
    with pytest.raises(RunError, match="no run in"):
        go(made, plan, tmp_path / "nothing", STEPS, resume=True)
    assert not (tmp_path / "nothing").exists()
    assert sorted(path.name for path in (tmp_path / "run").rglob("*")) == files


def test_two_runs_at_once_in_one_folder_are_refused(tmp_path: Path) -> None:
    made = stopped_run(tmp_path / "run")
    with RunFolder.open(tmp_path / "run", lock=True):
        with pytest.raises(RunError, match="is writing to the run folder"):
            go(made, "data(1)", tmp_path / "run", STEPS, resume=True)
    go(made, "data(1)", tmp_path / "run", STEPS, resume=True)


def test_resume_needs_a_folder() -> None:
    with pytest.raises(RunError, match="no run folder was given"):
        train_job(job(), resume=True)
    assert train_job(job(stop=Stop(steps=1)), resume="auto").steps == 1
    with pytest.raises(UserError, match="resume='yes': allowed: True, False, or 'auto'"):
        train_job(job(), resume="yes")  # type: ignore[arg-type]


@pytest.mark.parametrize("plan", ["data(1)", "data(2)", "site(2, every=3)"])
def test_the_same_call_begins_a_run_and_goes_on_with_it(tmp_path: Path, plan: str) -> None:
    made = job(train=points(21))
    for steps in (2, 5):
        _, recorded = go(made, plan, tmp_path / "auto", steps, resume="auto")
    assert recorded[0].named("start")[0].data["resumed_step"] == 2
    go(made, plan, tmp_path / "whole", 5)
    assert states(tmp_path / "auto", 5) == states(tmp_path / "whole", 5)


def test_saving_before_training_begins_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="training has not begun"):
        with session(out=tmp_path / "run") as s:
            s.save()
    with session() as s:
        s.save()  # without a folder there is nothing to do


def test_a_part_that_cannot_be_saved_is_named(tmp_path: Path) -> None:
    class Part:
        def state_dict(self) -> dict[str, Any]:
            return {"lock": object()}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            return

    with pytest.raises(CheckpointError, match="parts/odd/lock"):
        with session(out=tmp_path / "run") as s:
            s.optimizer(adam(s.model(network).parameters()))
            s.remember("odd", Part())
            for batch in s.batches(points(9), 4, 1):
                s.step(batch, mse)


def test_a_run_that_remembers_something_new_is_refused(tmp_path: Path) -> None:
    def run(resume: bool) -> None:
        with session(out=tmp_path / "run", resume=resume) as s:
            s.optimizer(adam(s.model(network).parameters()))
            if resume:
                s.remember("new", nn.Linear(1, 1))
            for batch in s.batches(points(9), 4, steps=2):
                s.step(batch, mse)

    run(False)
    with pytest.raises(CheckpointError, match="parts new: it holds none of that name"):
        run(True)
