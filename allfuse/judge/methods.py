"""All rules that these models can be fused by, with their defaults and a few other settings."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import fields, replace

from allfuse.base.errors import PlanError
from allfuse.judge.bench import Bench
from allfuse.judge.candidate import Candidate, together
from allfuse.rule import METHODS, Rule

VALUES: dict[str, tuple[float, ...]] = {
    "density": (0.2, 0.5, 0.8),
    "scale": (0.3, 0.5, 1.5),
    "t": (0.25, 0.75),
}
"""What is tried of arguments, one at a time, beside their defaults."""
SAME_AS_MEAN = ("linear",)


def methods(bench: Bench) -> Candidate:
    """The best of all rules and settings; of equal ones the one with the lower loss."""
    has_base = bench.subject.base is not None
    rules = [rule for rule in legal_rules(bench.count, has_base) if rule != bench.subject.rule]
    bench.ask([together(range(bench.count), rule) for rule in rules])
    return bench.best()


def legal_rules(models: int, has_base: bool) -> list[Rule]:
    """The rules for so many models, all defaults first."""
    found = []
    for name, rule in METHODS.items():
        fits = rule.models in (None, models) and (has_base or not rule.of_changes)
        if fits and name not in SAME_AS_MEAN:
            with contextlib.suppress(TypeError):  # an argument without a default
                found.append(rule())
    return [*found, *(other for rule in found for other in _others(rule))]


def _others(rule: Rule) -> Iterator[Rule]:
    own = {spec.name for spec in fields(rule)}
    for name, values in VALUES.items():
        for value in values if name in own else ():
            with contextlib.suppress(PlanError):  # some rules take less
                yield replace(rule, **{name: value})
