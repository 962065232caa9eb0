"""A server's shard on disk, by the sequence that it is of."""

from __future__ import annotations

import json
import re
from concurrent.futures import Executor, Future
from contextlib import suppress
from pathlib import Path

from torch import Tensor

from allfuse.base.errors import CheckpointError
from allfuse.roles.shard import Shard
from allfuse.store.durable import explain, partial_path, replace_file
from allfuse.store.tensorfile import read_metadata, read_tensors, write_tensors

KEPT = 3
"""So many are kept: other servers may not have written the newest yet when a job breaks off."""


class Snapshots:
    """Safetensors files of one server in a folder. Each is there as a whole or not at all.

    Args:
        executor: of one thread, that writes while the server goes on, which copies what it steps
            meanwhile; None writes at once.

    Attributes:
        failed: the last sequence that the executor could not write, and why; -1 for none.

    Example:
        snapshots = Snapshots(folder, index=0, servers=2)
        snapshots.save(shard, sequence=100)
        assert snapshots.written() == 100
        snapshots.load(shard, sequence=snapshots.newest())
    """

    def __init__(
        self, folder: Path, index: int, servers: int, executor: Executor | None = None
    ) -> None:
        self.folder, self.index, self.servers = folder, index, servers
        self._executor = executor
        self._written = -1
        self._writing: list[tuple[int, Future[int]]] = []
        self.failed: tuple[int, str] = (-1, "")
        self._pattern = re.compile(rf"server-{index}-of-{servers}-(\d{{10,18}})\.safetensors")

    def path(self, sequence: int) -> Path:
        return self.folder / f"server-{self.index}-of-{self.servers}-{sequence:010d}.safetensors"

    def all(self) -> list[int]:
        """The sequences that there are, oldest first."""
        if not self.folder.is_dir():
            return []
        names = [self._pattern.fullmatch(path.name) for path in self.folder.iterdir()]
        return sorted(int(match[1]) for match in names if match)

    def newest(self, most: int | None = None) -> int:
        """The last sequence, up to `most`; -1 where there is none."""
        return max((each for each in self.all() if most is None or each <= most), default=-1)

    def save(self, shard: Shard, sequence: int) -> None:
        """Write a shard as it is now; older files than the last `KEPT` are removed.

        Raises:
            CheckpointError: it could not be written at once; those that were there stay.
        """
        tensors = {
            f"{piece}/{name}": tensor
            for piece in range(len(shard.pieces))
            for name, tensor in shard.capture(piece).items()
        }
        facts = {"sequence": sequence, "blueprint": shard.blueprint.digest}
        if self._executor is None:
            self._written = self._write(tensors, facts, sequence)
        else:
            writing = self._executor.submit(self._write, tensors, facts, sequence)
            self._writing.append((sequence, writing))

    def written(self) -> int:
        """The last sequence that `save` has brought to the disk, -1 for none."""
        while self._writing and self._writing[0][1].done():
            sequence, writing = self._writing.pop(0)
            try:
                self._written = writing.result()
            except CheckpointError as error:
                self.failed = sequence, str(error)
        return self._written

    @property
    def is_writing(self) -> bool:
        """Whether something that was saved is not on disk yet."""
        return any(not writing.done() for _, writing in self._writing)

    def _write(self, tensors: dict[str, Tensor], facts: dict[str, object], sequence: int) -> int:
        path = self.path(sequence)
        partial = partial_path(path)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_tensors(partial, tensors, {"allfuse.server": json.dumps(facts)}, takes=True)
            replace_file(partial, path)
        except (OSError, CheckpointError) as error:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            if isinstance(error, OSError):
                raise CheckpointError(explain(error, path)) from error
            raise
        for old in self.all()[:-KEPT]:
            self.path(old).unlink(missing_ok=True)
        return sequence

    def load(self, shard: Shard, sequence: int) -> None:
        """Make a shard what it was.

        Raises:
            CheckpointError: the file is damaged, or of another model.
        """
        path = self.path(sequence)
        try:
            facts = json.loads(read_metadata(path).get("allfuse.server", "{}"))
        except ValueError:
            facts = {}
        if facts != {"sequence": sequence, "blueprint": shard.blueprint.digest}:
            raise CheckpointError(
                f"{path} is not the shard of this model at sequence {sequence}; next: choose "
                "another run folder, or the job that wrote it"
            )
        pieces: dict[str, dict[str, Tensor]] = {str(n): {} for n in range(len(shard.pieces))}
        for name, tensor in read_tensors(path).items():
            piece, _, rest = name.partition("/")
            pieces.setdefault(piece, {})[rest] = tensor
        if len(pieces) > len(shard.pieces):
            raise CheckpointError(f"{path} is of a shard in other pieces")
        for number, tensors in enumerate(pieces.values()):
            shard.restore(number, tensors)

    def drop_after(self, sequence: int) -> None:
        """Remove those of a history that the run has left."""
        for each in self.all():
            if each > sequence:
                self.path(each).unlink(missing_ok=True)
