"""allfuse merge --align: models from different seeds get one order of their units first."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from allfuse.base.errors import UserError
from allfuse.base.units import format_bytes
from allfuse.cli.merge_jobs import ANEW, print_notes, read_jobs, refuse_early, refuse_few
from allfuse.cli.options import if_interrupted, parse_settings, print_json, set_threads

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
    out: Path,
    *,
    jobs: list[Path] | None,
    settings: list[str] | None,
    examples: int,
    calibrate: bool,
    threads: int | None,
    memory_bytes: int,
    overwrite: bool,
    dry_run: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Align and fuse models, or say what would be done, and tell of it."""
    recipe = said.recipe
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
    if dry_run:
        told = check_aligned(recipe, alignment, out, memory_bytes=memory_bytes, overwrite=overwrite)
        _tell_plan(told | {"notes": list(said.notes)}, recipe.models, out, as_json)
        return
    options: dict[str, Any] = {
        "memory_bytes": memory_bytes,
        "threads": threads,
        "overwrite": overwrite,
    }
    with if_interrupted(ANEW):
        if quiet:
            done = merge_aligned(recipe, alignment, out, **options)
        else:
            from allfuse.base.events import Bus
            from allfuse.observe.merging import MergeProgress

            bus = Bus()
            with MergeProgress(sys.stderr if as_json else sys.stdout) as progress:
                bus.subscribe(progress)
                done = merge_aligned(recipe, alignment, out, tell=bus.emit, **options)
    notes = [*said.notes, *done["notes"]]
    if as_json:
        models = [str(model) for model in recipe.models]
        begin = {"ok": True, "command": "merge", "models": models, "rule": str(recipe.rule)}
        print_json({**begin, **done, "notes": notes})
        return
    print(
        f"{out}: {done['parameters']:,} parameters in {done['tensors']:,} tensors by "
        f"{recipe.rule} of {len(recipe.models)} models, aligned by {how}, {done['seconds']:.2f} s"
    )
    print_notes(notes)


def refuse_beside_alignment(**given: object) -> None:
    """Refuse what does not go with --align. Raises UserError."""
    for name, value in given.items():
        if value:
            raise UserError(
                f"--align with --{name.replace('_', '-')} {value}: models are aligned in this "
                "process, for rules of weights; next: write each aligned model first, by --rule "
                "linear --weights 0,1, and name those"
            )


def _tell_plan(told: dict[str, Any], models: Sequence[Path], out: Path, as_json: bool) -> None:
    if as_json:
        print_json({"ok": True, "command": "merge", **told, "models": [str(m) for m in models]})
        return
    groups = [f"{name} ({size:,})" for name, size in told["groups"].items()]
    more = f" and {len(groups) - SHOWN} more" if len(groups) > SHOWN else ""
    print(
        f"{out}: would be {told['parameters']:,} parameters in {told['tensors']:,} tensors by "
        f"{told['rule']} of {told['models']} models, aligned by {told['align']}\n"
        f"  write {format_bytes(told['written_bytes'])}\n"
        f"  {told['units']:,} units in {len(groups)} groups may get another place: "
        f"{', '.join(groups[:SHOWN])}{more}"
    )
    print_notes(told["notes"])
