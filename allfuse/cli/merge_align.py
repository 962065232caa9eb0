"""allfuse merge --align: models from different seeds get one order of their units first."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from allfuse.base.errors import UserError
from allfuse.base.units import format_bytes
from allfuse.cli.merge_jobs import ANEW, read_jobs, refuse_early, refuse_few
from allfuse.cli.merge_result import Result
from allfuse.cli.options import if_interrupted, parse_settings, set_threads

if TYPE_CHECKING:
    from allfuse.merge.recipe_file import Said

SHOWN = 10

AlignOption = Annotated[
    str | None,
    typer.Option(
        metavar="HOW",
        help="Bring the hidden units of models from different seeds into one order first, by their "
        "weights or by their activations on the job's data.",
    ),
]


def merge_by_alignment(
    said: Said,
    how: str,
    result: Result,
    *,
    jobs: list[Path] | None,
    settings: list[str] | None,
    examples: int,
    calibrate: bool,
    threads: int | None,
    memory_bytes: int,
) -> None:
    """Align and fuse models, or say what would be done, and tell of it."""
    recipe, out, overwrite = said.recipe, result.out, result.overwrite
    models = [str(model) for model in recipe.models]
    parse_settings(settings)
    refuse_early([*recipe.models, *([recipe.base] if recipe.base else [])], out, jobs, overwrite)
    refuse_few("--examples", examples, least=2)
    from allfuse.merge.align.merging import Alignment, check_aligned, merge_aligned

    set_threads(threads, 1)
    alignment = Alignment(
        how=how,
        job=read_jobs(recipe.models, jobs, settings)[0],
        examples=examples,
        calibrate=calibrate,
    )
    if result.dry_run:
        told = check_aligned(recipe, alignment, out, memory_bytes=memory_bytes, overwrite=overwrite)
        told["notes"] = list(said.notes)
        result.tell(told | {"models": models}, _wording(told, out))
        return
    from allfuse.observe.merging import MergeProgress

    with if_interrupted(ANEW), result.watched(MergeProgress) as tell:
        done = merge_aligned(
            recipe,
            alignment,
            out,
            memory_bytes=memory_bytes,
            threads=threads,
            overwrite=overwrite,
            tell=tell,
        )
    done |= {"models": models, "rule": str(recipe.rule), "notes": [*said.notes, *done["notes"]]}
    result.tell(
        done,
        f"{out}: {done['parameters']:,} parameters in {done['tensors']:,} tensors by "
        f"{recipe.rule} of {len(models)} models, aligned by {how}, {done['seconds']:.2f} s",
    )


def refuse_beside_alignment(**given: object) -> None:
    """Refuse what does not go with --align. Raises UserError."""
    for name, value in given.items():
        if value:
            raise UserError(
                f"--align with --{name.replace('_', '-')} {value}: models are aligned in this "
                "process, for rules of weights; next: write each aligned model first, by --rule "
                "linear --weights 0,1, and name those"
            )


def _wording(told: dict[str, Any], out: Path) -> str:
    """What would be done, in words."""
    groups = [f"{name} ({size:,})" for name, size in told["groups"].items()]
    more = f" and {len(groups) - SHOWN} more" if len(groups) > SHOWN else ""
    return (
        f"{out}: would be {told['parameters']:,} parameters in {told['tensors']:,} tensors by "
        f"{told['rule']} of {told['models']} models, aligned by {told['align']}\n"
        f"  write {format_bytes(told['written_bytes'])}\n"
        f"  {told['units']:,} units in {len(groups)} groups may get another place: "
        f"{', '.join(groups[:SHOWN])}{more}"
    )
