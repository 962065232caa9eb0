"""The folder that checkpoints stand in: which count, how one is added, which are dropped.

A checkpoint counts once its folder has its final name, which it gets in one step when everything
in it is on the disk. A step that is saved again gets a new folder (step-00000120-2), for no call
replaces a folder by another in one step; the older one is dropped afterwards.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
from contextlib import suppress
from pathlib import Path

from allfuse.base.errors import CheckpointError
from allfuse.store.durable import PARTIAL, sync_folder
from allfuse.store.manifest import Manifest, read_manifest, write_manifest

_NAME = re.compile(r"step-(\d{8,18})(?:-([1-9]\d{0,8}))?")


def committed(folder: Path) -> dict[int, Path]:
    """The checkpoints that count by step, newest first."""
    latest: dict[int, Path] = {}
    for (step, _), path in sorted(_all(folder).items()):
        latest[step] = path
    return dict(reversed(latest.items()))


def open_partial(folder: Path, step: int) -> Path:
    """A new folder to write a checkpoint in; what earlier saves left unfinished is removed.

    Raises:
        OSError: it cannot be made.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(f"{PARTIAL}*"):
        shutil.rmtree(left, ignore_errors=True)
    partial = folder / f"{PARTIAL}step-{step:08d}-{secrets.token_hex(4)}"
    partial.mkdir()
    return partial


def commit(folder: Path, partial: Path, manifest: Manifest) -> Path:
    """Make a folder whose tensors are on the disk count as a checkpoint; where it stands now.

    Raises:
        OSError: the manifest or the name cannot be written.
    """
    write_manifest(partial, manifest)
    sync_folder(partial)
    taken = [revision for step, revision in _all(folder) if step == manifest.step]
    name = f"step-{manifest.step:08d}"
    path = folder / (f"{name}-{max(taken) + 1}" if taken else name)
    os.rename(partial, path)
    sync_folder(folder)
    return path


def drop_surplus(folder: Path, newest: int, keep: int) -> None:
    """Remove all but the last `keep` checkpoints up to step `newest` and the best of them by score.

    Later steps belong to a history that the run has left: it went on from an earlier checkpoint.
    A folder loses its name first, so that no half of one ever counts.
    """
    latest = committed(folder)
    steps = [step for step in latest if step <= newest]
    kept = {*steps[:keep], best(folder, steps)}
    for (step, _), path in _all(folder).items():
        if step not in kept or path != latest[step]:
            doomed = folder / f"{PARTIAL}delete-{path.name}"
            with suppress(OSError):  # it is tried again after the next save
                os.rename(path, doomed)
            shutil.rmtree(doomed, ignore_errors=True)


def best(folder: Path, steps: list[int]) -> int | None:
    """The step with the highest score, the later one of equals; None when none has a score."""
    latest = committed(folder)
    found: tuple[float, int] | None = None
    for step in steps:
        with suppress(CheckpointError, KeyError):
            score = read_manifest(latest[step]).score
            if score is not None and (found is None or (score, step) > found):
                found = score, step
    return found[1] if found else None


def _all(folder: Path) -> dict[tuple[int, int], Path]:
    found = {}
    if folder.is_dir():
        for path in folder.iterdir():
            match = _NAME.fullmatch(path.name)
            if match and path.is_dir():
                found[int(match[1]), int(match[2] or 1)] = path
    return found
