"""What becomes of the weights that replicas fused after steps of their own.

Lives beside the sync policies because it has a meaning only where replicas run apart for some
steps and meet again: the policy says when they meet, the outer step what they leave with. (It is
no rule: a rule makes one of n values at once, an outer optimizer keeps state from round to round.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from allfuse.base.choice import Choice


@dataclass(frozen=True)
class Outer(Choice):
    """The step that a round of fused weights takes, from those of the round before."""


@dataclass(frozen=True)
class Average(Outer):
    """Goes on from the fused weights as they are: local SGD (Stich 2019, arXiv:1805.09767)."""

    name: ClassVar[str] = "average"


OUTERS: dict[str, type[Outer]] = {"average": Average}
