"""What `allfuse merge` does by the models' jobs: options, and rules that look at data."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from allfuse.base.errors import UserError
from allfuse.base.units import format_bytes
from allfuse.cli.options import parse_settings, print_json

if TYPE_CHECKING:
    from allfuse.job import Job
    from allfuse.merge.learned import Learned

EXAMPLES = 256
PLUS = "_plus_plus"

JobsOption = Annotated[
    list[Path] | None,
    typer.Option(
        "--job",
        metavar="FILE",
        help="The job of all models, or one for each (repeat it); by default that of their runs.",
    ),
]
ExamplesOption = Annotated[
    int,
    typer.Option(metavar="N", help="Samples of each model's data that rules which learn look at."),
]


def refuse_without_data(**given: object) -> None:
    """Refuse options that only what looks at data has. Raises UserError."""
    for name, value in given.items():
        if value:
            raise UserError(
                f"--{name}: this rule looks at models alone; next: leave it out, or a rule of data "
                "(fisher, regmean, regmean++, adamerging), --align or --search"
            )


def read_jobs(
    models: Sequence[Path], files: list[Path] | None, settings: list[str] | None
) -> list[Job]:
    """The job of each model, from --job and --set.

    Raises:
        UserError: a model has none, or a job file cannot be used.
    """
    from allfuse.merge.loaded import find_jobs

    return find_jobs(models, files or [], parse_settings(settings))


def find_learned(rule: str) -> Learned | None:
    """The method that looks at data which a text says; None where it says a rule of weights alone.

    Raises:
        PlanError: it says neither.
    """
    from allfuse.base.choice import Choice, build
    from allfuse.plan.parse import read_call
    from allfuse.rule import METHODS

    call = read_call(rule.replace("++", PLUS))  # which no expression can be
    name = call.name.replace(PLUS, "++")
    if name in METHODS:
        return None
    from allfuse.merge.learned import LEARNED, Learned

    table: dict[str, type[Choice]] = {**METHODS, **LEARNED}
    made = build("rule", table, name, call.args, call.kwargs)
    assert isinstance(made, Learned)
    return made


def refuse_beside(method: Learned, **given: object) -> None:
    """Refuse options that mean nothing for a rule which looks at data. Raises UserError."""
    for name, value in given.items():
        if value:
            raise UserError(
                f"--{name.replace('_', '-')} beside --rule {method}: it is for rules that stream "
                "from disk; next: leave it out, or another rule"
            )


def merge_by_data(
    method: Learned,
    models: Sequence[Path],
    out: Path,
    *,
    jobs: list[Job],
    dry_run: bool,
    overwrite: bool,
    quiet: bool,
    as_json: bool,
    threads: int | None,
    **about: Any,
) -> None:
    """Fuse models by what they do with data, and tell of it.

    Args:
        about: weights, base, examples, seed, dtype and calibrate of `LearnedMerge`.
    """
    from allfuse.cli.options import set_threads
    from allfuse.merge.learned.learn import LearnedMerge, check, merge_learned

    if threads is not None and threads < 1:
        raise UserError(f"--threads {threads}: allowed: 1 or more")
    set_threads(threads, 1)
    given = LearnedMerge(method=method, models=models, jobs=jobs, **about)
    if dry_run:
        told = check(given, out, overwrite)
        if as_json:
            print_json({"ok": True, "command": "merge", **told})
        else:
            print(
                f"{out}: would be {told['parameters']:,} parameters in {told['tensors']:,} tensors "
                f"by {told['rule']} of {told['models']} models\n"
                f"  at most {told['examples']} samples of each model's data, about "
                f"{format_bytes(told['memory_bytes'])} in memory beside activations, write "
                f"{format_bytes(told['written_bytes'])}"
            )
        return
    if quiet:
        done = merge_learned(given, out, overwrite=overwrite)
    else:
        from allfuse.base.events import Bus
        from allfuse.observe.learning import LearnProgress

        bus = Bus()
        with LearnProgress(sys.stderr if as_json else sys.stdout) as progress:
            bus.subscribe(progress)
            done = merge_learned(given, out, overwrite=overwrite, tell=bus.emit)
    if as_json:
        print_json({"ok": True, "command": "merge", "rule": str(method), **done})
    else:
        print(
            f"{done['out']}: {done['parameters']:,} parameters in {done['tensors']:,} tensors by "
            f"{method} of {len(models)} models, {done['seconds']:.2f} s"
        )
