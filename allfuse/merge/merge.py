"""Fuses models on disk into a new one, which appears when it is whole."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from allfuse.base.errors import MergeError, UserError
from allfuse.base.units import format_bytes
from allfuse.merge.estimate import estimate_seconds
from allfuse.merge.flushing import Flusher
from allfuse.merge.folder import (
    AGAIN,
    Stopped,
    discard,
    finish,
    held,
    make_files,
    refuse_folder,
)
from allfuse.merge.journal import Journal
from allfuse.merge.origin import carry_job
from allfuse.merge.outline import BLOCK, Outline, Task, outline
from allfuse.merge.recipe import Recipe
from allfuse.merge.together import Together, share
from allfuse.store.durable import explain, partial_path

if TYPE_CHECKING:
    from allfuse.launcher import World
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
    """What was done: bytes read and written once, and seconds. notes: what whoever asked should
    know."""

    out: str
    tensors: int
    parameters: int
    read_bytes: int
    written_bytes: int
    seconds: float
    resumed_blocks: int
    notes: tuple[str, ...] = ()


def merge(
    recipe: Recipe,
    out: Path,
    *,
    memory_bytes: int = MEMORY_BYTES,
    threads: int | None = None,
    overwrite: bool = False,
    tell: Tell = lambda name, **data: None,
    world: World | None = None,
) -> Merged:
    """Fuse models on disk.

    What is not whole lies beside `out` under a name that begins with ".partial-"; the same call
    goes on with it. Where what was given is refused, it is removed (in a world by whoever started
    the ranks, when all have ended: `discard`). The result does not depend on `memory_bytes`,
    `threads` and `world`.

    Args:
        memory_bytes: of this process, at most; threads: None: as many as there are cores for it.
        world: ranks that share the work, all of which call this, and see the same files.

    Raises:
        MergeError: models that cannot be fused or read, no room, or `out` is there already.
        Stopped: files that cannot be read or written now. PeerLost: another rank is silent.
    """
    begin = time.monotonic()
    plan, together = outline(recipe), Together(world, tell)
    local = 1 if world is None else world.local_size
    if together.rank == 0:
        refuse_place(plan, out, overwrite)
    count = choose_threads(plan, memory_bytes, threads or threads_here(local))
    partial = partial_path(out)
    try:
        if together.rank > 0:
            together.begin()
            resumed = _fuse(plan, partial, count, together, tell)
        else:
            with held(partial) as folder:
                resumed = _fuse(plan, folder, count, together, tell)
                carry_job(recipe.models, folder, _about(recipe))
                plan.write_config(folder)
                finish(plan.layout, plan.side_files(), folder, out)
    except OSError as error:
        raise Stopped(f"{explain(error, out)}; {AGAIN}") from error
    except UserError as error:
        if isinstance(error.__cause__, OSError):
            raise Stopped(f"{error}; {AGAIN}") from error
        if together.size == 1:
            discard(partial)
        raise
    return Merged(
        out=str(out),
        tensors=len(plan.tasks),
        parameters=sum(task.target.count for task in plan.tasks),
        read_bytes=plan.read_bytes,
        written_bytes=plan.written_bytes,
        seconds=time.monotonic() - begin,
        resumed_blocks=resumed,
        notes=plan.notes,
    )


def _about(recipe: Recipe) -> dict[str, Any]:
    """What a result is made of, in plain data."""
    return {
        "rule": str(recipe.rule),
        "models": [str(model) for model in recipe.models],
        "weights": list(recipe.weights),
        "base": None if recipe.base is None else str(recipe.base),
        "seed": recipe.seed,
    }


def refuse_place(plan: Outline, out: Path, overwrite: bool) -> None:
    """Refuse to write where there is something, or no room.

    Raises:
        MergeError: says what is there, or how much room is missing.
    """
    models = [*plan.sources, *([] if plan.base is None else [plan.base])]
    refuse_folder(
        [place for model in models for place in model.places], plan.written_bytes, out, overwrite
    )


def threads_here(ranks: int) -> int:
    """The share of this machine's cores that one of so many ranks on it has."""
    from allfuse.launcher.local import count_cores

    return max(1, count_cores() // ranks)


def choose_threads(plan: Outline, memory_bytes: int, threads: int) -> int:
    """So many threads, or as many as there is room for.

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
    return int(min(room, threads))


def _fuse(plan: Outline, folder: Path, threads: int, together: Together, tell: Tell) -> int:
    """Write this rank's part of all files; how many blocks were there from before."""
    journal = Journal(folder, fingerprint(plan), together.rank)
    try:
        if together.rank == 0:
            make_files(plan.layout, folder, fresh=not journal.goes_on)
            _tell_begin(plan, journal, threads, tell)
            together.begin()
        resumed = len(journal.done)
        tasks = share(plan.tasks, together.size)[together.rank]
        _fuse_tasks(plan, tasks, folder, journal, threads, together.told)
        together.end()
    finally:
        journal.close()
    return resumed


def _tell_begin(plan: Outline, journal: Journal, threads: int, tell: Tell) -> None:
    done = sum(
        task.target.bytes // task.target.count * count
        for task in plan.tasks
        for number, (_, count) in enumerate(task.blocks())
        if (task.number, number) in journal.done
    )
    total = sum(task.target.bytes for task in plan.tasks)
    tell("merging", bytes=done, total=total, resumed=len(journal.done), threads=threads)


def _fuse_tasks(
    plan: Outline,
    tasks: Sequence[Task],
    folder: Path,
    journal: Journal,
    threads: int,
    told: Callable[[int], None],
) -> None:
    """Bring tensors to the disk, as they should be."""
    from allfuse.merge.blocks import Files
    from allfuse.merge.engine import Engine

    sources, target = Files(), Files(folder)
    try:
        with Flusher(folder / name for name in plan.layout.sizes) as flusher:

            def wrote(nbytes: int) -> None:
                told(nbytes)
                flusher.wrote(nbytes)

            while True:
                Engine(plan.recipe, tasks, sources, target, journal, wrote).run(threads)
                if not _damaged(tasks, target, journal, threads, told):
                    return
    finally:
        sources.close()
        target.close()


def _damaged(
    tasks: Sequence[Task],
    target: Files,
    journal: Journal,
    threads: int,
    told: Callable[[int], None],
) -> bool:
    """Bring all that was written to the disk, and meanwhile compare it with what it should be; what
    is not so is forgotten."""
    from allfuse.merge.checking import check_blocks

    with ThreadPoolExecutor(1, "allfuse-sync") as pool:
        synced = pool.submit(target.sync)
        wrong = check_blocks(tasks, target, journal.done, threads, told)
        synced.result()
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
    for file in sorted({f for task in plan.tasks for entry in task.sources for f in entry.files}):
        about = file.stat()
        state.update(f"{file} {about.st_size} {about.st_mtime_ns}".encode())
    return state.hexdigest()


def describe(plan: Outline, threads: int, workers: int = 1) -> dict[str, Any]:
    """What would be done, for --dry-run. `seconds` are an estimate."""
    return {
        "rule": str(plan.recipe.rule),
        "models": len(plan.sources),
        "tensors": len(plan.tasks),
        "parameters": sum(task.target.count for task in plan.tasks),
        "files": len(plan.layout.sizes),
        "read_bytes": plan.read_bytes,
        "written_bytes": plan.written_bytes,
        "threads": threads,
        "workers": workers,
        "seconds": estimate_seconds(plan, threads * workers),
        "copied": list(plan.copied),
        "padded": list(plan.padded),
        "notes": list(plan.notes),
    }
