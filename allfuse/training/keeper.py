"""Keeps a run on disk: the run folder, checkpoints, and how to go on from them."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from torch import Tensor

from allfuse.base.errors import CheckpointError, RunError, UserError
from allfuse.base.pages import let_go
from allfuse.base.tensors import leaves, map_nest
from allfuse.launcher.base import BEGAN
from allfuse.plan import Plan, as_plan
from allfuse.split.piece import Piece
from allfuse.store.checkpoint import Checkpoints, NotSaved
from allfuse.store.durable import explain
from allfuse.store.run import MODEL, RunFolder, is_run, versions
from allfuse.store.tensorfile import write_model
from allfuse.training.merged import is_lead, read_merged, writers_of

if TYPE_CHECKING:
    from allfuse.base.events import Bus
    from allfuse.training.place import Place

LEAVES_WITHIN_S, POLL_S = 5.0, 0.02
NONE_YET, NONE_USABLE = -1, -2  # instead of a checkpoint's step

SAME = ("batch_size", "seed", "order", "arguments", "optimizers", "schedulers")
"""What is recorded of a run and must be the same when it is resumed."""


Resume: TypeAlias = bool | Literal["auto"]
"""Whether to go on with the run in a folder; "auto": if it holds one."""


def decide_resume(resume: Resume, out: str | Path | None) -> bool:
    """What "auto" comes to. The same on all ranks: the folder is made once all have asked."""
    if resume == "auto":
        return out is not None and is_run(out)
    if not isinstance(resume, bool):
        raise UserError(f"resume={resume!r}: allowed: True, False, or 'auto'")
    return resume


class Keeper:
    """The run folder of a session, or nothing to write to when it has none.

    Rank 0 alone writes the folder. A checkpoint is written by one rank of each site, since sites
    differ, and in parts by all that keep what a codec has not sent; the first rank commits it.
    """

    def __init__(
        self, place: Place, out: str | Path | None, resume: Resume, keep: int, bus: Bus
    ) -> None:
        resume = decide_resume("auto" if place.world.resumes else resume, out)
        if resume and out is None:
            raise RunError("resume: no run folder was given; next: out='runs/x' with resume=True")
        self.place, self.bus, self.keep, self.resume = place, bus, keep, resume
        self.path = None if out is None else Path(out)
        self.folder: RunFolder | None = None
        self.checkpoints: Checkpoints | None = None
        self.troubles: list[str] = []
        self.job_file: Path | None = None
        self.facts: dict[str, Any] = {}
        self.fingerprints: dict[str, str] = {}
        self.asked = NONE_YET  # the step of the last save
        self._holds = False
        self._was_lost = False  # rank 0, which may have made the folder
        self._record: dict[str, Any] = {}
        self._is_gone = False
        self._refuse_early()

    def _refuse_early(self) -> None:
        """What can be refused before any work: a folder in use, or nothing to resume."""
        if self.path is None:
            return
        if self.resume:
            RunFolder.open(self.path)
        elif self.place.rank == 0 and is_run(self.path):
            raise RunError(
                f"run folder {self.path} exists already; allowed: a new folder; "
                f"next: --resume {self.path} to go on with it, or another --out"
            )

    @property
    def writers(self) -> tuple[int, ...]:
        return writers_of(self.place.plan)

    def begin(self, facts: Mapping[str, Any], fingerprints: Mapping[str, str]) -> None:
        """Create the run folder, or open it and refuse another job, data or batch.

        What whoever made the session knows (`facts`, `fingerprints`, `job_file`) is recorded too.
        """
        if self.path is None:
            return
        facts, fingerprints = {**facts, **self.facts}, {**fingerprints, **self.fingerprints}
        record = self.describe(facts, fingerprints, self.place.plan)
        if self.resume:
            self.folder = RunFolder.open(self.path, lock=self.place.rank == 0)
            refuse_other(self.folder, fingerprints, facts)
            if self.place.rank == 0 and self.folder.record.get("plan") != record["plan"]:
                self.folder.update(plan=record["plan"], command=record["command"])
        else:
            self._record = record
            if self.place.rank == 0:
                self.folder = self._make_folder(self.path)
        if self.place.rank == 0:
            self.place.world.board.set(BEGAN, b"")
        self._holds = self.place.rank == 0
        self.checkpoints = self._make_checkpoints(self.path)

    def _make_checkpoints(self, path: Path) -> Checkpoints:
        several = len(self.writers) > 1
        return Checkpoints(
            path / "checkpoints",
            rank=self.place.rank,
            writers=self.writers,
            board=self.place.world.board if several else None,
            keep=self.keep,
            timeout_s=self.place.world.timeout_s,
        )

    def _make_folder(self, path: Path) -> RunFolder:
        """The run folder, which a rank that was lost may have made."""
        if self._was_lost and is_run(path):
            return open_left(path)
        return RunFolder.create(path, self._record, self.job_file)

    def meet_peers(self) -> None:
        """After a loss: the first of those that are left holds the folder, and writers agree anew.

        What was being saved by several, or by a rank that is lost, does not count.
        """
        self._was_lost = True
        if self.path is None or self.checkpoints is None:
            return
        leads = self.place.rank == 0
        if leads and self._holds and len(self.writers) == 1:
            return
        self.checkpoints.close(abandon=True)
        if leads and not self._holds:
            self.folder, self._holds = self._make_folder(self.path), True
        self.checkpoints = self._make_checkpoints(self.path)

    def describe(
        self, facts: Mapping[str, Any], fingerprints: Mapping[str, str], plan: Plan
    ) -> dict[str, Any]:
        """The record of a run."""
        return {
            "plan": str(plan),
            "command": shlex.join(sys.argv),
            "versions": versions(),
            "fingerprints": dict(fingerprints),
            **facts,
            **self.facts,
        }

    def recorded(self, name: str) -> dict[str, Any]:
        """What a run that is resumed knows under a name; empty for a new run."""
        if not self.resume or self.path is None:
            return {}
        folder = self.folder or RunFolder.open(self.path)
        return dict(folder.record.get(name, {}))

    def record(self, **entries: Any) -> None:
        """Add to what is known of the run."""
        if self.folder is not None and self.place.rank == 0:
            self.folder.update(**entries)

    def newest(self, agree: Callable[[Callable[[], int]], int]) -> int | None:
        """The step of the newest usable checkpoint, as rank 0 finds it; None before the first.

        `agree` gives all what a function finds on rank 0. `troubles` says then what is wrong with
        newer ones.

        Raises:
            CheckpointError: there are checkpoints, and none can be used.
        """
        if not self.resume or self.checkpoints is None:
            return None
        checkpoints = self.checkpoints
        step = agree(lambda: self._find_usable(checkpoints))
        if step == NONE_USABLE:
            raise CheckpointError(
                f"resume {self.path}: none of its checkpoints can be used"
                f"{''.join(f'; {trouble}' for trouble in self.troubles)}; next: a new run folder"
            )
        if step != NONE_YET:
            self.asked = step
            return step
        return None

    def _find_usable(self, checkpoints: Checkpoints) -> int:
        steps = checkpoints.steps()
        for step in steps:
            trouble = trouble_with(checkpoints, step)
            if trouble is None:
                return step
            self.troubles.append(f"the checkpoint of step {step} cannot be used: {trouble}")
        return NONE_USABLE if steps else NONE_YET

    def read(self, step: int, pieces: Mapping[str, Piece | None]) -> dict[str, Any]:
        """This rank's state of a checkpoint; see `read_merged`. Of the files it reads what it
        needs, and compares them with what was written, and has one tensor whole at a time. Weights
        that are needed as they lie in a file stay there, for those who copy them."""
        checkpoints = self.checkpoints
        assert checkpoints is not None
        written = checkpoints.writers(step)
        note = checkpoints.read(step, rank=written[0], mapped=True)[1]
        mapped: dict[int, Tensor] = {}

        def read(writer: int) -> dict[str, Any]:
            state: dict[str, Any] = checkpoints.read(step, rank=writer, mapped=True)[0]
            mapped.update((id(leaf), leaf) for leaf in leaves(state) if isinstance(leaf, Tensor))
            return state

        plan, old = self.place.plan, as_plan(note["plan"])
        state = read_merged(plan, self.place.rank, old, written, read, pieces)

        def own(leaf: Any) -> Any:
            if id(leaf) not in mapped:
                return leaf
            copied = leaf.clone()
            let_go(leaf)
            return copied

        rest = {name: map_nest(own, part) for name, part in state.items() if name != "models"}
        return {**state, **rest}

    def save(
        self,
        step: int,
        capture: Callable[[], tuple[dict[str, Any], list[Tensor]]],
        *,
        score: float | None,
        note: dict[str, Any],
    ) -> None:
        """Begin to save in the background. Once for each step; a no-op without a run folder.

        `capture` gives the state, and those of its tensors that change before the weights do.
        """
        if self.checkpoints is None or step == self.asked:
            return
        self.asked = step
        if self.place.rank in self.writers:
            state, sooner = capture()
            if not is_lead(self.place.plan, self.place.rank):
                state = {"fusions": state["fusions"], "pieces": state["pieces"]}
                sooner = [each for each in leaves(state) if isinstance(each, Tensor)]
            self.checkpoints.start(step, state, score=score, note=note, sooner=sooner)

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
                self.bus.emit("saved", **{**asdict(outcome), "path": str(outcome.path)})
                self._warn_if_gone()

    def _warn_if_gone(self) -> None:
        """Someone may remove or rename the folder; what is saved then is not part of a run."""
        if self.path is not None and not self._is_gone and not is_run(self.path):
            self._is_gone = True
            text = f"the run folder {self.path} was removed or renamed: it cannot be resumed"
            self.bus.emit("warning", text=text)

    def export(
        self,
        models: Mapping[str, Mapping[str, Any]],
        folder: RunFolder | None = None,
        fill: Callable[[Tensor], Tensor] = lambda tensor: tensor,
        stem: str = MODEL,
    ) -> None:
        """Write model.safetensors (or <name>.safetensors, of several) with the plain names; under
        another stem <stem>.safetensors (or <stem>-<name>.safetensors).

        Args:
            models: state dicts of whole models.
            fill: gives the values of tensors that stand for them, when they are written.
        """
        folder = folder or self.folder
        if folder is None or self.place.rank != 0:
            return
        for name, values in models.items():
            own = [stem] if len(models) == 1 else [name] if stem == MODEL else [stem, name]
            path = folder.path / f"{'-'.join(own)}.safetensors"
            try:
                path.parent.mkdir(exist_ok=True)
                write_model(path, values, fill)
            except (CheckpointError, OSError) as error:
                said = explain(error, path) if isinstance(error, OSError) else error
                what = "the model" if stem == MODEL else path.name
                self.bus.emit("warning", text=f"{what} was not exported: {said}")

    def how_to_go_on(self, diverged: bool = False) -> str:
        """Words for an error: what is safe on disk.

        Args:
            diverged: the weights are not finite, so that checkpoints must be looked into.
        """
        if self.path is None:
            return "there is no run folder, so no checkpoint"
        if self.checkpoints is None:
            return f"nothing was written to {self.path} yet"
        self.wait()
        how = f"--resume {self.path}" if self.job_file is not None else "resume=True"
        if self.place.rank not in self.writers:  # it cannot know what was written by now
            return f"go on from the last whole checkpoint in {self.path} with {how}"
        for step in self.checkpoints.steps():
            if not diverged or trouble_with(self.checkpoints, step) is None:
                return f"the checkpoint of step {step} is whole: go on with {how}"
        return f"{self.path} holds no checkpoint yet"

    def close(self, *, abandon: bool) -> None:
        if self.checkpoints is not None:
            self.checkpoints.close(abandon=abandon)
            self.tell_outcomes()
        if self.folder is not None:
            self.folder.close()


def open_left(path: Path) -> RunFolder:
    """The run folder of a rank that is lost, which may hold it for a moment yet: who leaves with
    another is ended by the launcher."""
    deadline = time.monotonic() + LEAVES_WITHIN_S
    while True:
        try:
            return RunFolder.open(path, lock=True)
        except RunError:
            if time.monotonic() > deadline:
                raise
            time.sleep(POLL_S)


def trouble_with(checkpoints: Checkpoints, step: int) -> str | None:
    """Why a checkpoint is not one to go on from: damaged, or taken after the weights diverged."""
    try:
        for writer in checkpoints.writers(step):
            state, _ = checkpoints.read(step, rank=writer, mapped=True)
            for model, name in state.get("trained", ()):
                weight = state["models"][model].get(name)
                if isinstance(weight, Tensor) and not bool(weight.isfinite().all()):
                    return f"its weights {name} are not finite"
    except CheckpointError as error:
        return str(error)
    except KeyError as error:
        return f"it holds no {error}"
    return None


def refuse_other(
    folder: RunFolder, fingerprints: Mapping[str, str], facts: Mapping[str, Any]
) -> None:
    """Resuming goes on with the same job, data and batches, or not at all."""
    record = folder.record
    if "merged" in record:
        raise RunError(
            f"resume {folder.path}: its weights were merged, and there is no training to go on "
            "with; next: a new --out, and a job that begins with these weights"
        )
    was, now = record.get("fingerprints", {}), fingerprints
    pairs = [(f"fingerprint of the {k}", was.get(k), now[k]) for k in now if k in was]
    pairs += [(k, record[k], facts[k]) for k in SAME if k in record and k in facts]
    for what, before, after in pairs:
        if before != after:
            raise RunError(
                f"resume {folder.path}: {_difference(what, before, after)}; allowed: the same job, "
                "data, order of samples and arguments; next: a new --out for a new run"
            )


def _difference(what: str, before: Any, after: Any) -> str:
    """What was recorded and what it is now, of a dict only the entries that differ."""
    if isinstance(before, dict) and isinstance(after, dict):
        names = [n for n in {**before, **after} if before.get(n) != after.get(n)]
        told = [f"{name} was {before.get(name)} and is {after.get(name)} now" for name in names]
        return f"{what}: {', '.join(told)}"
    return f"the {what} was {before} and is {after} now"
