"""Checkpoints of a run: saved in the background, whole or absent, verified when read."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from allfuse.base.errors import CheckpointError
from allfuse.link.base import Board
from allfuse.store import shelf
from allfuse.store.durable import parse_json
from allfuse.store.manifest import Manifest, read_manifest
from allfuse.store.saving import Agreement, NotSaved, Saved, Saving
from allfuse.store.staging import Staging
from allfuse.store.tensorfile import DAMAGED, check_file, read_metadata, read_tensors
from allfuse.store.tree import pack, unpack

__all__ = ["Checkpoints", "NotSaved", "Saved"]


class Checkpoints:
    """The checkpoints in a folder.

        step-00000120/
            manifest.json            step, time, score, note; each file's size and digest
            rank-0.safetensors       the state of one writing rank

    A save stalls training little: `start` copies what will change soon, a thread copies the rest
    while the next batch is computed, `settle` waits for the copies before the weights change, and
    the same thread then writes. A crash at any moment leaves the whole new checkpoint or none of
    it. Reading needs no lock and never changes the folder.

    Args:
        folder: where the checkpoints are; made by the first save.
        rank: this process.
        writers: the ranks that save, each its own state. The first of them commits. On other
            ranks the methods that save do nothing.
        board: how several writers agree. Checkpoints that live one after the other need boards
            of their own, such as one prefix each.
        keep: how many are kept, the best by score not counted.
        timeout_s: how long a writer waits for the others.

    Example:
        checkpoints = Checkpoints(Path("runs/x/checkpoints"))
        for step in range(100):
            loss = backward()
            checkpoints.settle()                        # before weights change
            optimizer.step()
            if step % 10 == 9:
                checkpoints.start(step + 1, {"model": model.state_dict()})
            for outcome in checkpoints.poll():
                print(outcome)
        checkpoints.close()
    """

    def __init__(
        self,
        folder: Path,
        *,
        rank: int = 0,
        writers: tuple[int, ...] = (0,),
        board: Board | None = None,
        keep: int = 3,
        timeout_s: float = 300,
    ) -> None:
        if keep < 1:
            raise ValueError(f"keep is {keep}; at least 1 checkpoint must be kept")
        if not writers or (len(writers) > 1 and board is None):
            raise ValueError(f"writers are {writers}; one needs no board, several need one")
        self.folder, self.rank = Path(folder), rank
        self._writers, self._board = writers, board
        self._keep, self._timeout_s = keep, timeout_s
        self._staging = Staging()
        self._count = 0
        self._saving: Saving | None = None
        self._unsettled: Saving | None = None
        self._unpolled: list[Saving] = []

    def start(
        self,
        step: int,
        state: Any,
        *,
        score: float | None = None,
        note: Mapping[str, Any] | None = None,
        sooner: Iterable[Tensor] = (),
    ) -> None:
        """Begin to save a nest of live tensors and plain values (see `tree.pack`).

        Call it on every writing rank, for the same steps in the same order. Waits for the save
        before it, if that is still under way. What goes wrong later is told by `poll`.

        Args:
            step: optimizer steps done so far. Checkpoints of later steps are dropped with the
                commit: they belong to a history that the run has left.
            state: what this rank saves. Its tensors must not change before `settle`.
            score: how good it is; higher is better, NaN is no score.
            note: plain values for the manifest, of the first writer.
            sooner: tensors that change before `settle`, such as buffers; copied at once, with
                all that share memory with them.

        Raises:
            CheckpointError: the state or the note holds something that cannot be saved, which
                would be so at every later save too.
        """
        if self.rank not in self._writers:
            return
        begun = time.perf_counter()
        self.wait()
        self._count += 1
        name = f"saved/{self._count}/{step}"
        agreement = Agreement(rank=self.rank, writers=self._writers, board=self._board, name=name)
        try:
            skeleton, tensors = pack(state)
            plain = _copy_note(note)
        except CheckpointError as error:
            agreement.fail(str(error))
            raise
        failure: Exception | None = None
        try:
            self._staging.begin(tensors, sooner)
        except (RuntimeError, MemoryError) as error:  # the thread tells it, as any later one
            failure = error
        saving = Saving(
            folder=self.folder,
            manifest=Manifest(
                step=step, time=time.time(), score=_plain_score(score), note=plain, files={}
            ),
            skeleton=skeleton,
            staging=self._staging,
            agreement=agreement,
            keep=self._keep,
            timeout_s=self._timeout_s,
            error=failure,
        )
        saving.begun = begun
        self._saving = self._unsettled = saving
        self._unpolled.append(saving)
        saving.thread.start()
        saving.stalled_seconds = time.perf_counter() - begun

    def settle(self) -> None:
        """Return when the tensors of the save under way may change. Costs nothing without one."""
        saving = self._unsettled
        if saving is None:
            return
        begun = time.perf_counter()
        saving.copied.wait()
        self._staging.hold()
        self._unsettled = None
        saving.stalled_seconds += time.perf_counter() - begun

    def wait(self) -> None:
        """Return when no save is under way."""
        self.settle()
        if self._saving is not None:
            self._saving.thread.join()
            self._saving = None

    def poll(self) -> list[Saved | NotSaved]:
        """What came of the saves that ended since the last call, in order. Never blocks."""
        ended = [saving for saving in self._unpolled if saving.outcome is not None]
        self._unpolled = [saving for saving in self._unpolled if saving not in ended]
        return [
            replace(saving.outcome, stalled_seconds=saving.stalled_seconds)
            for saving in ended
            if saving.outcome is not None
        ]

    def close(self, *, abandon: bool = False) -> None:
        """End the save under way and its thread, and free the memory for copies.

        Args:
            abandon: do not wait for other writers, as when one of them is lost; then a save that
                they have not finished does not count.
        """
        if abandon and self._saving is not None:
            self._saving.agreement.give_up()
        self.wait()
        self._staging = Staging()

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, newest first."""
        return list(shelf.committed(self.folder))

    def best(self) -> int | None:
        """The step with the highest score, None when none has one."""
        return shelf.best(self.folder, self.steps())

    def writers(self, step: int) -> tuple[int, ...]:
        """The ranks that wrote a checkpoint.

        Raises:
            CheckpointError: there is none of that step, or its manifest is damaged.
        """
        return tuple(read_manifest(self._find(step)).files)

    def read(
        self, step: int, rank: int | None = None, *, mapped: bool = False
    ) -> tuple[Any, dict[str, Any]]:
        """The state that a rank saved, its tensors on the CPU, and the note.

        Args:
            step: one of `steps()`.
            rank: one of `writers(step)`; None is this rank, or the first writer where this rank
                wrote nothing.
            mapped: as for `read_tensors`.

        Raises:
            CheckpointError: there is no such checkpoint, or it is damaged; says what and where.
        """
        folder = self._find(step)
        manifest = read_manifest(folder)
        if rank is None:
            rank = self.rank if self.rank in manifest.files else next(iter(manifest.files))
        if rank not in manifest.files:
            allowed = ", ".join(map(str, manifest.files))
            raise CheckpointError(f"rank {rank} wrote nothing to {folder}; allowed: {allowed}")
        path = folder / manifest.files[rank].name
        tensors = read_tensors(path, record=manifest.files[rank], mapped=mapped)
        try:
            skeleton = parse_json(read_metadata(path)["skeleton"])
            return unpack(skeleton, tensors), dict(manifest.note)
        except (KeyError, ValueError, CheckpointError) as error:
            raise CheckpointError(f"{path} holds no training state: {error}; {DAMAGED}") from error

    def newest(self, on_damaged: Callable[[str], None]) -> int | None:
        """The newest checkpoint of which every byte is as it was written; None without one.

        Args:
            on_damaged: called with a message for each newer one that is damaged.
        """
        for step in self.steps():
            try:
                folder = self._find(step)
                for record in read_manifest(folder).files.values():
                    check_file(folder / record.name, record)
            except CheckpointError as error:
                on_damaged(f"the checkpoint of step {step} cannot be used: {error}")
            else:
                return step
        return None

    def _find(self, step: int) -> Path:
        folders = shelf.committed(self.folder)
        if step not in folders:
            allowed = ", ".join(map(str, folders)) or "none, the folder holds no checkpoint"
            raise CheckpointError(
                f"there is no checkpoint of step {step} in {self.folder}; allowed: {allowed}"
            )
        return folders[step]


def _plain_score(score: float | None) -> float | None:
    return None if score is None or math.isnan(score) else float(score)


def _copy_note(note: Mapping[str, Any] | None) -> dict[str, Any]:
    try:
        copied: dict[str, Any] = json.loads(json.dumps(dict(note or {})))
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"the note of a checkpoint holds something that JSON cannot: {error}; allowed are "
            "dict, list, str, int, float, bool and None"
        ) from error
    return copied
