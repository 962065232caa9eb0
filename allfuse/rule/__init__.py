"""L1: how n values become one; pure tensor math."""

from __future__ import annotations

from allfuse.rule.base import Rule, SumRule
from allfuse.rule.mean import Mean

RULES: dict[str, type[Rule]] = {"mean": Mean}

__all__ = ["RULES", "Mean", "Rule", "SumRule"]
