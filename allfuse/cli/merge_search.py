"""allfuse merge --search: models that are judged by the validation data of their job."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from allfuse.base.errors import UserError
from allfuse.cli.merge_jobs import looks_at_data, refuse_early, refuse_few
from allfuse.cli.merge_recipe import find_models, note_models
from allfuse.cli.merge_result import Result
from allfuse.cli.options import choose_plan, is_first, parse_settings, run_under

if TYPE_CHECKING:
    from allfuse.judge.subject import Subject
    from allfuse.judge.wish import Wish
    from allfuse.rule import Rule

SearchOption = Annotated[
    str | None,
    typer.Option(
        metavar="HOW",
        help="Look for the best fusion by the job's validation data: greedy (a soup), "
        "coefficients (weights and arguments of the rule) or methods (all rules).",
    ),
]
EvaluationsOption = Annotated[
    int | None,
    typer.Option(metavar="N", help="Candidates that a search judges at most."),
]
PerLayerOption = Annotated[
    bool, typer.Option("--per-layer", help="Have --search coefficients weigh each layer.")
]


def merge_by_search(
    models: Sequence[Path],
    result: Result,
    *,
    search: str,
    rule: Rule,
    jobs: list[Path] | None,
    settings: list[str] | None,
    plan: str | None,
    workers: int | None,
    evaluations: int | None,
    per_layer: bool,
    threads: int | None,
    timeout: float,
    **about: Any,
) -> None:
    """Search, and tell what was found.

    Args:
        models: several, or one folder with several.
        about: base, dtype, seed, allow_nan, calibrate and memory_bytes of a `Subject`.
    """
    from allfuse.judge.searches import refuse_counts, refuse_search

    refuse_search(search, per_layer)
    found, given, base = find_models(models), parse_settings(settings), about["base"]
    refuse_counts(search, len(found), evaluations)
    refuse_few("--threads", threads)
    sources = [*found, *([] if base is None else [base])]
    refuse_early(sources, result.out, jobs, result.overwrite)
    chosen, notes = choose_plan(plan, workers), note_models(models, found)
    from allfuse.judge.subject import Subject, find_job
    from allfuse.judge.wish import Wish, check

    job = find_job([*models, *found], jobs or [], given)
    subject = Subject(models=tuple(found), job=job, rule=rule, **about)
    wish = Wish(
        search=search,
        out=result.out,
        evaluations=evaluations,
        per_layer=per_layer,
        overwrite=result.overwrite,
    )
    check(subject, wish)
    if result.dry_run:
        told = {
            "search": search,
            "models": [str(path) for path in found],
            "job": str(job.path),
            "evaluations": wish.limit,
            "notes": notes,
        }
        limit = "" if wish.limit is None else f", at most {wish.limit} candidates"
        text = f"{result.out}: would be by {search} search of {len(found)} models{limit}"
        result.tell(told, f"{text}\n  judged by {job.path}")
        return
    work = functools.partial(_search_here, subject, wish, result)
    report = run_under(chosen, work, threads=threads, timeout_s=timeout)
    if not is_first():
        return
    report["notes"] = [*notes, *report["notes"]]
    if result.as_json:
        result.tell(report, "")
    else:
        from allfuse.observe.judging import print_report

        print_report(report)


def refuse_beside_search(rule: str | None, weights: str | None, **given: object) -> None:
    """Refuse what a search does not do. Raises UserError."""
    if rule is not None and looks_at_data(rule):
        raise UserError(
            f"--rule {rule}: it looks at data, and a search fuses by rules of weights alone; next: "
            "another rule, or no --search"
        )
    if weights is not None:
        raise UserError(f"--weights {weights}: a search finds them; next: leave it out")
    for name, value in given.items():
        if value:
            raise UserError(
                f"--{name.replace('_', '-')} beside --search is not possible; next: leave it out"
            )


def refuse_without_search(**given: object) -> None:
    """Refuse options that only a search has. Raises UserError."""
    for name, value in given.items():
        if value:
            raise UserError(
                f"--{name.replace('_', '-')} belongs to a search; next: --search greedy, "
                "coefficients or methods"
            )


def _search_here(subject: Subject, wish: Wish, result: Result) -> Any:
    """One rank's part; the report on rank 0."""
    from allfuse.judge.search import search
    from allfuse.observe.judging import SearchProgress

    with result.watched(SearchProgress) as tell:
        return search(subject, wish, tell=tell)
