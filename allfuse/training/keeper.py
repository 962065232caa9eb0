"""Keeps a run on disk: the run folder, checkpoints, and how to go on from them."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from allfuse.base.errors import CheckpointError, RunError
from allfuse.store.checkpoint import Checkpoints, NotSaved
from allfuse.store.run import RunFolder, versions
from allfuse.store.tensorfile import write_model

if TYPE_CHECKING:
    from allfuse.base.events import Bus
    from allfuse.split.data import Portion
    from allfuse.training.place import Place


@dataclass(frozen=True)
class Cursor:
    """How far training is: optimizer steps, and the next batch as (epoch, step in it)."""

    steps: int = 0
    epoch: int = 0
    step_in_epoch: int = 0
    epoch_of_last: int = 0

    def after(self, portion: Portion | None) -> Cursor:
        """One step further. An epoch's last batch leads to the next epoch."""
        if portion is None:
            return replace(self, steps=self.steps + 1)
        if portion.last:
            return Cursor(self.steps + 1, portion.epoch + 1, 0, portion.epoch)
        return Cursor(self.steps + 1, portion.epoch, portion.step + 1, portion.epoch)


class Keeper:
    """The run folder of a session, or nothing to write to when it has none.

    Rank 0 alone writes the folder. A checkpoint is written by one rank of each site, since sites
    differ; the first rank commits it.
    """

    def __init__(
        self, place: Place, out: str | Path | None, resume: bool, keep: int, bus: Bus
    ) -> None:
        if resume and out is None:
            raise RunError("resume: no run folder was given; next: out='runs/x' with resume=True")
        self.place, self.bus, self.keep, self.resume = place, bus, keep, resume
        self.path = None if out is None else Path(out)
        self.folder: RunFolder | None = None
        self.checkpoints: Checkpoints | None = None
        self.score: float | None = None
        self.job_file: Path | None = None
        self.facts: dict[str, Any] = {}
        self.fingerprints: dict[str, str] = {}
        self._last_saved: int | None = None
        self._asked: set[int] = set()
        self._refuse_early()

    def _refuse_early(self) -> None:
        """What can be refused before any work: a folder in use, or nothing to resume."""
        if self.path is None:
            return
        if self.resume:
            RunFolder.open(self.path)
        elif self.place.rank == 0 and (self.path / "run.json").exists():
            raise RunError(
                f"run folder {self.path} exists already; allowed: a new folder; "
                f"next: --resume {self.path} to go on with it, or another --out"
            )

    @property
    def writers(self) -> tuple[int, ...]:
        """One rank of each site: the one whose other coordinates are all 0."""
        plan = self.place.plan
        return tuple(
            rank
            for rank in range(plan.workers)
            if not any(c for name, c in plan.coordinates(rank).items() if name != "site")
        )

    def my_writer(self, written: tuple[int, ...]) -> int:
        """Which writer's state this rank goes on from."""
        site = self.place.coordinates.get("site", 0)
        return written[min(site, len(written) - 1)]

    def begin(self, facts: Mapping[str, Any], fingerprints: Mapping[str, str]) -> None:
        """Create the run folder, or open it and refuse another job, data or batch.

        What whoever made the session knows (`facts`, `fingerprints`, `job_file`) is recorded too.
        """
        if self.path is None:
            return
        facts, fingerprints = {**facts, **self.facts}, {**fingerprints, **self.fingerprints}
        record = {
            "plan": str(self.place.plan),
            "command": shlex.join(sys.argv),
            "versions": versions(),
            "fingerprints": dict(fingerprints),
            **facts,
        }
        if self.resume:
            folder = RunFolder.open(self.path, lock=self.place.rank == 0)
            self.folder = folder
            _refuse_other(folder, fingerprints, facts)
            if self.place.rank == 0 and folder.record.get("plan") != record["plan"]:
                folder.update(plan=record["plan"], command=record["command"])
        elif self.place.rank == 0:
            self.folder = RunFolder.create(self.path, record)
            if self.job_file is not None:
                self.folder.copy_job(self.job_file)
        several = len(self.writers) > 1
        self.checkpoints = Checkpoints(
            self.path / "checkpoints",
            rank=self.place.rank,
            writers=self.writers,
            board=self.place.world.board if several else None,
            keep=self.keep,
            timeout_s=self.place.world.timeout_s,
        )

    def newest(self) -> int | None:
        """The step of the newest whole checkpoint, as rank 0 finds it; None when there is none."""
        if not self.resume or self.checkpoints is None:
            return None
        found = torch.full((1,), -1, dtype=torch.int64, device=self.place.device)
        if self.place.rank == 0:
            step = self.checkpoints.newest(lambda text: self.bus.emit("warning", text=text))
            found.fill_(-1 if step is None else step)
        self.place.replicas.broadcast(found, "agree on the checkpoint").wait()
        step = int(found)
        return None if step < 0 else step

    def read(self, step: int) -> dict[str, Any]:
        """This rank's state of a checkpoint.

        Under the plan that wrote it each site gets its own; under another one every rank gets the
        mean of the sites, weighted by what they learned from since their last round.
        """
        assert self.checkpoints is not None
        written = self.checkpoints.writers(step)
        if len(written) == len(self.writers):
            state: dict[str, Any] = self.checkpoints.read(step, rank=self.my_writer(written))[0]
            return state
        states = [self.checkpoints.read(step, rank=writer)[0] for writer in written]
        weights = [state["rounds"]["samples"] or 1.0 for state in states]
        merged: dict[str, Any] = mean_of_states(states, weights)
        merged["rounds"] = {"samples": 0.0, "steps_since": 0}
        return merged

    def save(
        self,
        step: int,
        state: Callable[[], dict[str, Any]],
        sooner: list[Tensor],
        note: dict[str, Any],
    ) -> None:
        """Begin to save in the background. Once for each step; a no-op without a run folder."""
        if self.checkpoints is None or step in self._asked:
            return
        self._asked = {step}
        if self.place.rank in self.writers:
            self.checkpoints.start(step, state(), score=self.score, note=note, sooner=sooner)

    def settle(self) -> None:
        """Wait until the copies for the save under way are made: weights change next."""
        if self.checkpoints is not None:
            self.checkpoints.settle()

    def wait(self) -> None:
        if self.checkpoints is not None:
            self.checkpoints.wait()
            self.tell_outcomes()

    def tell_outcomes(self) -> None:
        """Emit what came of the saves that have ended."""
        if self.checkpoints is None or self.place.rank != 0:
            return
        for outcome in self.checkpoints.poll():
            if isinstance(outcome, NotSaved):
                self.bus.emit("not_saved", step=outcome.step, reason=outcome.reason)
            else:
                self._last_saved = outcome.step
                self.bus.emit("saved", **{**asdict(outcome), "path": str(outcome.path)})

    def export(self, models: Mapping[str, nn.Module]) -> None:
        """Write model.safetensors (or <name>.safetensors, of several) with the plain names."""
        if self.folder is None or self.place.rank != 0:
            return
        for name, module in models.items():
            path = (
                self.folder.model_path
                if len(models) == 1
                else self.folder.path / f"{name}.safetensors"
            )
            try:
                write_model(path, module.state_dict())
            except CheckpointError as error:
                self.bus.emit("warning", text=f"the model was not exported: {error}")

    def how_to_go_on(self) -> str:
        """Words for an error: what is safe on disk."""
        if self.path is None:
            return "there is no run folder, so no checkpoint"
        self.wait()
        steps = [] if self.checkpoints is None else self.checkpoints.steps()
        if not steps:
            return f"{self.path} holds no checkpoint yet"
        return f"the checkpoint of step {steps[0]} is whole: go on with --resume {self.path}"

    def close(self, *, abandon: bool) -> None:
        if self.checkpoints is not None:
            self.checkpoints.close(abandon=abandon)
            self.tell_outcomes()
        if self.folder is not None:
            self.folder.close()


