"""What is searched, and what is refused before any process starts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from allfuse.base.errors import MergeError
from allfuse.judge.candidate import Candidate, single
from allfuse.judge.coefficients import Space, require_cma
from allfuse.judge.searches import refuse_counts, refuse_search
from allfuse.judge.subject import Subject
from allfuse.merge.merge import refuse_place
from allfuse.merge.outline import outline
from allfuse.rule import Mean

EVALUATIONS = 100
"""Candidates of a search that would not end by itself."""


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What is searched, and where what is found will be.

    Attributes:
        search: greedy (a soup), coefficients (weights and arguments of the rule), or methods.
        evaluations: candidates that are judged at most; None: as many as the search has, and
            EVALUATIONS for coefficients.
        per_layer: whether coefficients has weights for each layer.
    """

    search: str
    out: Path
    evaluations: int | None = None
    per_layer: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        refuse_search(self.search, self.per_layer)

    @property
    def limit(self) -> int | None:
        if self.evaluations is None and self.search == "coefficients":
            return EVALUATIONS
        return self.evaluations


def check(subject: Subject, wish: Wish) -> None:
    """Refuse what cannot be before any process starts: reads headers alone.

    Raises:
        MergeError: too few models, models that differ, a place that is taken, or too few
            evaluations to begin with.
    """
    n, rule = len(subject.models), subject.rule
    refuse_counts(wish.search, n, wish.limit)
    if len({path.resolve() for path in subject.models}) < n:
        raise MergeError("--search: a model was given twice; allowed: each once")
    _check_rule(subject, wish)
    if wish.search == "coefficients":
        require_cma()
        Space(rule, n, [])
    for model in range(n):
        outline(subject.recipe(single(model)))
    plan = outline(subject.recipe(Candidate(tuple(range(n)), rule, (1.0,) * n)))
    refuse_place(plan, wish.out, wish.overwrite)


def _check_rule(subject: Subject, wish: Wish) -> None:
    rule, base = subject.rule, subject.base
    if wish.search == "methods":
        if rule != Mean():
            raise MergeError(
                f"--search methods tries all rules, received --rule {rule}; next: leave it out, or "
                "--search coefficients for the best arguments of that rule"
            )
        return
    if wish.search == "greedy" and rule.models is not None:
        raise MergeError(
            f"--search greedy fuses any number of models, and {rule.name} {rule.models}; next: "
            "--rule mean, or --search methods"
        )
    if base is not None and not (rule.of_changes or rule.base_optional):
        raise MergeError(
            f"{rule.name} fuses models as they are, and would not look at the base {base}; next: "
            "leave it out, or name it among the models"
        )
