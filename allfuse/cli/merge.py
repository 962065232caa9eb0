"""allfuse merge: fuse the weights of models on disk."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from allfuse.base.errors import UserError
from allfuse.base.units import format_bytes
from allfuse.cli.merge_jobs import (
    EXAMPLES,
    ExamplesOption,
    JobsOption,
    find_learned,
    merge_by_data,
    read_jobs,
)
from allfuse.cli.merge_search import (
    EvaluationsOption,
    PerLayerOption,
    SearchOption,
    merge_by_search,
    refuse_without_search,
)
from allfuse.cli.options import (
    DebugOption,
    JsonOption,
    PlanOption,
    QuietOption,
    SetOption,
    TimeoutOption,
    WorkersOption,
    print_json,
)

SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*(k|M|G|T)?B?", re.IGNORECASE)
POWERS = {"": 0, "k": 3, "m": 6, "g": 9, "t": 12}


def merge(
    models: Annotated[
        list[Path],
        typer.Argument(help="Models: run folders, .safetensors files, folders with one or more."),
    ],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the result will be.")],
    rule: Annotated[
        str,
        typer.Option(
            metavar="RULE", help='How they become one, such as mean or "ties(density=0.2)".'
        ),
    ] = "mean",
    weights: Annotated[
        str | None,
        typer.Option(metavar="W,W,...", help="The weight of each model; by default all are 1."),
    ] = None,
    base: Annotated[
        Path | None,
        typer.Option(metavar="MODEL", help="What rules of changes count them from."),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(metavar="TYPE", help="F32, BF16 or F16; by default that of base or first."),
    ] = None,
    memory: Annotated[
        str, typer.Option(metavar="SIZE", help="What the process may take, such as 2GB.")
    ] = "1GB",
    threads: Annotated[
        int | None, typer.Option(metavar="N", help="Threads; by default the number of cores.")
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Of what a rule draws at random.")] = 0,
    job: JobsOption = None,
    settings: SetOption = None,
    examples: ExamplesOption = EXAMPLES,
    calibrate: Annotated[
        bool,
        typer.Option(
            "--calibrate/--no-calibrate", help="Estimate BatchNorm's statistics anew by the jobs."
        ),
    ] = True,
    search: SearchOption = None,
    evaluations: EvaluationsOption = None,
    per_layer: PerLayerOption = False,
    plan: PlanOption = None,
    workers: WorkersOption = None,
    timeout: TimeoutOption = 300.0,
    allow_nan: Annotated[
        bool, typer.Option("--allow-nan", help="Let through numbers that are not finite.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the folder if it exists.")
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Do all checks, tell what would be done, read no data."),
    ] = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Fuse the weights of models on disk, in little memory.

    allfuse merge runs/a runs/b runs/c --rule mean --out runs/soup
    """
    from allfuse.merge.merge import choose_workers, describe, refuse_place
    from allfuse.merge.merge import merge as fuse
    from allfuse.merge.outline import outline
    from allfuse.merge.recipe import Recipe

    if search is not None:
        if weights is not None:
            raise UserError(f"--weights {weights}: a search finds them; next: leave it out")
        merge_by_search(
            models,
            out,
            search=search,
            rule=read_rule(rule),
            jobs=job,
            settings=settings,
            plan=plan,
            workers=workers,
            evaluations=evaluations,
            per_layer=per_layer,
            threads=threads,
            timeout=timeout,
            overwrite=overwrite,
            dry_run=dry_run,
            quiet=quiet,
            as_json=as_json,
            base=base,
            dtype=dtype,
            seed=seed,
            allow_nan=allow_nan,
            calibrate=calibrate,
        )
        return
    refuse_without_search(
        evaluations=evaluations, per_layer=per_layer, plan=plan, workers=workers
    )
    method = find_learned(rule)
    if method is not None:
        merge_by_data(
            method,
            models,
            out,
            jobs=read_jobs(models, job, settings),
            weights=read_weights(weights, len(models)),
            base=base,
            dtype=dtype,
            examples=examples,
            calibrate=calibrate,
            seed=seed,
            dry_run=dry_run,
            overwrite=overwrite,
            quiet=quiet,
            as_json=as_json,
            threads=threads,
        )
        return
    recipe = Recipe(
        models=models,
        rule=read_rule(rule),
        weights=read_weights(weights, len(models)),
        base=base,
        dtype=dtype,
        seed=seed,
        allow_nan=allow_nan,
    )
    memory_bytes = read_size("--memory", memory)
    if threads is not None and threads < 1:
        raise UserError(f"--threads {threads}: allowed: 1 or more")
    if dry_run:
        plan = outline(recipe)
        refuse_place(plan, out, overwrite)
        told = describe(plan) | {"threads": choose_workers(plan, memory_bytes, threads)}
        if as_json:
            print_json({"ok": True, "command": "merge", **told})
        else:
            _tell_plan(told, out)
        return
    done = _watched(
        lambda tell: fuse(
            recipe, out, memory_bytes=memory_bytes, workers=threads, overwrite=overwrite, tell=tell
        ),
        quiet,
        as_json,
    )
    if as_json:
        print_json({"ok": True, "command": "merge", "rule": str(recipe.rule), **asdict(done)})
        return
    speed = format_bytes((done.read_bytes + done.written_bytes) / max(done.seconds, 1e-9))
    print(
        f"{done.out}: {done.parameters:,} parameters in {done.tensors:,} tensors by {recipe.rule}, "
        f"{done.seconds:.2f} s, {speed}/s read and written"
    )


def _watched(work: Callable[[Any], Any], quiet: bool, to_stderr: bool) -> Any:
    if quiet:
        return work(lambda name, **data: None)
    from allfuse.base.events import Bus
    from allfuse.observe.merging import MergeProgress

    bus = Bus()
    with MergeProgress(sys.stderr if to_stderr else sys.stdout) as progress:
        bus.subscribe(progress)
        return work(bus.emit)


def _tell_plan(told: dict[str, Any], out: Path) -> None:
    print(
        f"{out}: would be {told['parameters']:,} parameters in {told['tensors']:,} tensors by "
        f"{told['rule']} of {told['models']} models\n"
        f"  read {format_bytes(told['read_bytes'])}, write {format_bytes(told['written_bytes'])} "
        f"in {told['files']} file{'s' if told['files'] > 1 else ''}, {told['threads']} threads"
    )
    if told["copied"]:
        print(f"  as in the first model, being whole numbers: {', '.join(told['copied'][:10])}")


def read_rule(text: str) -> Any:
    """The rule that a text says. Raises PlanError."""
    from allfuse.base.choice import build
    from allfuse.plan.parse import read_call
    from allfuse.rule import METHODS

    call = read_call(text)
    return build("rule", METHODS, call.name, call.args, call.kwargs)


def read_weights(text: str | None, models: int) -> list[float]:
    """Raises UserError: not numbers."""
    if text is None:
        return [1.0] * models
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise UserError(
            f"--weights {text}: allowed: numbers with commas between, one for each model, such as "
            f"{','.join(['1'] * models)}"
        ) from error
    return found


def read_size(option: str, text: str) -> int:
    """Bytes, of a text such as 2GB. Raises UserError."""
    match = SIZE.fullmatch(text.strip())
    if match is None:
        raise UserError(f"{option} {text}: allowed: a size such as 500MB or 2GB")
    return int(float(match[1]) * 10 ** POWERS[(match[2] or "").lower()])
