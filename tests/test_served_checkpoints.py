"""Runs over servers are runs like any other: checkpoints that every plan reads, and the other way
round."""

from __future__ import annotations

import errno
import json
import math
import shutil
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import allfuse as af
from allfuse.audience import RunAudience
from allfuse.base.errors import Interrupted
from allfuse.job import Job
from allfuse.jobfile import load_job
from allfuse.launcher import current_world
from allfuse.launcher.thread import launch_threads
from allfuse.plan import as_plan
from allfuse.prediction.evaluate import evaluate_run
from allfuse.prediction.restore import open_run
from allfuse.roles import snapshots
from allfuse.split.data import BatchPlan, ColumnSource, Learned, Loader
from allfuse.store.checkpoint import Checkpoints
from allfuse.store.manifest import read_manifest
from allfuse.training.keeper import Resume
from allfuse.training.loop import Result, train_job
from allfuse.watching import Watching, watch
from tests.crews import run_crew, small_job, train_crew_into

ASP = "data(2, topology=central(servers=2), sync=asp)"
BSP = "data(2, topology=central(servers=2))"


def adamw(steps: int = 14, **changes: Any) -> Job:
    """14 steps are two epochs."""
    fields = {
        "stop": af.Stop(steps=steps),
        "optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
        "scheduler": lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9),
    }
    return small_job(**{**fields, **changes})


def train(job: Job, plan: str, out: Path, *, resume: Resume = False) -> Result:
    """Under any plan, on threads."""
    if "servers" in plan:
        return train_crew_into(out, job, plan, resume=resume).result
    workers = as_plan(plan).workers
    results = launch_threads(lambda: train_job(job, out=out, resume=resume), workers, plan=plan)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results[0]


def newest(out: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    checkpoints = Checkpoints(out / "checkpoints")
    state, note = checkpoints.read(checkpoints.steps()[0])
    return state, note


def furthest(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def test_the_end_of_a_run_over_servers_is_a_checkpoint_of_its_weights(tmp_path: Path) -> None:
    result = train(adamw(), ASP, tmp_path / "run")
    state, note = newest(tmp_path / "run")
    assert state["cursor"][0] == note["steps"] == 14
    assert all(torch.equal(state["models"]["model"][n], w) for n, w in result.weights.items())
    kept = state["optimizers"][0]["state"]
    assert [tuple(kept[i]["exp_avg"].shape) for i in range(4)] == [(9, 8), (9,), (2, 9), (2,)]
    assert all(float(each["step"]) == 28 for each in kept.values())


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (BSP, "data(2)"),
        (BSP, "data(1)"),
        ("data(2)", BSP),
        (BSP, "data(3, topology=central(servers=1))"),
        (BSP, BSP),
    ],
)
def test_a_run_goes_on_under_another_plan_as_if_nothing_had_been(
    tmp_path: Path, first: str, second: str
) -> None:
    whole = train(adamw(), "data(1)", tmp_path / "whole")
    train(adamw(steps=5), first, tmp_path / "run")
    rest = train(adamw(), second, tmp_path / "run", resume=True)
    assert rest.steps == 14
    assert furthest(whole.weights, rest.weights) < 1e-12


@pytest.mark.slow
def test_a_run_changes_to_servers_and_back_more_than_once(tmp_path: Path) -> None:
    whole = train(adamw(), "data(1)", tmp_path / "whole")
    for number, plan in enumerate([BSP, "data(2)", BSP, "data(1)", BSP]):
        steps = min(3 * (number + 1), 14)
        rest = train(adamw(steps=steps), plan, tmp_path / "run", resume=number > 0)
    assert furthest(whole.weights, rest.weights) < 1e-12


# Out of step: what was learned beyond the step of a checkpoint.

IDS = torch.arange(41)


