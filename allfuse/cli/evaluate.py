"""allfuse evaluate: measure a trained run on its test data."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Annotated

import typer

from allfuse.cli.options import (
    DebugOption,
    DeviceOption,
    JsonOption,
    PlanOption,
    ThreadsOption,
    TimeoutOption,
    WeightsOption,
    WorkersOption,
    choose_plan,
    is_first,
    print_json,
    run_under,
)


def evaluate(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    plan: PlanOption = None,
    workers: WorkersOption = None,
    data: Annotated[str, typer.Option(metavar="NAME", help="test, validation or train.")] = "test",
    weights: WeightsOption = "last",
    device: DeviceOption = None,
    threads: ThreadsOption = None,
    timeout: TimeoutOption = 300.0,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Measure the model of a run: the job's metrics, each sample once, the same on any workers.

    allfuse evaluate runs/digits --workers 2
    """
    chosen = choose_plan(plan, workers)
    work = functools.partial(evaluate_here, str(run), data, weights, device)
    found = run_under(chosen, work, threads=threads, timeout_s=timeout)
    if as_json:
        print_json({"ok": True, "command": "evaluate", "run": str(run), **found})
    elif is_first():
        print(f"{run}: {found['samples']} samples of the {found['data']} data")
        for name, value in found["metrics"].items():
            print(f"  {name:<12} {value:.6g}")
        for note in found["notes"]:
            print(f"  note: {note}")


def evaluate_here(run: str, data: str, weights: str, device: str | None) -> dict[str, object]:
    from dataclasses import asdict

    from allfuse.prediction import evaluate_run

    found = asdict(evaluate_run(run, data=data, weights=weights, device=device))
    return {"metrics": found.pop("figures"), **found}
