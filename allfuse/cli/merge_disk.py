"""allfuse merge by a rule of weights: models go from disk to disk."""

from __future__ import annotations

import functools
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from allfuse.base.errors import MergeError, PlanError, RunError, WorkerFailed
from allfuse.base.units import format_bytes, format_seconds
from allfuse.cli.merge_result import Result
from allfuse.cli.options import choose_plan, if_interrupted, is_first, run_under

if TYPE_CHECKING:
    from allfuse.merge.recipe import Recipe
    from allfuse.merge.recipe_file import Said
    from allfuse.plan import Plan

GOES_ON = "the same command goes on where it was"


def merge_on_disk(
    said: Said,
    result: Result,
    *,
    plan: str | None,
    workers: int | None,
    threads: int | None,
    timeout: float,
    memory_bytes: int,
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
        refuse_place(made, result.out, result.overwrite)
        each = choose_threads(made, memory_bytes, threads or threads_here(chosen.workers))
        if result.dry_run:
            told = describe(made, each, chosen.workers)
            told |= {"notes": [*said.notes, *told["notes"]]}
            result.tell(told | {"models": _names(recipe)}, _wording(told, result.out))
    if result.dry_run:
        return
    work = functools.partial(merge_here, recipe, result, memory_bytes, threads)
    try:
        with if_interrupted(GOES_ON):
            done = run_under(chosen, work, threads=threads, timeout_s=timeout)
    except Stopped:
        raise
    except (MergeError, RunError):
        discard(partial_path(result.out))
        raise
    except WorkerFailed as error:
        text = f"{error}\nnext: {GOES_ON}"
        raise WorkerFailed(text, error.rank, error.trace, error.exit_code) from error
    if is_first():
        speed = (done["read_bytes"] + done["written_bytes"]) / max(done["seconds"], 1e-9)
        done |= {"models": _names(recipe), "rule": str(recipe.rule)}
        done["notes"] = [*said.notes, *done["notes"]]
        result.tell(
            done,
            f"{done['out']}: {done['parameters']:,} parameters in {done['tensors']:,} tensors by "
            f"{recipe.rule}, {done['seconds']:.2f} s, {format_bytes(speed)}/s read and written",
        )


def refuse_other_plans(plan: Plan) -> None:
    """Tensors are spread over workers, and that is all. Raises PlanError."""
    if str(plan) != f"data({plan.workers})":
        raise PlanError(
            f"merge under {plan}",
            "tensors are spread over workers that share nothing else",
            f"data({plan.workers})",
        )


def merge_here(
    recipe: Recipe, result: Result, memory_bytes: int, threads: int | None
) -> dict[str, Any]:
    """What every rank does; rank 0 shows how far all are."""
    from allfuse.launcher import current_world
    from allfuse.merge.merge import merge
    from allfuse.observe.merging import MergeProgress

    with result.watched(MergeProgress) as tell:
        done = merge(
            recipe,
            result.out,
            memory_bytes=memory_bytes,
            threads=threads,
            overwrite=result.overwrite,
            tell=tell,
            world=current_world(),
        )
    return asdict(done)


def _names(recipe: Recipe) -> list[str]:
    return [str(model) for model in recipe.models]


def _wording(told: dict[str, Any], out: Path) -> str:
    """What would be done, in words."""
    workers = f" in each of {told['workers']} workers" if told["workers"] > 1 else ""
    lines = [
        f"{out}: would be {told['parameters']:,} parameters in {told['tensors']:,} tensors by "
        f"{told['rule']} of {told['models']} models",
        f"  read {format_bytes(told['read_bytes'])}, write {format_bytes(told['written_bytes'])} "
        f"in {told['files']} file{'s' if told['files'] > 1 else ''}, {told['threads']} threads"
        f"{workers}",
        f"  about {format_seconds(told['seconds'])}: an estimate from the speed of this machine's "
        "memory; from a slow disk longer",
    ]
    if told["copied"]:
        copied = ", ".join(told["copied"][:10])
        lines.append(f"  as in the first model, being whole numbers: {copied}")
    if told["padded"]:
        lines.append(f"  with rows that some models lack: {', '.join(told['padded'][:10])}")
    return "\n".join(lines)
