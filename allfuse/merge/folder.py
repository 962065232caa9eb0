"""The folder of a result: its place, what is not whole of it, and when it gets its name."""

from __future__ import annotations

import contextlib
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
from allfuse.store.durable import explain, partial_path, sync_folder
from allfuse.store.model_files import INDEX, MARKS, find_ingredients, weight_files

LOCK = "lock"
AGAIN = "the same command goes on then"
OF_RUNS = ("checkpoints", "snapshots", "tensorboard", "__pycache__")
"""Folders that the folder of a run has of its own."""


class Stopped(MergeError):
    """A result is not whole, and the cause may go away: the same call goes on then."""


def refuse_folder(models: Iterable[Path], needed_bytes: int, out: Path, overwrite: bool) -> None:
    """Refuse to write where there is something, or no room, or inside one of the models. Folders
    on the way to `out` need not be there yet. With `overwrite` a model or a run may be there.

    Raises:
        MergeError: says what is there, or how much room is missing.
    """
    try:
        _refuse_taken(models, out, overwrite)
        _refuse_full(needed_bytes, out)
    except OSError as error:
        raise MergeError(explain(error, out)) from error


def _refuse_taken(models: Iterable[Path], out: Path, overwrite: bool) -> None:
    place = out.resolve()
    for model in models:
        own = model.resolve()
        if place == own or own in place.parents or place in own.parents:
            raise MergeError(f"{out} lies inside the model {model}, or holds it; next: another")
    if out.exists() and not overwrite:
        raise MergeError(f"{out} is there already; next: another --out, or --overwrite")
    if out.exists():
        _refuse_to_replace(out)


def _refuse_to_replace(out: Path) -> None:
    """Only one model or run, or an empty folder, is replaced: who mistypes a name loses no more."""
    if not out.is_dir():
        raise MergeError(f"{out} is a file, and the result is a folder; next: another --out")
    names = sorted(file.name for file in out.iterdir())
    inner = [name for name in names if (out / name).is_dir() and name not in OF_RUNS]
    if inner:
        raise MergeError(
            f"{out} holds other folders ({_some(inner)}), which --overwrite would remove; next: "
            "another --out, or move them"
        )
    is_model = any((out / mark).is_file() for mark in MARKS)
    weights = [file for file in weight_files(out) if file.suffix == ".safetensors"]
    if weights and not is_model:
        is_model = find_ingredients(out) == [out]
    if names and not is_model:
        what = f"{len(weights)} models" if weights else "no model and no run"
        raise MergeError(
            f"{out} is the folder of {what} (it holds {_some(names)}); --overwrite replaces one "
            "model or run alone; next: another --out"
        )


def _some(names: list[str]) -> str:
    return f"{names[0]}, ..." if len(names) > 1 else names[0]


def _refuse_full(needed_bytes: int, out: Path) -> None:
    """Refuse a place that cannot be written to, or has no room."""
    place = out.absolute().parent
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        raise MergeError(f"{place}, where {out.name} is to be, is a file; next: another --out")
    if not os.access(place, os.W_OK | os.X_OK):
        read_only = os.statvfs(place).f_flag & os.ST_RDONLY
        why = "is on a disk that can only be read" if read_only else "may not be written to by you"
        raise MergeError(f"{out}: {place} {why}; next: another --out")
    partial = partial_path(out)
    has = sum(file.stat().st_blocks * 512 for file in partial.glob("*")) if partial.is_dir() else 0
    free = shutil.disk_usage(place).free
    if needed_bytes > free + has:
        raise MergeError(
            f"{out} needs {format_bytes(needed_bytes)}, and {format_bytes(free + has)} are "
            "free there; next: free some, or another --out"
        )


@contextmanager
def held(folder: Path) -> Iterator[Path]:
    """The folder of what is not whole, which nobody else may work in; with those on the way to it.

    Raises:
        MergeError: somebody does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder / LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise MergeError(f"another merge is at work in {folder}; next: wait for it") from error
        yield folder
    finally:
        os.close(lock)


def discard(folder: Path) -> None:
    """Remove what is not whole, unless somebody works there."""
    if folder.is_dir():
        with contextlib.suppress(MergeError, OSError), held(folder):
            shutil.rmtree(folder, ignore_errors=True)


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