def _refuse_other(
    folder: RunFolder, fingerprints: Mapping[str, str], facts: Mapping[str, Any]
) -> None:
    """Resuming goes on with the same job, data and batches, or not at all."""
    record = folder.record
    was, now = record.get("fingerprints", {}), fingerprints
    pairs = [(f"fingerprint of the {k}", was.get(k), now[k]) for k in now if k in was]
    pairs += [
        (k, record.get(k), facts[k])
        for k in ("batch_size", "seed", "arguments")
        if k in record and k in facts
    ]
    for what, before, after in pairs:
        if before != after:
            raise RunError(
                f"resume {folder.path}: the {what} was {before} and is {after} now; "
                "allowed: the same job, data, batch size and seed; next: a new --out for a new run"
            )


def mean_of_states(states: list[Any], weights: list[float]) -> Any:
    """The weighted mean of nested states: floating tensors averaged, all else the first's."""
    first = states[0]
    if isinstance(first, dict):
        return {key: mean_of_states([state[key] for state in states], weights) for key in first}
    if isinstance(first, list | tuple):
        return type(first)(
            mean_of_states(list(items), weights) for items in zip(*states, strict=True)
        )
    if isinstance(first, Tensor) and first.is_floating_point():
        total = torch.zeros_like(first, dtype=torch.promote_types(first.dtype, torch.float32))
        for state, weight in zip(states, weights, strict=True):
            total += state * (weight / sum(weights))
        return total.to(first.dtype)
    return first
