"""allfuse merge by a rule of weights: models go from disk to disk."""

from __future__ import annotations

import functools
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from allfuse.base.errors import MergeError, PlanError, RunError, WorkerFailed
from allfuse.base.units import format_bytes, format_seconds
from allfuse.cli.merge_jobs import print_notes
from allfuse.cli.options import choose_plan, if_interrupted, is_first, print_json, run_under

if TYPE_CHECKING:
    from allfuse.merge.recipe import Recipe
    from allfuse.merge.recipe_file import Said
    from allfuse.plan import Plan

GOES_ON = "the same command goes on where it was"


def merge_on_disk(
    said: Said,
    out: Path,
    *,
    plan: str | None,
    workers: int | None,
    threads: int | None,
    timeout: float,
    memory_bytes: int,
    overwrite: bool,
    dry_run: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Check everything before any process starts; then fuse models, or say what would be done, and
    tell of it."""
    from allfuse.merge.folder import Stopped, discard
    from allfuse.merge.merge import choose_threads, describe, refuse_place, threads_here
    from allfuse.merge.outline import outline
    from allfuse.store.durable import partial_path

    recipe, chosen = said.recipe, choose_plan(plan, workers)
    refuse_other_plans(chosen)
    if is_first():
        made = outline(recipe)
        refuse_place(made, out, overwrite)
        each = choose_threads(made, memory_bytes, threads or threads_here(chosen.workers))
        if dry_run:
            told = describe(made, each, chosen.workers)
            _tell_plan(told | {"notes": [*said.notes, *told["notes"]]}, recipe, out, as_json)
    if dry_run:
        return
    options = {"memory_bytes": memory_bytes, "threads": threads, "overwrite": overwrite}
    work = functools.partial(merge_here, recipe, out, options, quiet, as_json)
    try:
        with if_interrupted(GOES_ON):
            done = run_under(chosen, work, threads=threads, timeout_s=timeout)
    except Stopped:
        raise
    except (MergeError, RunError):
        discard(partial_path(out))
        raise
    except WorkerFailed as error:
        text = f"{error}\nnext: {GOES_ON}"
        raise WorkerFailed(text, error.rank, error.trace, error.exit_code) from error
    done["notes"] = [*said.notes, *done["notes"]]
    if as_json:
        print_json({**_begin_json(recipe), "rule": str(recipe.rule), **done})
    elif is_first():
        speed = (done["read_bytes"] + done["written_bytes"]) / max(done["seconds"], 1e-9)
        print(
            f"{done['out']}: {done['parameters']:,} parameters in {done['tensors']:,} tensors by "
            f"{recipe.rule}, {done['seconds']:.2f} s, {format_bytes(speed)}/s read and written"
        )
        print_notes(done["notes"])


def refuse_other_plans(plan: Plan) -> None:
    """Tensors are spread over workers, and that is all. Raises PlanError."""
    if str(plan) != f"data({plan.workers})":
        raise PlanError(
            f"merge under {plan}",
            "tensors are spread over workers that share nothing else",
            f"data({plan.workers})",
        )


def merge_here(
    recipe: Recipe, out: Path, options: dict[str, Any], quiet: bool, to_stderr: bool
) -> dict[str, Any]:
    """What every rank does; rank 0 shows how far all are."""
    from allfuse.base.events import Bus
    from allfuse.launcher import current_world
    from allfuse.merge.merge import merge

    world = current_world()
    if quiet or (world is not None and world.rank > 0):
        return asdict(merge(recipe, out, world=world, **options))
    from allfuse.observe.merging import MergeProgress

    bus = Bus()
    with MergeProgress(sys.stderr if to_stderr else sys.stdout) as progress:
        bus.subscribe(progress)
        return asdict(merge(recipe, out, world=world, tell=bus.emit, **options))


def _begin_json(recipe: Recipe) -> dict[str, Any]:
    return {"ok": True, "command": "merge", "models": [str(model) for model in recipe.models]}


def _tell_plan(told: dict[str, Any], recipe: Recipe, out: Path, as_json: bool) -> None:
    if as_json:
        print_json(told | _begin_json(recipe))
        return
    workers = f" in each of {told['workers']} workers" if told["workers"] > 1 else ""
    print(
        f"{out}: would be {told['parameters']:,} parameters in {told['tensors']:,} tensors by "
        f"{told['rule']} of {told['models']} models\n"
        f"  read {format_bytes(told['read_bytes'])}, write {format_bytes(told['written_bytes'])} "
        f"in {told['files']} file{'s' if told['files'] > 1 else ''}, {told['threads']} threads"
        f"{workers}\n"
        f"  about {format_seconds(told['seconds'])}: an estimate from the speed of this machine's "
        "memory; from a slow disk longer"
    )
    if told["copied"]:
        print(f"  as in the first model, being whole numbers: {', '.join(told['copied'][:10])}")
    if told["padded"]:
        print(f"  with rows that some models lack: {', '.join(told['padded'][:10])}")
    print_notes(told["notes"])
