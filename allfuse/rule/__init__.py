"""L1: how n values become one; pure tensor math."""

from __future__ import annotations

from allfuse.rule.base import GatherRule, Rule, SumRule
from allfuse.rule.mean import Mean
from allfuse.rule.median import Median
from allfuse.rule.trimmed import Trimmed

RULES: dict[str, type[Rule]] = {"mean": Mean, "median": Median, "trimmed": Trimmed}

__all__ = ["RULES", "GatherRule", "Mean", "Rule", "SumRule"]
