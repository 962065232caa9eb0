"""The best weights of models and arguments of a rule, by an evolution strategy."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from allfuse.base.choice import arguments_of
from allfuse.base.errors import MergeError, PlanError
from allfuse.judge.bench import Bench
from allfuse.judge.candidate import Candidate
from allfuse.judge.subject import layers_of
from allfuse.merge.source import open_source
from allfuse.rule import Rule

RANGES = {"density": (0.05, 1.0), "scale": (0.0, 2.0), "t": (0.0, 1.0)}
"""Arguments of rules that are searched, and between which values."""
WIDTH = 0.2  # of the first draws, where each number goes from 0 to 1
DIGITS = 4


class Space:
    """What numbers from 0 to 1 mean: weights, for each layer if asked, then the rule's arguments.

    Raises:
        MergeError: there is nothing to search.
    """

    def __init__(self, rule: Rule, models: int, layers: Sequence[str]) -> None:
        self.rule, self.models = rule, models
        self.is_scale_free = bool(getattr(rule, "normalize", True))
        self.layers = list(layers) if rule.weighted else []
        self.groups = max(1, len(self.layers)) if rule.weighted and models > 1 else 0
        self.arguments = [spec.name for spec in arguments_of(type(rule)) if spec.name in RANGES]
        if not self.size:
            raise MergeError(
                f"{rule} has neither weights nor arguments to search: it does not look at weights; "
                "next: another --rule, or --search methods"
            )

    @property
    def size(self) -> int:
        return self.groups * self.models + len(self.arguments)

    def start(self, weights: Sequence[float]) -> list[float]:
        """The point of these weights in all layers, with the rule's own arguments."""
        own = [
            (getattr(self.rule, name) - RANGES[name][0]) / (RANGES[name][1] - RANGES[name][0])
            for name in self.arguments
        ]
        return [*list(weights) * self.groups, *(min(max(value, 0.0), 1.0) for value in own)]

    def candidate(self, point: Sequence[float]) -> Candidate:
        """What a point stands for. Weights that are all 0 are all 1; so are equal ones where only
        their ratios count."""
        values = [round(min(max(float(value), 0.0), 1.0), DIGITS) for value in point]
        cut = self.groups * self.models
        rows = [values[at : at + self.models] for at in range(0, cut, self.models)]
        alike = [not any(row) or (self.is_scale_free and len(set(row)) == 1) for row in rows]
        ones = (1.0,) * self.models
        weights = [ones if same else tuple(row) for row, same in zip(rows, alike, strict=True)]
        everywhere = tuple(range(self.models))
        rule = self._rule(values[cut : self.size])
        if not self.layers:
            return Candidate(everywhere, rule, weights[0] if weights else ones)
        return Candidate(everywhere, rule, ones, tuple(zip(self.layers, weights, strict=True)))

    def _rule(self, values: Sequence[float]) -> Rule:
        changes = {}
        for name, value in zip(self.arguments, values, strict=True):
            low, high = RANGES[name]
            changes[name] = round(low + value * (high - low), DIGITS)
        try:
            return replace(self.rule, **changes)
        except PlanError:  # arguments that do not go together, such as density and epsilon
            return self.rule


def coefficients(bench: Bench, per_layer: bool = False) -> Candidate:
    """The best of what CMA-ES (Hansen 2016, arXiv:1604.00772) tries, which begins at the better of
    all models alike and the best one alone. Candidates are ranked by the monitored value, equal
    ones by the loss. What it draws follows from the search's seed.
    """
    rule, count = bench.subject.rule, bench.count
    layers = layers_of(open_source(bench.subject.models[0])) if per_layer else []
    space = Space(rule, count, layers)
    best = bench.best_single().models[0]
    starts = [
        space.start([0.5 if space.is_scale_free else 1 / count] * count),
        space.start([float(model == best) for model in range(count)]),
    ]
    begun = bench.ask([space.candidate(point) for point in starts])
    if len(begun) < len(starts):
        return bench.best()
    first = max(range(len(starts)), key=lambda place: (begun[place].order, -place))
    strategy = _strategy(starts[first], bench.subject.seed)
    while bench.left > 0:
        points, before = strategy.ask(), len(bench.scores)
        found = bench.ask([space.candidate(point) for point in points])
        if len(found) < len(points) or len(bench.scores) == before:
            break
        orders = [score.order for score in found]
        ranks = [float(sum(other > order for other in orders)) for order in orders]
        strategy.tell(points, ranks)
    return bench.best()


def require_cma() -> Any:
    """The package that has the strategy. Raises MergeError: it is not installed."""
    try:
        with warnings.catch_warnings():  # of packages that it would draw pictures with
            warnings.simplefilter("ignore")
            import cma
    except ImportError as error:
        raise MergeError(
            "--search coefficients needs the package cma, which is not installed; next: "
            'pip install "allfuse[search]", or --search greedy'
        ) from error
    return cma


def _strategy(start: Sequence[float], seed: int) -> Any:
    chance = np.random.default_rng(seed)
    if len(start) == 1:  # it needs two numbers; the second one means nothing
        start = [*start, 0.5]
    options = {
        "bounds": [0.0, 1.0],
        "randn": lambda *shape: chance.standard_normal(shape),
        "seed": np.nan,  # NumPy's own generator stays as it is
        "verbose": -9,
        "verb_log": 0,
    }
    return require_cma().CMAEvolutionStrategy(list(start), WIDTH, options)
