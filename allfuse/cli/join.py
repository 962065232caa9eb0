"""allfuse join: take part in a job whose scheduler listens elsewhere."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Annotated

import typer

from allfuse.base.errors import UserError
from allfuse.cli.options import (
    DebugOption,
    DeviceOption,
    JsonOption,
    QuietOption,
    ThreadsOption,
    TimeoutOption,
    TokenOption,
    print_json,
)


def join(
    place: Annotated[str, typer.Argument(metavar="HOST:PORT", help="Where the scheduler listens.")],
    job: Annotated[Path, typer.Argument(help="The job file, the same as there.")],
    token_file: TokenOption = None,
    device: DeviceOption = None,
    threads: ThreadsOption = None,
    timeout: TimeoutOption = 300.0,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Work for a job that `allfuse train --listen` started, from now until it is done.

    allfuse join 10.0.0.1:7077 job.py --token-file job.token

    The plan and the arguments come from there; the code comes from the local file, and must do the
    same. Comes and goes at any time, as the plan's min and max allow.
    """
    from allfuse.cli.train import train_file
    from allfuse.hosting import ask_about, join_job
    from allfuse.launcher.token import VARIABLE, find_token

    token = find_token(token_file, make=False)
    if token is None:
        raise UserError(
            f"join {place}: received no token; next: --token-file FILE, a copy of the one that the "
            f"job was started with, or {VARIABLE} in the environment"
        )
    about = ask_about(place, token, timeout)
    work = functools.partial(
        train_file,
        str(job),
        {},
        joined=about,
        out=None,
        resume=False,
        limits=about.limits,
        device=device,
        tensorboard=False,
        profile=None,
        quiet=quiet,
        to_stderr=as_json,
    )
    if not quiet and not as_json:
        print(f"joining {about.plan} at {place}", flush=True)
    join_job(work, about, place, token, threads=threads, timeout_s=timeout)
    if as_json:
        print_json({"ok": True, "command": "join", "plan": about.plan, "place": place})
    elif not quiet:
        print("the job is done", flush=True)
