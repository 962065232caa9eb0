"""What `allfuse merge` does by the models' jobs: options, and rules that look at data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from allfuse.base.errors import JobError, UserError
from allfuse.base.units import format_bytes
from allfuse.cli.merge_result import Result
from allfuse.cli.options import if_interrupted, parse_settings, set_threads
from allfuse.merge import OF_DATA

if TYPE_CHECKING:
    from allfuse.job import Job
    from allfuse.merge.learned import Learned
    from allfuse.merge.learned.learn import LearnedMerge
    from allfuse.plan.parse import Call

ANEW = "nothing was written, and the same command begins anew"
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
                f"({', '.join(OF_DATA)}), --align or --search"
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


def _read(rule: str) -> Call:
    from allfuse.plan.parse import Call, read_call

    call = read_call(rule.replace("++", PLUS), "rule")  # which no expression can be
    return Call(call.name.replace(PLUS, "++"), call.args, call.kwargs)


def looks_at_data(rule: str) -> bool:
    """Whether a text says a rule that looks at data. Loads no torch.

    Raises:
        PlanError: there is no such rule.
    """
    from allfuse.base.choice import Choice, build
    from allfuse.rule import METHODS

    call = _read(rule)
    if call.name not in METHODS and call.name not in OF_DATA:
        table: dict[str, type[Choice]] = {**METHODS, **dict.fromkeys(OF_DATA, Choice)}
        build("rule", table, call.name, call.args, call.kwargs)
    return call.name in OF_DATA


def find_learned(rule: str) -> Learned:
    """The method that looks at data which a text says.

    Raises:
        PlanError: it says none.
    """
    from allfuse.base.choice import build
    from allfuse.merge.learned import LEARNED

    call = _read(rule)
    return build("rule", LEARNED, call.name, call.args, call.kwargs)


def refuse_early(
    models: Sequence[Path], out: Path, jobs: list[Path] | None, overwrite: bool
) -> None:
    """Refuse what can be refused before torch is loaded, which takes seconds: models and job files
    that are not there, and a place that is taken.

    Raises:
        MergeError, JobError: says which.
    """
    from allfuse.merge.folder import refuse_folder
    from allfuse.merge.source import open_source

    places = [place for model in models for place in open_source(model).places]
    refuse_folder(places, 0, out, overwrite)
    for file in jobs or []:
        if not file.is_file():
            raise JobError(
                f"--job {file}: there is no such file; allowed: a Python file with a function job()"
            )


def refuse_few(option: str, value: int | None, least: int = 1) -> None:
    """Refuse a number that is too small. Raises UserError."""
    if value is not None and value < least:
        raise UserError(f"{option} {value}: allowed: {least} or more")


def refuse_beside(rule: str, **given: object) -> None:
    """Refuse options that mean nothing for a rule which looks at data. Raises UserError."""
    for name, value in given.items():
        if value:
            raise UserError(
                f"--{name.replace('_', '-')} beside --rule {rule}: it is for rules that stream "
                "from disk; next: leave it out, or another rule"
            )


def merge_by_data(
    rule: str,
    models: Sequence[Path],
    result: Result,
    *,
    jobs: list[Path] | None,
    settings: list[str] | None,
    notes: list[str],
    threads: int | None,
    **about: Any,
) -> None:
    """Fuse models by what they do with data, and tell of it.

    Args:
        notes: what else to tell. about: weights, base, examples, seed, dtype and calibrate of
            `LearnedMerge`.
    """
    base, out = about["base"], result.out
    refuse_few("--threads", threads)
    refuse_few("--examples", about["examples"])
    parse_settings(settings)
    refuse_early([*models, *([] if base is None else [base])], out, jobs, result.overwrite)
    with if_interrupted(ANEW):
        given = _prepare(rule, models, read_jobs(models, jobs, settings), threads, about)
        common = {
            "rule": str(given.method),
            "models": [str(model) for model in models],
            "notes": notes,
        }
        if result.dry_run:
            told = _check(given, out, result.overwrite)
            result.tell(told | common, _wording(told, out))
            return
        done = _merge(given, result)
    result.tell(
        done | common,
        f"{done['out']}: {done['parameters']:,} parameters in {done['tensors']:,} tensors by "
        f"{given.method} of {len(models)} models, {done['seconds']:.2f} s",
    )


def _prepare(
    rule: str,
    models: Sequence[Path],
    jobs: list[Job],
    threads: int | None,
    about: dict[str, Any],
) -> LearnedMerge:
    from allfuse.merge.learned.learn import LearnedMerge

    set_threads(threads, 1)
    return LearnedMerge(method=find_learned(rule), models=models, jobs=jobs, **about)


def _check(given: LearnedMerge, out: Path, overwrite: bool) -> dict[str, Any]:
    from allfuse.merge.learned.learn import check

    return check(given, out, overwrite)


def _merge(given: LearnedMerge, result: Result) -> dict[str, Any]:
    from allfuse.merge.learned.learn import merge_learned
    from allfuse.observe.learning import LearnProgress

    with result.watched(LearnProgress) as tell:
        return merge_learned(given, result.out, overwrite=result.overwrite, tell=tell)


def _wording(told: dict[str, Any], out: Path) -> str:
    """What would be done, in words."""
    return (
        f"{out}: would be {told['parameters']:,} parameters in {told['tensors']:,} tensors "
        f"by {told['rule']} of {told['models']} models\n"
        f"  at most {told['examples']} samples of each model's data, about "
        f"{format_bytes(told['memory_bytes'])} in memory beside activations, write "
        f"{format_bytes(told['written_bytes'])}"
    )
