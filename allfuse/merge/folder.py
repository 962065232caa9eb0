"""The folder of a result: its place, what is not whole of it, and when it gets its name."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from allfuse.base.errors import MergeError
from allfuse.base.units import format_bytes
from allfuse.merge.journal import is_journal
from allfuse.merge.layout import Layout
from allfuse.store.durable import partial_path, sync_folder
from allfuse.store.model_files import INDEX

LOCK = "lock"


def refuse_folder(models: Iterable[Path], needed_bytes: int, out: Path, overwrite: bool) -> None:
    """Refuse to write where there is something, or no room, or inside one of the models.

    Raises:
        MergeError: says what is there, or how much room is missing.
    """
    place = out.resolve()
    for model in models:
        own = model.resolve()
        if place == own or own in place.parents or place in own.parents:
            raise MergeError(f"{out} lies inside the model {model}, or holds it; next: another")
    if out.exists() and not overwrite:
        raise MergeError(f"{out} is there already; next: another --out, or --overwrite")
    if not out.parent.is_dir():
        raise MergeError(f"{out.parent}, where {out.name} is to be, is no folder")
    partial = partial_path(out)
    has = sum(file.stat().st_blocks * 512 for file in partial.glob("*")) if partial.is_dir() else 0
    free = shutil.disk_usage(out.parent).free
    if needed_bytes > free + has:
        raise MergeError(
            f"{out} needs {format_bytes(needed_bytes)}, and {format_bytes(free + has)} are "
            "free there; next: free some, or another --out"
        )


@contextmanager
def held(folder: Path) -> Iterator[Path]:
    """The folder of what is not whole, which nobody else may work in.

    Raises:
        MergeError: somebody does.
    """
    folder.mkdir(exist_ok=True)
    lock = os.open(folder / LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise MergeError(f"another merge is at work in {folder}; next: wait for it") from error
        yield folder
    finally:
        os.close(lock)


def make_files(layout: Layout, folder: Path, fresh: bool) -> None:
    """Files of their final size, with what they begin with; with `fresh` nothing else is left."""
    if fresh:
        for file in folder.iterdir():
            if file.name != LOCK and not is_journal(file.name):
                file.unlink()
    for name, head in layout.heads.items():
        with open(folder / name, "r+b" if (folder / name).exists() else "w+b") as made:
            made.write(head)
            os.posix_fallocate(made.fileno(), 0, layout.sizes[name])
            os.ftruncate(made.fileno(), layout.sizes[name])


def finish(layout: Layout, side_files: Iterable[Path], folder: Path, out: Path) -> None:
    """The other files, and then the name."""
    for file in side_files:
        shutil.copyfile(file, folder / file.name)
    if layout.index is not None:
        (folder / INDEX).write_bytes(layout.index)
    for file in folder.iterdir():
        if file.name == LOCK or is_journal(file.name):
            file.unlink()
    put_in_place(folder, out)


def put_in_place(folder: Path, out: Path) -> None:
    """Give a whole folder its name, instead of what has it."""
    sync_folder(folder)
    old = out.with_name(f".partial-old-{out.name}")
    if out.exists():
        _remove(old)  # of one that was killed here
        os.replace(out, old)
    os.replace(folder, out)
    sync_folder(out.parent)
    _remove(old)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
