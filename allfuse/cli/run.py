"""allfuse run: run any script that opens a session, under a plan."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Annotated

import typer

from allfuse.base.errors import UserError
from allfuse.cli.options import (
    DebugOption,
    JsonOption,
    LossOption,
    PlanOption,
    ThreadsOption,
    TimeoutOption,
    WorkersOption,
    choose_plan,
    print_json,
    run_under,
)


def run(
    script: Annotated[Path, typer.Argument(help="A Python script that opens af.session().")],
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="[-- ARGS...]", help="Arguments of the script.")
    ] = None,
    plan: PlanOption = None,
    workers: WorkersOption = None,
    threads: ThreadsOption = None,
    timeout: TimeoutOption = 300.0,
    on_loss: LossOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Run a script in every worker of a plan. `python script.py` runs the same script alone.

    allfuse run examples/loop.py --plan "data(2)" -- --epochs 3
    """
    if not script.is_file():
        raise UserError(f"{script}: there is no such file; allowed: a Python script")
    chosen = choose_plan(plan, workers)
    given = list(arguments or [])
    if given[:1] == ["--"]:
        given = given[1:]
    run_under(
        chosen,
        functools.partial(run_script, str(script), given),
        threads=threads,
        timeout_s=timeout,
        on_loss=on_loss,
    )
    if as_json:
        print_json({"ok": True, "command": "run", "plan": str(chosen), "script": str(script)})


def run_script(script: str, arguments: list[str]) -> None:
    """What every rank does: the script as `__main__`, as if it had been started alone."""
    import runpy
    import sys

    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).resolve().parent))
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as error:
        if error.code not in (None, 0):
            raise
