"""Options that several verbs share, and how a verb's work reaches its workers."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from allfuse.base.errors import Interrupted, UserError
from allfuse.plan import Plan, as_plan, check_workers
from allfuse.plan.loss import loss_policy

MOST_THREADS = 1024  # OpenMP dies without a word where the system has no more
WeightsOption = Annotated[
    str,
    typer.Option(
        "--weights",
        metavar="NAME",
        help="Those of the last step (last), of the best checkpoint (best), or the average.",
    ),
]
PlanOption = Annotated[
    str | None,
    typer.Option(
        "--plan",
        metavar="PLAN",
        help='How the work is spread, such as "data(4)" or "site(2, every=50) * data(2)".',
    ),
]
WorkersOption = Annotated[
    int | None,
    typer.Option("--workers", "-w", metavar="N", help='Short for --plan "data(N)".'),
]
DeviceOption = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="cpu or cuda; by default a GPU for each worker, else cpu."),
]
ThreadsOption = Annotated[
    int | None,
    typer.Option(metavar="N", help="Threads of each worker; by default cores / workers."),
]
TimeoutOption = Annotated[
    float,
    typer.Option(metavar="SECONDS", help="How long a worker waits for another before it gives up."),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="An argument of the job; may be repeated."),
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="End with one line of JSON; progress goes to stderr.")
]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show tracebacks of all errors.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")]

TokenOption = Annotated[
    Path | None,
    typer.Option(
        "--token-file", metavar="FILE", help="The secret of the job; else ALLFUSE_TOKEN is it."
    ),
]
ListenOption = Annotated[
    str | None,
    typer.Option(
        metavar="ADDRESS:PORT",
        help="Where workers of other hosts may join a plan with servers, such as 0.0.0.0:7077.",
    ),
]
LossOption = Annotated[
    str | None,
    typer.Option(
        metavar="POLICY",
        help="When a worker is lost: stop, continue without it, or restart (without servers all, "
        "from the last checkpoint). Plans with servers continue, others stop, unless told.",
    ),
]

PRELOAD = ("allfuse.api", "allfuse.observe.console", "allfuse.observe.jsonl", "rich.live")


def choose_plan(plan: str | None, workers: int | None, default: str | None = None) -> Plan:
    """The plan that --plan or --workers says; of both only one may be given.

    Under torchrun the plan must be for as many workers as torchrun started.
    """
    from allfuse.launcher.torchrun import environment_number, started_by_torchrun

    if plan is not None and workers is not None:
        raise UserError(
            f"--plan {plan!r} and --workers {workers}: allowed: one of the two; "
            f'--workers {workers} is short for --plan "data({workers})"'
        )
    joined = environment_number("WORLD_SIZE", 1) if started_by_torchrun() else None
    text = plan or default or (f"data({joined})" if joined else "data(1)")
    chosen = as_plan(f"data({workers})" if workers is not None else text)
    chosen.validate_executable()
    if joined is not None:
        check_workers(chosen, joined)
    return chosen


def parse_settings(pairs: list[str] | None) -> dict[str, str]:
    """The NAME=VALUE pairs of --set."""
    settings = {}
    for pair in pairs or []:
        name, equals, value = pair.partition("=")
        if not equals or not name.strip():
            missing = "'='" if not equals else "name"
            raise UserError(f"--set {pair}: received no {missing}; allowed: --set NAME=VALUE")
        settings[name.strip()] = value
    return settings


def run_under(
    plan: Plan,
    work: Callable[[], Any],
    *,
    threads: int | None = None,
    timeout_s: float = 300.0,
    on_loss: str | None = None,
    listen: str | None = None,
    token_file: Path | None = None,
) -> Any:
    """Do the work in every rank of a plan, and give what rank 0 returned.

    Here, when torchrun started this process or the plan needs one worker; else in worker processes
    of this machine. Under torchrun ranks other than 0 return what they got themselves.
    """
    if not 0 < timeout_s < math.inf:
        raise UserError(f"--timeout {timeout_s}: allowed: more than 0 seconds")
    if threads is not None and not 1 <= threads <= MOST_THREADS:
        raise UserError(f"--threads {threads}: allowed: 1 to {MOST_THREADS}")
    from allfuse.launcher.torchrun import started_by_torchrun

    refuse_without_roles(plan, listen, token_file)
    if started_by_torchrun():
        from allfuse.hosting import join_started, work_among_started
        from allfuse.launcher import entered

        _refuse_under_torchrun(on_loss, listen, token_file)
        world = join_started(plan, timeout_s=timeout_s, listen=listen, token_file=token_file)
        set_threads(threads, world.local_size)
        with entered(world):
            return work_among_started(world, work)
    policy = None if plan.outer is not None else loss_policy(plan, on_loss)
    if policy is not None and plan.workers == 1 and policy.on_loss != "restart":
        set_threads(threads, 1)
        return work()
    from allfuse.launcher.local import launch_local, warm_up

    warm_up(PRELOAD)
    if plan.outer is not None:
        from allfuse.hosting import launch_with_roles
        from allfuse.launcher.generation import check_on_loss
        from allfuse.launcher.token import find_token

        token = find_token(token_file, make=listen is not None)
        if token is None:
            refuse_open_house(listen)
        return launch_with_roles(
            work,
            plan,
            threads=threads,
            timeout_s=timeout_s,
            on_loss=check_on_loss(on_loss or "continue"),
            listen=listen,
            token=token,
            token_file=token_file,
        )
    return launch_local(
        work,
        plan.workers,
        plan=str(plan),
        threads=threads,
        timeout_s=timeout_s,
        policy=policy,
    )


def refuse_open_house(listen: str | None) -> None:
    """Refuse to let others join where there is no secret."""
    if listen is not None:
        raise UserError(
            f"--listen {listen}: whoever joins must know a secret, and there is none; next: "
            "--token-file job.token, which is made if it is not there"
        )


def _refuse_under_torchrun(
    on_loss: str | None, listen: str | None, token_file: Path | None
) -> None:
    """Refuse what torchrun decides itself."""
    if on_loss not in (None, "stop"):
        raise UserError(
            f"--on-loss {on_loss} under torchrun: it ends all workers when one fails; allowed: "
            "stop; next: torchrun --max-restarts N with --auto-resume, or `allfuse train --listen` "
            "and `allfuse join` for workers that may come and go"
        )
    from allfuse.launcher.token import VARIABLE

    if token_file is None and VARIABLE not in os.environ:
        refuse_open_house(listen)


def refuse_without_roles(plan: Plan, listen: str | None, token_file: Path | None) -> None:
    """Refuse what only a plan with a scheduler can do."""
    if plan.outer is not None:
        return
    nearest = f'--plan "data({plan.workers}, topology=central, sync=asp)"'
    for name, value in (("--listen", listen), ("--token-file", token_file)):
        if value is not None:
            raise UserError(
                f"{name} {value}: nobody can join {plan}, whose workers are counted when it "
                f"starts; next: a plan with a scheduler, such as {nearest}"
            )


def set_threads(threads: int | None, local_workers: int) -> None:
    """Threads of this process: those asked for, or its share of the cores."""
    import torch

    from allfuse.launcher.local import threads_each

    torch.set_num_threads(threads or threads_each(local_workers))


@contextmanager
def if_interrupted(then: str = "") -> Iterator[None]:
    """Say in one line that Ctrl-C ended the work, and what the same command does then.

    Raises:
        Interrupted: it did.
    """
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted; {then}" if then else "interrupted") from None
    except Interrupted as error:
        raise (Interrupted(f"{error}; {then}") if then else error) from None


def is_first() -> bool:
    """Whether this process speaks for all: rank 0 under torchrun, or the launcher."""
    from allfuse.launcher.torchrun import environment_number, started_by_torchrun

    return not started_by_torchrun() or environment_number("RANK", 0) == 0


def print_json(value: dict[str, Any]) -> None:
    """One line of strict JSON on standard output: NaN and infinities are null."""

    def plain(item: Any) -> Any:
        if isinstance(item, float) and not math.isfinite(item):
            return None
        if isinstance(item, dict):
            return {key: plain(each) for key, each in item.items()}
        if isinstance(item, list | tuple):
            return [plain(each) for each in item]
        return item

    if is_first():
        print(json.dumps(plain(value), allow_nan=False), flush=True)
