"""One save under way: copy, write, agree with the other writing ranks, commit."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from allfuse.base.errors import CheckpointError
from allfuse.link.base import Board
from allfuse.store import shelf
from allfuse.store.durable import PARTIAL, explain, parse_json, sync_folder
from allfuse.store.manifest import Manifest, file_name, parse_record
from allfuse.store.staging import Staging
from allfuse.store.tensorfile import FileRecord, write_tensors

NICENESS = 10  # of 19: a tenth of the share of a thread that trains, all of an idle core
SLICE_S = 0.5
"""How long a wait on the board takes before it looks whether the run has given up."""


@dataclass(frozen=True, kw_only=True)
class Saved:
    """A checkpoint that is whole on the disk.

    `bytes` counts the tensor files of all ranks, `seconds` runs from `start` to the commit, and
    `stalled_seconds` is the part of it for which this rank's caller was held up.
    """

    step: int
    path: Path
    bytes: int
    seconds: float
    stalled_seconds: float


@dataclass(frozen=True, kw_only=True)
class NotSaved:
    """A checkpoint that could not be saved, why, and which one is still there."""

    step: int
    reason: str
    seconds: float
    stalled_seconds: float


class Agreement:
    """What the writing ranks of one save tell each other, over the board.

    The first writer tells the name of the `folder`, every writer the record of its file under its
    rank, and the first writer the `outcome`. Anything told may be a failure instead, which ends
    the wait of whoever asks for it.
    """

    def __init__(
        self, *, rank: int, writers: tuple[int, ...], board: Board | None, name: str
    ) -> None:
        self.rank, self.writers = rank, writers
        self.first = rank == writers[0]
        self._board, self._name = board, name
        self._given_up = threading.Event()

    def tell(self, what: str, value: Mapping[str, Any]) -> None:
        if self._board is not None:
            self._board.set(f"{self._name}/{what}", json.dumps(value).encode())

    def fail(self, reason: str) -> None:
        """Tell everyone who waits for this rank that it failed."""
        with suppress(Exception):  # a board that is gone tells nobody; each has its deadline
            for what in ("folder", str(self.rank), "outcome") if self.first else (str(self.rank),):
                self.tell(what, {"failed": reason})

    def ask(self, what: str, whom: int, deadline: float) -> Any:
        """What `whom` tells.

        Raises:
            CheckpointError: it failed, told nothing by the deadline, or this rank gave up.
        """
        assert self._board is not None
        while not self._given_up.is_set():
            left = deadline - time.monotonic()
            try:
                content = self._board.wait(f"{self._name}/{what}", max(min(left, SLICE_S), 0.001))
            except TimeoutError:
                if left > 0:
                    continue
                raise CheckpointError(f"rank {whom} did not finish its part in time") from None
            value = parse_json(content)
            if not isinstance(value, dict):
                raise CheckpointError(f"rank {whom} told something else than was agreed")
            if "failed" in value:
                raise CheckpointError(_blame(whom, value))
            return value
        raise CheckpointError("the run ended before the other writers had finished")

    def failure(self) -> str | None:
        """Why the first writer failed, None when it did not, or has told nothing yet."""
        with suppress(Exception):  # a board that is gone tells nothing
            if self._board is not None and (told := self._board.get(f"{self._name}/outcome")):
                return _blame(self.writers[0], parse_json(told))
        return None

    def give_up(self) -> None:
        """End every wait for the others soon."""
        self._given_up.set()


class Saving:
    """The work of one save, run by a thread of its own. `outcome` is set when it is over.

    Args:
        staging: was given the tensors by `begin`; used by this save only until it is over.
        error: what went wrong before the thread was started.
    """

    def __init__(
        self,
        *,
        folder: Path,
        manifest: Manifest,
        skeleton: Any,
        staging: Staging,
        agreement: Agreement,
        keep: int,
        timeout_s: float,
        error: Exception | None,
    ) -> None:
        self.folder, self.manifest, self.skeleton = folder, manifest, skeleton
        self.staging, self.agreement, self.error = staging, agreement, error
        self.keep, self.timeout_s = keep, timeout_s
        self.begun = time.perf_counter()
        self.stalled_seconds = 0.0
        self.copied = threading.Event()
        self.outcome: Saved | NotSaved | None = None
        self._partial: Path | None = None
        self.thread = threading.Thread(
            target=self._run, name=f"allfuse-save-{manifest.step}", daemon=True
        )

    def _run(self) -> None:
        try:
            path, size = self._save()
            self.outcome = Saved(
                step=self.manifest.step,
                path=path,
                bytes=size,
                seconds=time.perf_counter() - self.begun,
                stalled_seconds=0.0,
            )
        except Exception as error:
            self.outcome = NotSaved(
                step=self.manifest.step,
                reason=self._clean_up(error),
                seconds=time.perf_counter() - self.begun,
                stalled_seconds=0.0,
            )
        finally:
            self.copied.set()

    def _save(self) -> tuple[Path, int]:
        """Copy (the caller may be waiting), write this rank's file, then commit or see it done."""
        if self.error is not None:
            raise self.error
        self.staging.copy()
        self.copied.set()
        give_way()
        tensors = self.staging.finish()
        partial = self._find_partial()
        mine = partial / file_name(self.agreement.rank)
        record = write_tensors(mine, tensors, {"skeleton": json.dumps(self.skeleton)})
        sync_folder(partial)
        self.agreement.tell(str(self.agreement.rank), asdict(record))
        if self.agreement.first:
            return self._commit(partial, record)
        outcome = self.agreement.ask("outcome", self.agreement.writers[0], self._deadline())
        return self.folder / str(outcome["path"]), int(outcome["bytes"])

    def _find_partial(self) -> Path:
        if self.agreement.first:
            self._partial = shelf.open_partial(self.folder, self.manifest.step)
            self.agreement.tell("folder", {"name": self._partial.name})
            return self._partial
        told = self.agreement.ask("folder", self.agreement.writers[0], self._deadline())
        name = str(told.get("name"))
        partial = self.folder / name
        is_named = name.startswith(PARTIAL) and Path(name).name == name
        if is_named:
            self._partial = partial  # it may be gone again, where the first writer has failed
        if not is_named or not partial.is_dir():
            raise CheckpointError(
                f"rank {self.agreement.rank} does not see {partial}; the run folder must be on a "
                "file system that all writing ranks share"
            )
        return partial

    def _commit(self, partial: Path, mine: FileRecord) -> tuple[Path, int]:
        files, deadline = {self.agreement.rank: mine}, self._deadline()
        for rank in self.agreement.writers[1:]:
            record = parse_record(self.agreement.ask(str(rank), rank, deadline), rank)
            if (partial / record.name).stat().st_size != record.bytes:
                raise CheckpointError(f"the file of rank {rank} is not what that rank wrote")
            files[rank] = record
        manifest = Manifest(**{**vars(self.manifest), "files": files})
        path = shelf.commit(self.folder, partial, manifest)
        size = sum(record.bytes for record in files.values())
        with suppress(Exception):  # it counts from here on, whatever becomes of the board and disk
            self.agreement.tell("outcome", {"path": path.name, "bytes": size})
            shelf.drop_surplus(self.folder, self.manifest.step, self.keep)
        return path, size

    def _clean_up(self, error: Exception) -> str:
        reason = self._explain(error)
        self.agreement.fail(reason)  # before the others see their folder vanish
        if self._partial is not None and self.agreement.first:
            shutil.rmtree(self._partial, ignore_errors=True)
        earlier = None
        with suppress(OSError):
            earlier = next(iter(shelf.committed(self.folder)), None)
        if earlier is None:
            return f"{reason}; there is no earlier checkpoint"
        return f"{reason}; the checkpoint of step {earlier} is still there"

    def _explain(self, error: Exception) -> str:
        if self._partial is not None and not self._partial.exists():
            told = self.agreement.failure()
            if told is not None:
                return told
        if isinstance(error, OSError):
            return explain(error, self.folder)
        if isinstance(error, CheckpointError):
            return str(error)
        return f"{type(error).__name__}: {error}"

    def _deadline(self) -> float:
        return time.monotonic() + self.timeout_s


def give_way() -> None:
    """Lower this thread's priority, so that training keeps the cores where all are busy.

    Threads of a kernel wait for each other, so one that loses its core to the writer holds up all.
    """
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)


def _blame(rank: int, value: Mapping[str, Any]) -> str:
    return f"rank {rank} could not save: {value['failed']}"
