"""L1: how n values become one; pure tensor math."""

from __future__ import annotations

from allfuse.rule.base import GatherRule, Rule, SumRule
from allfuse.rule.clipped import Clipped
from allfuse.rule.mean import Mean
from allfuse.rule.median import Median
from allfuse.rule.trimmed import Trimmed
from allfuse.rule.vote import Vote

RULES: dict[str, type[Rule]] = {
    "mean": Mean,
    "median": Median,
    "trimmed": Trimmed,
    "vote": Vote,
    "clipped": Clipped,
}

__all__ = ["RULES", "GatherRule", "Mean", "Rule", "SumRule"]
