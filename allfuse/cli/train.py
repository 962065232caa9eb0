"""allfuse train: train a job under a plan."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from allfuse.base.errors import UserError, WorkerFailed
from allfuse.cli.options import (
    DebugOption,
    DeviceOption,
    JsonOption,
    ListenOption,
    LossOption,
    PlanOption,
    QuietOption,
    SetOption,
    ThreadsOption,
    TimeoutOption,
    TokenOption,
    WorkersOption,
    choose_plan,
    is_first,
    parse_settings,
    print_json,
    run_under,
)

if TYPE_CHECKING:
    from allfuse.hosting import About
    from allfuse.training.loop import Result


def train(
    job: Annotated[Path, typer.Argument(help="A Python file with a function job().")],
    plan: PlanOption = None,
    workers: WorkersOption = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="The run folder to make.")
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Go on with this run from its last checkpoint."),
    ] = None,
    auto_resume: Annotated[
        bool,
        typer.Option("--auto-resume", help="With --out: go on with the run there, if any."),
    ] = False,
    settings: SetOption = None,
    steps: Annotated[int | None, typer.Option(help="Stop after this many steps in all.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Stop after this many epochs in all.")] = None,
    device: DeviceOption = None,
    threads: ThreadsOption = None,
    timeout: TimeoutOption = 300.0,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Write TensorBoard files into the run folder.")
    ] = False,
    profile: Annotated[
        str | None,
        typer.Option(metavar="FIRST:LAST", help="Write a torch profiler trace of these steps."),
    ] = None,
    on_loss: LossOption = None,
    listen: ListenOption = None,
    token_file: TokenOption = None,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Train a job on one worker or many, with the same numbers.

    allfuse train examples/digits.py --workers 2 --out runs/digits --set lr=3e-3
    """
    if out is not None and resume is not None:
        raise UserError(f"--out {out} and --resume {resume}: allowed: one of the two")
    needs_folder = [
        name for name, on in (("--tensorboard", tensorboard), ("--profile", profile)) if on
    ]
    if needs_folder and out is None and resume is None:
        raise UserError(f"{needs_folder[0]} writes into the run folder; next: add --out FOLDER")
    if auto_resume and out is None:
        raise UserError("--auto-resume needs the run folder; next: add --out FOLDER")
    held: dict[str, Any] = {}
    if resume is not None or auto_resume:
        from allfuse.store.run import RunFolder, is_run

        if out is not None and is_run(out):
            resume, out = out, None
        if resume is not None:
            held = RunFolder.open(resume).record
    chosen = choose_plan(plan, workers, default=held.get("plan"))
    work = functools.partial(
        train_file,
        str(job),
        parse_settings(settings),
        out=None if out is None and resume is None else str(out or resume),
        resume=resume is not None,
        limits={"steps": steps, "epochs": epochs},
        device=device,
        tensorboard=tensorboard,
        profile=profile,
        quiet=quiet,
        to_stderr=as_json,
    )
    try:
        result: Result | None = run_under(
            chosen,
            work,
            threads=threads,
            timeout_s=timeout,
            on_loss=on_loss,
            listen=listen,
            token_file=token_file,
        )
    except WorkerFailed as error:
        from allfuse.store.run import is_run

        folder = out or resume
        if not error.trace and folder is not None and is_run(folder) and is_first():
            print(f"to go on: allfuse train {job} --resume {folder}", file=sys.stderr)
        raise
    if result is not None and not result.elsewhere and is_first():
        require_model(out or resume, job)
    if as_json:
        print_json(
            {
                "ok": True,
                "command": "train",
                "plan": str(chosen),
                "steps": result.steps if result else None,
                "loss": result.loss if result else None,
                "reason": result.reason if result else "others have ended the job",
                "validation": result.metrics if result else {},
                "average": result.average if result else {},
                "test": result.test if result else {},
                "out": result.out if result else str(out or resume),
            }
        )


def require_model(folder: Path | None, job: Path) -> None:
    """A run that was to leave a model, and could not write it, has failed.

    Raises:
        CheckpointError: says how to get it.
    """
    from allfuse.base.errors import CheckpointError
    from allfuse.store.run import RunFolder, is_run

    if folder is None or not is_run(folder):
        return
    path = RunFolder.open(folder).model_path
    if not path.exists():
        raise CheckpointError(
            f"the job is done, and its model was not written to {path} (a warning above says why); "
            f"next: make room, then allfuse train {job} --resume {folder}, which goes on from the "
            "last checkpoint that was saved"
        )


def train_file(
    job_file: str,
    settings: dict[str, str],
    *,
    joined: About | None = None,
    out: str | None,
    resume: bool,
    limits: dict[str, int | None],
    device: str | None,
    tensorboard: bool,
    profile: str | None,
    quiet: bool,
    to_stderr: bool,
) -> Result:
    """What every rank does: load the job, watch the session, train.

    `joined` is what is known of a job that this rank joins.
    """
    from dataclasses import replace

    from allfuse.job import Stop
    from allfuse.jobfile import load_job_function, make_job, resolve
    from allfuse.store.run import RunFolder, source_fingerprint
    from allfuse.training.loop import train_job
    from allfuse.training.session import Session
    from allfuse.watching import Watching, watch

    function = load_job_function(job_file)
    if resume and out is not None:
        settings = {**RunFolder.open(out).record.get("arguments", {}), **settings}
    arguments = joined.arguments if joined else resolve(function, settings, job_file)
    job = make_job(function, arguments, job_file)
    given = {name: value for name, value in limits.items() if value is not None}
    if given:
        rules = {name: getattr(job.stop, name) for name in Stop.__dataclass_fields__}
        job = replace(job, stop=Stop(**{**rules, **given}))

    def prepare(session: Session) -> None:
        keeper = session.keeper
        keeper.job_file = Path(job_file).resolve()
        keeper.facts |= {"arguments": arguments, "job_file": str(keeper.job_file)}
        if session.apart is not None:
            session.apart.facts["about"] = {"arguments": arguments, "limits": limits}
            session.apart.export_to = joined.out if joined else None
        keeper.fingerprints["job"] = source_fingerprint(keeper.job_file)
        watching = Watching(
            quiet=quiet, tensorboard=tensorboard, profile=profile, to_stderr=to_stderr
        )
        watch(session, watching)

    # the weights are in the run folder; nobody here asks for them
    return train_job(
        job, None, out=out, resume=resume, device=device, prepare=prepare, keep_weights=False
    )