def learn_by_ids(out: Path, seen: list[int], between: Any, **changes: Any) -> None:
    """A script over samples that are their own numbers; `seen` are those that it learned from.

    between: called with the session and the number of batches that this worker had before.
    """
    with af.session(out=out, quiet=True, **changes) as s:
        model = s.model(lambda: torch.nn.Linear(1, 1).double())
        s.optimizer(torch.optim.SGD(model.parameters(), lr=0.01))

        def loss(outputs: Tensor, batch: Tensor) -> Tensor:
            portion = s.stepper.current.portion
            seen.extend(batch[: portion.rows].tolist())
            return outputs.square().mean()

        run = lambda module, batch: module(batch[:, None].double() / 41)  # noqa: E731
        for number, batch in enumerate(s.batches(IDS, batch_size=4, epochs=1, seed=5)):
            between(s, number)
            s.step(batch, loss, forward=run)


def save_while_one_waits(out: Path) -> None:
    """Under asp: worker 1 is at its first batch while worker 0 goes on, and saves."""
    gate = threading.Event()

    def between(s: Any, number: int) -> None:
        if current_world().crew.index == 1 and number == 0:
            assert gate.wait(20)
        if current_world().crew.index == 0 and number == 6:
            s.save()
        if current_world().crew.index == 0 and number > 6 and not gate.is_set():
            until = time.monotonic() + 20
            while not Checkpoints(out / "checkpoints").steps() and time.monotonic() < until:
                time.sleep(0.01)
            shutil.copytree(out / "checkpoints", out.parent / "kept")
            gate.set()

    told = run_crew(lambda: learn_by_ids(out, [], between), ASP, audience=RunAudience)
    assert [r for r in told.results if isinstance(r, BaseException)] == []


def learned_by(state: dict[str, Any]) -> list[int]:
    """The samples that were learned from before a checkpoint, as it says."""
    plan, found = BatchPlan(len(IDS), 4, seed=5), []
    own = Loader(ColumnSource(IDS), plan, parts=1, index=0)
    for portion in list(own.epoch(0))[: state["cursor"][0]]:
        found += portion.batch.tolist()
    for each in Learned(state["learned"]):
        places = [(0, step) for step in range(each.first, each.end)]
        for portion in own.leased(places, each.part, each.parts):
            found += portion.batch[: portion.rows].tolist()
    return found


@pytest.mark.parametrize(
    "plan",
    [
        "data(1)",
        "data(2)",
        "data(3, topology=central(servers=1), sync=asp)",
        BSP,
        "site(2, every=3)",
    ],
)
def test_after_workers_that_were_apart_each_sample_is_learned_once(
    tmp_path: Path, plan: str
) -> None:
    out = tmp_path / "run"
    save_while_one_waits(out)
    shutil.rmtree(out / "checkpoints")
    shutil.move(tmp_path / "kept", out / "checkpoints")  # it broke off there
    shutil.rmtree(out / "servers")
    state, note = newest(out)
    assert (note["steps"], len(state["learned"]) >= 6) == (0, True), "step 0 is half learned"
    seen: list[int] = []

    def rest() -> None:
        learn_by_ids(out, seen, lambda s, number: None, resume=True)

    if "servers" in plan:
        told = run_crew(rest, plan, audience=RunAudience)
        results = [*told.results, *told.crew.roles.values()]
    else:
        results = launch_threads(rest, as_plan(plan).workers, plan=plan)
    assert [r for r in results if isinstance(r, BaseException)] == []
    assert Counter(seen) + Counter(learned_by(state)) == Counter(IDS.tolist())


# Breaking off, measuring, predicting.

JOB = """
import torch
import allfuse as af


def job(steps=6) -> af.Job:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(97, 8, generator=generator)
    y = (x.sum(1) > 0).long()
    return af.Job(
        model=lambda: torch.nn.Sequential(torch.nn.Linear(8, 9), torch.nn.BatchNorm1d(9)),
        train=(x, y),
        validation=(x[:20], y[:20]),
        loss=lambda outputs, batch: torch.nn.functional.cross_entropy(outputs, batch[1]),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
        batch_size=15,
        batch_statistics="local",
        evaluate_every=2,
        save_every=4,
        stop=af.Stop(steps=steps),
    )
"""


