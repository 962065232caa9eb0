"""Fuses models on disk into a new one, which appears when it is whole."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from allfuse.base.errors import MergeError
from allfuse.base.units import format_bytes
from allfuse.merge.folder import finish, held, make_files, refuse_folder
from allfuse.merge.journal import Journal
from allfuse.merge.outline import BLOCK, Outline, outline
from allfuse.merge.recipe import Recipe
from allfuse.store.durable import explain, partial_path

if TYPE_CHECKING:
    from allfuse.merge.blocks import Files

BARE_BYTES = 300_000_000
"""What a process takes before it reads the first block: Python and torch, 287 MB when measured."""
EACH_BYTES = 70
"""What a thread takes for each number of a block and model: 65 when measured for della, which takes
most."""
MEMORY_BYTES = 1_000_000_000

Tell = Callable[..., None]


@dataclass(frozen=True, kw_only=True)
class Merged:
    """What was done: bytes read and written once, and seconds."""

    out: str
    tensors: int
    parameters: int
    read_bytes: int
    written_bytes: int
    seconds: float
    resumed_blocks: int


def merge(
    recipe: Recipe,
    out: Path,
    *,
    memory_bytes: int = MEMORY_BYTES,
    workers: int | None = None,
    overwrite: bool = False,
    tell: Tell = lambda name, **data: None,
) -> Merged:
    """Fuse models on disk.

    What is not whole lies beside `out` under a name that begins with ".partial-"; the same call
    goes on with it. The result does not depend on `memory_bytes` and `workers`.

    Args:
        memory_bytes: of this process, at most; workers: threads; None: as many as there are cores.

    Raises:
        MergeError: models that cannot be fused or read, no room, or `out` is there already.
    """
    begin = time.monotonic()
    plan = outline(recipe)
    refuse_place(plan, out, overwrite)
    count = choose_workers(plan, memory_bytes, workers)
    partial = partial_path(out)
    try:
        with held(partial) as folder:
            resumed = _fuse(plan, folder, count, tell)
            finish(plan.layout, plan.first.side_files(), folder, out)
    except OSError as error:
        raise MergeError(explain(error, out)) from error
    return Merged(
        out=str(out),
        tensors=len(plan.tasks),
        parameters=sum(task.target.count for task in plan.tasks),
        read_bytes=plan.read_bytes,
        written_bytes=plan.written_bytes,
        seconds=time.monotonic() - begin,
        resumed_blocks=resumed,
    )


def refuse_place(plan: Outline, out: Path, overwrite: bool) -> None:
    """Refuse to write where there is something, or no room.

    Raises:
        MergeError: says what is there, or how much room is missing.
    """
    models = [*plan.sources, *([] if plan.base is None else [plan.base])]
    refuse_folder([source.path for source in models], plan.written_bytes, out, overwrite)


def choose_workers(plan: Outline, memory_bytes: int, workers: int | None) -> int:
    """How many threads there is room for.

    Raises:
        MergeError: not for one; says what it takes.
    """
    row = max((task.block for task in plan.tasks), default=BLOCK)
    each = EACH_BYTES * len(plan.sources) * row
    room = (memory_bytes - BARE_BYTES) // each
    if room < 1:
        raise MergeError(
            f"--memory {format_bytes(memory_bytes)} is not enough: the process takes "
            f"{format_bytes(BARE_BYTES)}, and a block of each model {format_bytes(each)}; next: "
            f"--memory {format_bytes(BARE_BYTES + each)} or more"
        )
    return int(min(room, workers or os.cpu_count() or 1))


def _fuse(plan: Outline, folder: Path, workers: int, tell: Tell) -> int:
    """Write all files of the result; how many blocks were there from before."""
    from allfuse.merge.blocks import Files
    from allfuse.merge.engine import Engine

    journal = Journal(folder, fingerprint(plan))
    sources, target = Files(), Files(folder)
    try:
        make_files(plan.layout, folder, fresh=not journal.goes_on)
        resumed = len(journal.done)
        tell("merging", bytes=0, total=plan.written_bytes, resumed=resumed, workers=workers)
        while True:
            Engine(plan, sources, target, journal, lambda n: tell("merged", bytes=n)).run(workers)
            if not _damaged(plan, target, journal):
                break
        target.sync()
    finally:
        journal.close()
        sources.close()
        target.close()
    return resumed


def _damaged(plan: Outline, target: Files, journal: Journal) -> bool:
    """Compare all that was written with what should be; what is not so is forgotten."""
    from allfuse.merge.checking import check_blocks

    wrong = check_blocks(plan, target, journal.done)
    for each in wrong:
        del journal.done[each]
    return bool(wrong)


def fingerprint(plan: Outline) -> str:
    """What a result follows from, in one line: another one begins anew."""
    recipe = plan.recipe
    state = hashlib.blake2b(digest_size=16)
    state.update(f"{recipe.dtype} {recipe.seed} {recipe.allow_nan} {BLOCK}".encode())
    for task in plan.tasks:
        state.update(f"{task.rules!r} {task.weights}".encode())
        for entry in [task.target, *task.sources]:
            state.update(f"{entry}".encode())
    for file in sorted({entry.file for task in plan.tasks for entry in task.sources}):
        about = file.stat()
        state.update(f"{file} {about.st_size} {about.st_mtime_ns}".encode())
    return state.hexdigest()


def describe(plan: Outline) -> dict[str, Any]:
    """What would be done, for --dry-run."""
    return {
        "rule": str(plan.recipe.rule),
        "models": len(plan.sources),
        "tensors": len(plan.tasks),
        "parameters": sum(task.target.count for task in plan.tasks),
        "files": len(plan.layout.sizes),
        "read_bytes": plan.read_bytes,
        "written_bytes": plan.written_bytes,
        "copied": list(plan.copied),
    }
