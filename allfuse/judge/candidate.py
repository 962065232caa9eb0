"""One way to fuse some of the models that a search is over."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from allfuse.base.choice import build
from allfuse.plan.parse import read_call
from allfuse.rule import METHODS, Rule
from allfuse.rule.passthrough import Passthrough


@dataclass(frozen=True)
class Candidate:
    """One way to fuse models.

    Attributes:
        models: which of them, by their places in the search.
        weights: one for each of these.
        layers: other weights in some layers: the layer's name, and one for each of the models.
    """

    models: tuple[int, ...]
    rule: Rule
    weights: tuple[float, ...]
    layers: tuple[tuple[str, tuple[float, ...]], ...] = ()

    @property
    def is_single(self) -> bool:
        """Whether it is one of the models as it is."""
        return isinstance(self.rule, Passthrough)

    def plain(self) -> dict[str, Any]:
        """As plain data, for JSON."""
        return {
            "models": list(self.models),
            "rule": str(self.rule),
            "weights": list(self.weights),
            "layers": {name: list(weights) for name, weights in self.layers},
        }

    @classmethod
    def read(cls, plain: Mapping[str, Any]) -> Candidate:
        """The candidate that `plain` described."""
        call = read_call(plain["rule"])
        return cls(
            tuple(plain["models"]),
            build("rule", METHODS, call.name, call.args, call.kwargs),
            tuple(plain["weights"]),
            tuple((name, tuple(weights)) for name, weights in plain["layers"].items()),
        )


def single(model: int) -> Candidate:
    """A model as it is."""
    return Candidate((model,), Passthrough(), (1.0,))


def together(models: Sequence[int], rule: Rule) -> Candidate:
    """Some models by a rule, all with the same weight, in the order of their places."""
    return Candidate(tuple(sorted(models)), rule, (1.0,) * len(models))