def run_of_a_file(folder: Path, after: int | None = None, **arguments: Any) -> tuple[Path, Any]:
    """A run of the job above; what was told of it. Its first worker is interrupted after so many
    steps."""
    file, out = folder / "small.py", folder / "run"
    file.write_text(JOB)
    made = load_job(file, arguments)

    def prepare(s: Any) -> None:
        watch(s, Watching(quiet=True))
        s.keeper.job_file, s.keeper.facts = file, {"arguments": arguments}

        def stop(*_: Any) -> None:
            world = current_world()
            if after is not None and s.steps >= after and world.crew.index == 0:
                world.stop_requested.set()

        s.on("step", stop)

    told = run_crew(lambda: train_job(made, out=out, prepare=prepare), ASP, audience=RunAudience)
    return out, told


def test_an_interrupted_run_is_measured_and_predicts_from_its_newest_checkpoint(
    tmp_path: Path,
) -> None:
    out, told = run_of_a_file(tmp_path, after=2, steps=1000)
    for result in told.results:  # of all workers, also who was not asked itself
        assert isinstance(result, Interrupted)
        assert "--resume" in str(result)
    assert not (out / "model.safetensors").exists()
    state, note = newest(out)
    assert 0 <= note["steps"] < 1000
    restored = open_run(out)
    assert "interrupted" in restored.notes[0]
    own = restored.model.state_dict()
    assert all(torch.equal(own[name], value) for name, value in state["models"]["model"].items())
    assert int(own["1.num_batches_tracked"]) > 0, "what servers do not hold is there too"
    assert evaluate_run(out, data="validation").samples == 20


def test_the_best_checkpoint_holds_the_weights_that_its_score_is_of(tmp_path: Path) -> None:
    out, told = run_of_a_file(tmp_path, steps=14)
    assert told.result.steps == 14
    checkpoints = Checkpoints(out / "checkpoints")
    scored = {s: m for s in checkpoints.steps() if (m := score_of(checkpoints, s)) is not None}
    assert scored, "evaluations that were best yet, and those at saves"
    for step, score in scored.items():
        state, _ = checkpoints.read(step)
        model = open_run(out).model
        model.load_state_dict(state["models"]["model"])
        model.eval()
        made = load_job(out / "job.py", {"steps": 14})
        assert made.validation is not None
        with torch.no_grad():
            loss = torch.nn.functional.cross_entropy(model(made.validation[0]), made.validation[1])
        assert abs(made.score({"loss": float(loss)}) - score) < 1e-6
    best = evaluate_run(out, data="validation", weights="best")
    assert abs(best.figures["loss"] + max(scored.values())) < 1e-6


def score_of(checkpoints: Checkpoints, step: int) -> float | None:
    (folder,) = checkpoints.folder.glob(f"step-{step:08d}*")
    return read_manifest(folder).score


# What servers do not hold, and sites.


