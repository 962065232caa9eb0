"""Checkpoints of a run over servers: made of what those wrote to disk, and read back for them.

The scheduler's process makes them, one tensor at a time, while training goes on. So a run over
servers is a run like any other: what reads a checkpoint does not ask what wrote it.
"""

from __future__ import annotations

import functools
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from allfuse.base.errors import AllfuseError, CheckpointError
from allfuse.plan import Plan, as_plan
from allfuse.roles.blueprint import Blueprint
from allfuse.roles.messages import Save
from allfuse.roles.snapshots import Snapshots
from allfuse.roles.versions import Version
from allfuse.roles.wrapping import split_parts, unwrap
from allfuse.split.piece import Piece
from allfuse.store.checkpoint import Checkpoints
from allfuse.store.saving import NotSaved, Saved, give_way
from allfuse.store.tree import unpack
from allfuse.store.writing import StandIns, write_checkpoint
from allfuse.training.cursor import Cursor
from allfuse.training.joined import join_states
from allfuse.training.merged import read_merged

HELD = "held"


class Binder:
    """Makes checkpoints of versions that servers wrote.

    Servers keep their last few versions; those that a checkpoint may still be made of are held by
    links of their own.

    Args:
        run: the run's folder. snapshots: where servers write.
        names: of the optimizer's parameters in its order, as servers call them; None: frozen.
        keep: how many checkpoints stay, the best not counted.
    """

    def __init__(
        self,
        run: Path,
        snapshots: Path,
        plan: Plan,
        blueprint: Blueprint,
        names: Sequence[str | None],
        steps_per_epoch: int,
        keep: int,
    ) -> None:
        self.checkpoints, self.snapshots, self.plan = run / "checkpoints", snapshots, plan
        self.blueprint, self.names, self.keep = blueprint, names, keep
        self._steps_per_epoch = steps_per_epoch
        self._wanted: set[int] = set()
        self._executor = ThreadPoolExecutor(1, "allfuse-binder", give_way)
        self._under_way: list[Future[Saved | NotSaved]] = []

    def hold(self, sequence: int) -> None:
        """A version may be asked for later."""
        self._wanted = {sequence}

    def written(self, sequence: int) -> None:
        """All servers have written a version."""
        if sequence in self._wanted:
            self._link(sequence)

    def bind(
        self,
        versions: Sequence[Mapping[str, Any]],
        score: float | None,
        messages: Sequence[Save],
    ) -> None:
        """Begin to make a checkpoint of the first of these versions that is there; see `Saves`."""
        for version in versions:
            self._link(version["sequence"])
        task = functools.partial(self._try, versions, score, messages)
        self._under_way.append(self._executor.submit(task))

    def poll(self) -> list[Saved | NotSaved]:
        """What came of those that have ended."""
        ended = []
        while self._under_way and self._under_way[0].done():
            ended.append(self._under_way.pop(0).result())
        return ended

    def close(self) -> list[Saved | NotSaved]:
        """Wait for those under way; what came of them."""
        self._executor.shutdown()
        shutil.rmtree(self.snapshots / HELD, ignore_errors=True)
        return self.poll()

    def _paths(self, sequence: int, held: bool) -> list[Path]:
        servers = self.plan.servers
        own = [Snapshots(self.snapshots, n, servers).path(sequence) for n in range(servers)]
        return [self.snapshots / HELD / path.name for path in own] if held else own

    def _link(self, sequence: int) -> None:
        if not self.plan.servers:  # who asks for a checkpoint brings all of it
            return
        with suppress(OSError):
            (self.snapshots / HELD).mkdir(parents=True, exist_ok=True)
        for own, held in zip(
            self._paths(sequence, False), self._paths(sequence, True), strict=True
        ):
            with suppress(OSError):  # gone, or held already
                os.link(own, held)

    def _try(
        self,
        versions: Sequence[Mapping[str, Any]],
        score: float | None,
        messages: Sequence[Save],
    ) -> Saved | NotSaved:
        begin, step = time.perf_counter(), int(versions[0]["whole"])
        try:
            for version in versions:
                self._link(version["sequence"])  # one made of it before has let go of the links
                paths = self._paths(version["sequence"], True)
                if all(path.is_file() for path in paths):
                    is_first = version is versions[0]
                    saved = self._bind(version, paths, score if is_first else None, messages)
                    self._let_go(version["sequence"])
                    return saved
            reason = "the servers' files of its version are gone"
        except AllfuseError as error:
            reason = str(error)
        except Exception as error:  # told, as any other reason
            reason = f"{type(error).__name__}: {error}"
        seconds = time.perf_counter() - begin
        return NotSaved(step=step, reason=reason, seconds=seconds, stalled_seconds=0.0)

    def _let_go(self, sequence: int) -> None:
        """Of this version and those before it no checkpoint will be made any more."""
        for path in (self.snapshots / HELD).glob("*.safetensors"):
            if int(path.stem.rpartition("-")[2]) <= sequence:
                path.unlink(missing_ok=True)

    def _bind(
        self,
        version: Mapping[str, Any],
        paths: Sequence[Path],
        score: float | None,
        messages: Sequence[Save],
    ) -> Saved:
        files, standins = Version(self.blueprint, paths), StandIns()
        state = self._state(files, standins, messages)
        step = int(version["whole"])
        epoch, within = divmod(step, self._steps_per_epoch)
        last = max(step - 1, 0) // self._steps_per_epoch
        state["cursor"] = list(Cursor(step, epoch, within, last, 0, step, epoch))
        state["learned"] = version["learned"]
        note = {"steps": step, "plan": str(self.plan), "sequence": version["sequence"]}
        return write_checkpoint(
            self.checkpoints,
            step,
            state,
            note=note,
            score=score,
            keep=self.keep,
            fill=standins.fill,
        )

    def _state(self, files: Version, standins: StandIns, messages: Sequence[Save]) -> Any:
        """What a worker handed in, with what the servers hold in its place."""
        parts = [unwrap(part) for part in split_parts(messages)]
        held = self.blueprint.parts
        state = join_states([unpack(content["state"], tensors) for content, tensors in parts])
        for prefix, names in parts[0][0]["held"].items():
            own, values = state["models"][prefix], {}
            for name, first in names.items():
                if first is None:
                    values[name] = own[name]
                    continue
                read = functools.partial(files.weights, first)
                values[name] = standins.make(held[first][0].dtype, files.shape(first), read)
            state["models"][prefix] = values
        kept = {name: self._states(files, standins, name) for name in held}
        groups = self.blueprint.groups
        outer = {n: s for n, s in kept.items() if groups[held[n][0].group].pushed == "change"}
        if any(outer.values()):
            state["outer"] = outer
        gradients = {n: s for n, s in kept.items() if n not in outer and s}
        if gradients:
            state["optimizers"][0]["state"] = {
                index: gradients[name] for index, name in enumerate(self.names) if name in gradients
            }
        return state

    def _states(self, files: Version, standins: StandIns, name: str) -> dict[str, Tensor]:
        found = {}
        for kind, (dtype, shape) in files.states(name).items():
            read = functools.partial(files.state, name, kind)
            found[kind] = standins.make(dtype, shape, read)
        return found


def read_state(
    checkpoints: Checkpoints,
    step: int,
    pieces: Mapping[str, Piece | None] | None = None,
    *,
    mapped: bool = False,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The state of a checkpoint as one worker would go on from it, whatever wrote it; its note.

    pieces: what this rank has of tensors that it has not whole. mapped: tensors may lie in their
        files still.
    """
    written = checkpoints.writers(step)
    note = checkpoints.read(step, rank=written[0], mapped=True)[1]
    if "plan" not in note:
        raise CheckpointError(f"the checkpoint of step {step} does not say what its plan was")

    def read(writer: int) -> dict[str, Any]:
        state: dict[str, Any] = checkpoints.read(step, rank=writer, mapped=mapped)[0]
        return state

    old = as_plan(note["plan"])
    return read_merged(as_plan("data(1)"), 0, old, written, read, pieces), note
