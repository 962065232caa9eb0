"""allfuse verify: run a job under a plan and under its reference, and compare step by step."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from allfuse.base.errors import UserError
from allfuse.cli.options import (
    PRELOAD,
    DebugOption,
    DeviceOption,
    JsonOption,
    PlanOption,
    QuietOption,
    SetOption,
    WorkersOption,
    choose_plan,
    parse_settings,
    print_json,
)


def verify(
    job: Annotated[Path, typer.Argument(help="A Python file with a function job().")],
    plan: PlanOption = None,
    workers: WorkersOption = None,
    settings: SetOption = None,
    steps: Annotated[int, typer.Option(metavar="N", help="Steps to compare.")] = 10,
    as_trained: Annotated[
        bool,
        typer.Option(
            "--as-trained",
            help="Compare in the job's own precision; by default in float64, where rounding is so "
            "small that every real difference stands out.",
        ),
    ] = False,
    device: DeviceOption = None,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Prove a plan: run N steps under it and under its reference, and compare every number.

    Loss, norm of the gradient and every weight, after each step, on each worker. Ends with exit
    code 1 when they differ by more than the tolerance of the plan's promise.

    allfuse verify examples/digits.py --plan "data(2)"
    """
    from allfuse.launcher.torchrun import started_by_torchrun

    if started_by_torchrun():
        raise UserError("verify starts its own workers; allowed: run it without torchrun")
    if steps < 1:
        raise UserError(f"--steps {steps}: allowed: a whole number from 1")
    chosen = choose_plan(plan, workers, default="data(2)")
    from allfuse.launcher.local import warm_up

    warm_up(PRELOAD)
    from allfuse.verify import verify_job

    def show(name: str, **data: Any) -> None:
        """Progress of the comparison, as plain lines: a run takes seconds."""
        if name == "note":
            print(data["text"], file=sys.stderr, flush=True)

    report = verify_job(
        str(job),
        chosen,
        settings=parse_settings(settings),
        steps=steps,
        double=not as_trained,
        device=device,
        on_event=None if quiet else show,
    )
    print("\n".join(report.lines()), file=sys.stderr if as_json else sys.stdout)
    if as_json:
        print_json({"command": "verify", **report.as_dict()})
    if not report.ok:
        raise typer.Exit(1)