class Odd(torch.nn.Module):
    """Frozen parameters, a buffer that no checkpoint holds, and one of whole numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(8, 6).double().requires_grad_(False)
        self.last = torch.nn.Linear(6, 2).double()
        self.register_buffer("turn", torch.rand(6, dtype=torch.float64), persistent=False)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
        hidden: Tensor = self.last(torch.tanh(self.first(x)) * self.turn)
        return hidden


@pytest.mark.parametrize(("first", "second"), [(BSP, "data(1)"), ("data(1)", BSP), (BSP, BSP)])
@pytest.mark.slow
def test_what_servers_do_not_hold_is_kept_too(tmp_path: Path, first: str, second: str) -> None:
    made = adamw(model=Odd, optimizer=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9))
    whole = train(made, "data(1)", tmp_path / "whole")
    train(stopped(made, 5), first, tmp_path / "run")
    state, _ = newest(tmp_path / "run")
    assert sorted(state["models"]["model"]) == [
        *("calls", "first.bias", "first.weight", "last.bias", "last.weight"),
    ]
    rest = train(made, second, tmp_path / "run", resume=True)
    assert int(rest.weights["calls"]) > int(state["models"]["model"]["calls"]) > 0
    for result in (whole, rest):
        result.weights.pop("calls")  # the calls of one worker
    assert furthest(whole.weights, rest.weights) < 1e-12


def stopped(job: Job, steps: int) -> Job:
    return Job(**{**vars(job), "stop": af.Stop(steps=steps)})


SITES = "site(2, every=2, topology=central(servers=2), outer={})"


@pytest.mark.slow
def test_sites_over_servers_go_on_with_what_their_optimizers_and_the_outer_one_keep(
    tmp_path: Path,
) -> None:
    plan = SITES.format("nesterov(lr=0.7, momentum=0.5)")
    whole = train(adamw(), plan, tmp_path / "whole")
    train(adamw(steps=6), plan, tmp_path / "run")
    state, _ = newest(tmp_path / "run")
    assert all(kept["momentum_buffer"].any() for kept in state["outer"].values() if kept)
    assert len(state["optimizers"][0]["state"]) == 4, "of the site that handed it in"
    rest = train(adamw(), plan.replace("servers=2", "servers=1"), tmp_path / "run", resume=True)
    assert rest.steps == 14
    assert furthest(whole.weights, rest.weights) < 0.05, "sites begin with one optimizer's state"


@pytest.mark.parametrize("plan", ["data(2)", "site(2, every=2)", ASP])
@pytest.mark.slow
def test_a_run_of_sites_over_servers_goes_on_otherwise(tmp_path: Path, plan: str) -> None:
    train(adamw(steps=6), SITES.format("average"), tmp_path / "run")
    rest = train(adamw(), plan, tmp_path / "run", resume=True)
    assert (rest.steps, math.isfinite(rest.loss)) == (14, True)


@pytest.mark.slow
def test_the_same_call_begins_a_run_over_servers_and_goes_on_with_it(tmp_path: Path) -> None:
    first = train(adamw(steps=4), ASP, tmp_path / "run", resume="auto")
    second = train(adamw(steps=8), ASP, tmp_path / "run", resume="auto")
    assert (first.steps, second.steps) == (4, 8)


def test_a_run_whose_servers_files_are_damaged_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    train(adamw(steps=4), BSP, tmp_path / "run")
    for path in (tmp_path / "run" / "servers").glob("server-1*"):
        path.unlink()
    rest = train(adamw(), BSP, tmp_path / "run", resume=True)
    whole = train(adamw(), "data(1)", tmp_path / "whole")
    assert furthest(whole.weights, rest.weights) < 1e-12


def test_what_a_codec_had_not_sent_is_told_to_be_left_out(tmp_path: Path) -> None:
    train(adamw(steps=4), "data(2, codec=topk(0.1))", tmp_path / "run")
    train(adamw(steps=8), BSP, tmp_path / "run", resume=True)
    events = (tmp_path / "run" / "events.jsonl").read_text()
    assert "what the codec of gradients had not sent before is left out" in events


def test_a_run_ends_well_though_its_servers_can_write_nothing_to_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*about: Any, **more: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(snapshots, "write_tensors", full)
    out = tmp_path / "run"
    told = train_crew_into(out, small_job(), "data(2, topology=central(servers=2), sync=asp)")
    assert told.result.steps == 14
    events = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    (warning,) = [each["text"] for each in events if each["event"] == "warning"]
    assert "the disk is full" in warning
    (missed,) = [each for each in events if each["event"] == "not_saved"]
    assert missed["step"] == 14
    assert "28 updates are in no snapshot" in missed["reason"]
