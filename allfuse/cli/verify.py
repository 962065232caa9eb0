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
    job: Annotated[
        Path,
        typer.Argument(help="A Python file with a function job(), or a finished run with servers."),
    ],
    plan: PlanOption = None,
    workers: WorkersOption = None,
    settings: SetOption = None,
    steps: Annotated[
        int | None, typer.Option(metavar="N", help="Steps to compare; 10 unless given.")
    ] = None,
    every: Annotated[
        bool,
        typer.Option("--all", help="Verify every plan with --ranks ranks that makes sense."),
    ] = False,
    ranks: Annotated[
        int | None, typer.Option(metavar="N", help="Ranks of the plans of --all; 2 unless given.")
    ] = None,
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

    A run whose plan has servers is executed again in the order of its own scheduler's book.

    allfuse verify examples/digits.py --plan "data(2)"

    allfuse verify examples/digits.py --all --ranks 4

    allfuse verify runs/digits
    """
    from allfuse.launcher.torchrun import started_by_torchrun

    if started_by_torchrun():
        raise UserError("verify starts its own workers; allowed: run it without torchrun")
    if steps is not None and steps < 1:
        raise UserError(f"--steps {steps}: allowed: a whole number from 1")
    from allfuse.launcher.local import warm_up
    from allfuse.store.run import is_run

    past = is_run(job)
    given = (plan, workers, steps, device, settings or None, as_trained or None, every or None)
    refuse_beside_all(every, ranks, plan, workers)
    if past and given != (None,) * 7:
        raise UserError(
            f"verify {job}: it is a run, which has its plan, arguments and steps; allowed beside "
            "it: --quiet, --json, --debug; next: leave the others out, or verify the job's file"
        )
    chosen = choose_plan(plan, workers, default="data(2)")
    warm_up(PRELOAD)
    from allfuse.verify import verify_all, verify_job, verify_run

    def show(name: str, **data: Any) -> None:
        """Progress of the comparison, as plain lines: a run takes seconds."""
        if name in ("note", "verified"):
            print(data["text" if name == "note" else "line"], file=sys.stderr, flush=True)

    options: dict[str, Any] = {
        "settings": parse_settings(settings),
        "steps": 10 if steps is None else steps,
        "double": not as_trained,
        "device": device,
        "on_event": None if quiet else show,
    }
    report: Any
    if past:
        report = verify_run(job, on_event=options["on_event"])
    elif every:
        report = verify_all(str(job), 2 if ranks is None else ranks, **options)
    else:
        report = verify_job(str(job), chosen, **options)
    print("\n".join(report.lines()), file=sys.stderr if as_json else sys.stdout)
    if as_json:
        print_json({"command": "verify", **report.as_dict()})
    if not report.ok:
        raise typer.Exit(1)


def refuse_beside_all(
    every: bool, ranks: int | None, plan: str | None, workers: int | None
) -> None:
    """Refuse what --all decides itself, and --ranks without it."""
    if every and (plan is not None or workers is not None):
        given = f"--plan {plan!r}" if plan is not None else f"--workers {workers}"
        raise UserError(f"--all and {given}: allowed: one of the two; next: --all --ranks 4")
    if ranks is not None and not every:
        raise UserError(f"--ranks {ranks} without --all: next: --all --ranks {ranks}, or --plan")
    if ranks is not None and ranks < 2:
        raise UserError(f"--ranks {ranks}: allowed: a whole number from 2")
