"""A server's shard on disk, by the sequence that it is of."""

from __future__ import annotations

import json
import re
from pathlib import Path

from allfuse.base.errors import CheckpointError
from allfuse.roles.shard import Shard
from allfuse.store.durable import explain, partial_path, replace_file
from allfuse.store.tensorfile import read_metadata, read_tensors, write_tensors

KEPT = 3
"""So many are kept: other servers may not have written the newest yet when a job breaks off."""


class Snapshots:
    """Safetensors files of one server in a folder. Each is there as a whole or not at all.

    Example:
        snapshots = Snapshots(folder, index=0, servers=2)
        snapshots.save(shard, sequence=100)
        snapshots.load(shard, sequence=snapshots.newest())
    """

    def __init__(self, folder: Path, index: int, servers: int) -> None:
        self.folder, self.index, self.servers = folder, index, servers
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
        """Write a shard; older files than the last `KEPT` are removed.

        Raises:
            CheckpointError: it cannot be written; those that were there stay.
        """
        path = self.path(sequence)
        partial = partial_path(path)
        facts = {"sequence": sequence, "blueprint": shard.blueprint.digest}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_tensors(partial, shard.capture(), {"allfuse.server": json.dumps(facts)})
            replace_file(partial, path)
        except (OSError, CheckpointError) as error:
            partial.unlink(missing_ok=True)
            if isinstance(error, OSError):
                raise CheckpointError(explain(error, path)) from error
            raise
        for old in self.all()[:-KEPT]:
            self.path(old).unlink(missing_ok=True)

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
        shard.restore(read_tensors(path))

    def drop_after(self, sequence: int) -> None:
        """Remove those of a history that the run has left."""
        for each in self.all():
            if each > sequence:
                self.path(each).unlink(missing_ok=True)
