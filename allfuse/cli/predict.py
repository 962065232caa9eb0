"""allfuse predict: score the rows of a table with a trained run."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Annotated, Any

import typer

from allfuse.cli.options import (
    DebugOption,
    DeviceOption,
    JsonOption,
    PlanOption,
    QuietOption,
    TimeoutOption,
    WeightsOption,
    WorkersOption,
    choose_plan,
    is_first,
    print_json,
    run_under,
)


def predict(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    input: Annotated[Path, typer.Option(metavar="FILE", help="A CSV file with a header row.")],
    output: Annotated[Path, typer.Option(metavar="FILE", help="The CSV file to write.")],
    plan: PlanOption = None,
    workers: WorkersOption = None,
    keep: Annotated[
        list[str] | None,
        typer.Option(metavar="COLUMN", help="An input column to pass on; may be repeated."),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(metavar="N", help="Rows that the model sees at once.")
    ] = None,
    weights: WeightsOption = "last",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the output file if it exists.")
    ] = False,
    device: DeviceOption = None,
    timeout: TimeoutOption = 300.0,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Score the rows of a table, in their order, with the model of a run.

    allfuse predict runs/digits --input rows.csv --output labels.csv --workers 2
    """
    chosen = choose_plan(plan, workers)
    options = {
        "keep": tuple(keep or ()),
        "batch_size": batch_size,
        "weights": weights,
        "overwrite": overwrite,
        "device": device,
    }
    work = functools.partial(
        predict_here, str(run), str(input), str(output), options, quiet or not is_first(), as_json
    )
    summary = run_under(chosen, work, threads=1, timeout_s=timeout)
    if as_json:
        print_json({"ok": True, "command": "predict", "run": str(run), **summary})
    elif is_first():
        print(
            f"{summary['output']}: {summary['rows']:,} rows in {summary['seconds']:.2f} s, "
            f"{summary['rows_per_s']:,.0f} rows/s, shares {summary['shares']}"
        )
        for note in summary["notes"]:
            print(f"  note: {note}")


def predict_here(
    run: str, input: str, output: str, options: dict[str, Any], quiet: bool, to_stderr: bool
) -> dict[str, Any]:
    import sys
    from dataclasses import asdict

    from allfuse.base.events import Bus
    from allfuse.launcher import current_world
    from allfuse.prediction import predict_file

    world = current_world()
    bus = Bus(0 if world is None else world.rank)
    if not quiet and bus.rank == 0:
        from allfuse.observe import Console

        with Console(sys.stderr if to_stderr else sys.stdout) as console:
            bus.subscribe(console)
            return asdict(predict_file(run, input, output, on_event=bus.emit, **options))
    return asdict(predict_file(run, input, output, on_event=bus.emit, **options))
