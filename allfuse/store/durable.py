"""Files that are whole or absent after a crash, and what to say when they cannot be written."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

PARTIAL = ".partial-"
"""How names of things begin that are not finished; they may be removed at the next open."""


def sync_folder(folder: Path) -> None:
    """Return when the names in a folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def partial_path(path: Path) -> Path:
    """Where a file is written before it takes the place of `path`."""
    return path.with_name(f"{PARTIAL}{path.name}")


def replace_file(partial: Path, path: Path) -> None:
    """Put a finished and synced file in the place of `path`, in one step that survives a crash."""
    os.replace(partial, path)
    sync_folder(path.parent)


def replace_bytes(path: Path, content: bytes) -> None:
    """Write a small file so that a crash leaves the old content or the new one.

    Raises:
        OSError: it cannot be written; the old content stays and nothing new is left behind.
    """
    partial = partial_path(path)
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        replace_file(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def explain(error: OSError, path: Path) -> str:
    """What went wrong with a file and what to do, in one line."""
    said = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full ({said}) at {path}; free some space or choose another run folder"
    return f"cannot read or write {path}: {said}; check that its folder exists and may be written"


def parse_json(content: bytes | str) -> Any:
    """The plain data in a JSON text that may come from a stranger.

    Raises:
        ValueError: it is not JSON, or it is nested too deeply to be honest.
    """
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError("nested too deeply") from None
