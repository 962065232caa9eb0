"""What is searched, and what is refused before any process starts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from allfuse.base.errors import MergeError, nearest
from allfuse.judge.candidate import Candidate, single
from allfuse.judge.coefficients import Space, require_cma
from allfuse.judge.subject import Subject
from allfuse.merge.merge import refuse_place
from allfuse.merge.outline import outline
from allfuse.rule import Mean

SEARCHES = ("greedy", "coefficients", "methods")
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
        if self.search not in SEARCHES:
            raise MergeError(
                f"--search {self.search}: there is no such search{nearest(self.search, SEARCHES)}; "
                f"allowed: {', '.join(SEARCHES)}"
            )
        if self.per_layer and self.search != "coefficients":
            raise MergeError(
                f"--per-layer: --search {self.search} does not look for weights; allowed: with "
                "--search coefficients"
            )

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
    if n < 2:
        raise MergeError(f"--search {wish.search} needs at least 2 models, received {n}")
    if len({path.resolve() for path in subject.models}) < n:
        raise MergeError("--search: a model was given twice; allowed: each once")
    _check_rule(subject, wish)
    if wish.search == "coefficients":
        require_cma()
        Space(rule, n, [])
    if wish.limit is not None and wish.limit < n + 1:
        raise MergeError(
            f"--evaluations {wish.limit}: each of {n} models is judged by itself, and all of them "
            f"together; allowed: {n + 1} or more"
        )
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
