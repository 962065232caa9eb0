"""An output file that appears under its name only when it is complete."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
from pathlib import Path

from allfuse.base.errors import DataError
from allfuse.store.durable import PARTIAL, replace_file


class OutputFile:
    """Written beside its place, put there by `commit`; `close` without that removes it.

    What a killed process left unfinished for the same name is removed when the next one starts; a
    lock, which the system drops with its process, tells it from what is still being written.

    Raises:
        DataError: it exists already, its folder does not, or it cannot be written (disk full).

    Example:
        with contextlib.closing(OutputFile(Path("labels.csv"))) as output:
            output.write(b"prediction\\n")
            output.commit()
    """

    def __init__(self, path: Path, *, overwrite: bool = False) -> None:
        self.path, self.overwrite = path, overwrite
        self._refuse_existing()
        if not path.parent.is_dir():
            raise DataError(
                f"--output {path}: there is no folder {path.parent}; allowed: a folder that "
                f"exists; next: mkdir -p {path.parent}"
            )
        self._remove_left()
        self.partial = path.with_name(f"{PARTIAL}{path.name}-{secrets.token_hex(4)}")
        self._finished = False
        try:
            self._file = open(self.partial, "xb")  # noqa: SIM115  closed by close()
        except OSError as error:
            raise self._explain(error) from None
        fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def write(self, text: bytes) -> None:
        try:
            self._file.write(text)
        except OSError as error:
            raise self._explain(error) from None

    def commit(self) -> None:
        """Sync what was written and give it its name, in one step that survives a crash."""
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._refuse_existing()
            replace_file(self.partial, self.path)
        except OSError as error:
            raise self._explain(error) from None
        self._finished = True

    def close(self) -> None:
        with contextlib.suppress(OSError):  # what is still to be written is dropped
            self._file.close()
        if not self._finished:
            self.partial.unlink(missing_ok=True)

    def _refuse_existing(self) -> None:
        if self.path.is_dir():
            raise DataError(f"--output {self.path} is a folder; allowed: a file name")
        if self.path.exists() and not self.overwrite:
            raise DataError(
                f"--output {self.path} exists already; allowed: a new name; next: --overwrite to "
                "replace it"
            )

    def _remove_left(self) -> None:
        prefix = f"{PARTIAL}{self.path.name}-"
        for left in self.path.parent.iterdir():
            if not left.name.startswith(prefix):
                continue
            with contextlib.suppress(OSError), open(left, "rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                left.unlink()

    def _explain(self, error: OSError) -> DataError:
        said = error.strerror or str(error)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return DataError(
                f"the disk is full ({said}): {self.path} was not written; next: free some space, "
                "or choose another --output"
            )
        return DataError(
            f"--output {self.path}: cannot be written: {said}; allowed: a folder that may be "
            "written"
        )
