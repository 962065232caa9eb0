"""allfuse merge: fuse the weights of models on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from allfuse.cli.merge_align import AlignOption, merge_by_alignment, refuse_beside_alignment
from allfuse.cli.merge_disk import merge_on_disk
from allfuse.cli.merge_jobs import (
    EXAMPLES,
    ExamplesOption,
    JobsOption,
    looks_at_data,
    merge_by_data,
    refuse_beside,
    refuse_few,
    refuse_without_data,
)
from allfuse.cli.merge_recipe import (
    RULE,
    PadOption,
    ShardOption,
    find_models,
    note_models,
    read_request,
    read_rule,
    read_size,
    read_type,
    read_weights,
    refuse_recipes,
)
from allfuse.cli.merge_result import Result
from allfuse.cli.merge_search import (
    EvaluationsOption,
    PerLayerOption,
    SearchOption,
    merge_by_search,
    refuse_beside_search,
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
)


def merge(
    models: Annotated[
        list[Path],
        typer.Argument(
            help="Models: run folders, files of weights, folders with them, MODEL+ADAPTER; or one "
            "folder with several; or a recipe, a .yml file such as mergekit's."
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the result will be.")],
    rule: Annotated[
        str | None,
        typer.Option(
            metavar="RULE",
            help='How they become one, such as "ties(density=0.2)"; by default mean.',
        ),
    ] = None,
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
        typer.Option(
            metavar="TYPE",
            help="F32, BF16, F16, ..., or as PyTorch names them; by default that of base or first.",
        ),
    ] = None,
    memory: Annotated[
        str, typer.Option(metavar="SIZE", help="What the process may take, such as 2GB.")
    ] = "1GB",
    threads: Annotated[
        int | None, typer.Option(metavar="N", help="Threads; by default the number of cores.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(metavar="N", help="Of what a rule draws at random; 0 by default.")
    ] = None,
    pad_vocabulary: PadOption = False,
    shard_size: ShardOption = None,
    job: JobsOption = None,
    settings: SetOption = None,
    examples: ExamplesOption = EXAMPLES,
    calibrate: Annotated[
        bool,
        typer.Option(
            "--calibrate/--no-calibrate", help="Estimate BatchNorm's statistics anew by the jobs."
        ),
    ] = True,
    align: AlignOption = None,
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
    dtype = read_type(dtype)
    result = Result(out=out, overwrite=overwrite, dry_run=dry_run, quiet=quiet, as_json=as_json)
    if align is not None:
        refuse_beside_alignment(search=search, plan=plan, workers=workers)
    if search is not None:
        refuse_recipes(models, f"--search {search}")
        refuse_beside_search(
            rule, weights=weights, pad_vocabulary=pad_vocabulary, shard_size=shard_size
        )
        merge_by_search(
            models,
            result,
            search=search,
            rule=read_rule(rule or RULE),
            memory_bytes=read_size("--memory", memory),
            jobs=job,
            settings=settings,
            plan=plan,
            workers=workers,
            evaluations=evaluations,
            per_layer=per_layer,
            threads=threads,
            timeout=timeout,
            base=base,
            dtype=dtype,
            seed=seed or 0,
            allow_nan=allow_nan,
            calibrate=calibrate,
        )
        return
    refuse_without_search(evaluations=evaluations, per_layer=per_layer)
    if rule is not None and looks_at_data(rule):
        refuse_beside(
            rule,
            pad_vocabulary=pad_vocabulary,
            shard_size=shard_size,
            allow_nan=allow_nan,
            align=align,
            plan=plan,
            workers=workers,
        )
        refuse_recipes(models, f"--rule {rule}")
        found = find_models(models)
        merge_by_data(
            rule,
            found,
            result,
            jobs=job,
            settings=settings,
            notes=note_models(models, found),
            weights=read_weights(weights, len(found)),
            base=base,
            dtype=dtype,
            examples=examples,
            calibrate=calibrate,
            seed=seed or 0,
            threads=threads,
        )
        return
    refuse_few("--threads", threads)
    said = read_request(
        models,
        rule=rule,
        weights=weights,
        base=base,
        dtype=dtype,
        seed=seed,
        allow_nan=allow_nan,
        pad_vocabulary=pad_vocabulary,
        shard_size=shard_size,
    )
    memory_bytes = read_size("--memory", memory)
    if align is not None:
        merge_by_alignment(
            said,
            align,
            result,
            jobs=job,
            settings=settings,
            examples=examples,
            calibrate=calibrate,
            threads=threads,
            memory_bytes=memory_bytes,
        )
        return
    refuse_without_data(job=job, set=settings, examples=examples != EXAMPLES)
    merge_on_disk(
        said,
        result,
        plan=plan,
        workers=workers,
        threads=threads,
        timeout=timeout,
        memory_bytes=memory_bytes,
    )
