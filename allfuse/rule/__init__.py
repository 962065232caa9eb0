"""L1: how n values become one; pure tensor math."""

from __future__ import annotations

from allfuse.rule.base import GatherRule, JointRule, Rule, SpanRule, SumRule
from allfuse.rule.breadcrumbs import Breadcrumbs
from allfuse.rule.breadcrumbs_ties import BreadcrumbsTies
from allfuse.rule.clipped import Clipped
from allfuse.rule.dare_linear import DareLinear
from allfuse.rule.dare_ties import DareTies
from allfuse.rule.della import Della
from allfuse.rule.della_linear import DellaLinear
from allfuse.rule.karcher import Karcher
from allfuse.rule.linear import Linear
from allfuse.rule.mean import Mean
from allfuse.rule.median import Median
from allfuse.rule.model_stock import ModelStock
from allfuse.rule.multislerp import Multislerp
from allfuse.rule.nearswap import Nearswap
from allfuse.rule.nuslerp import Nuslerp
from allfuse.rule.passthrough import Passthrough
from allfuse.rule.sce import Sce
from allfuse.rule.slerp import Slerp
from allfuse.rule.task_arithmetic import TaskArithmetic
from allfuse.rule.ties import Ties
from allfuse.rule.trimmed import Trimmed
from allfuse.rule.vote import Vote

RULES: dict[str, type[Rule]] = {
    "mean": Mean,
    "median": Median,
    "trimmed": Trimmed,
    "ties": Ties,
    "model_stock": ModelStock,
    "vote": Vote,
    "clipped": Clipped,
}
"""Those that a plan can say."""

METHODS: dict[str, type[Rule]] = {
    **{name: rule for name, rule in RULES.items() if rule.fuses_weights},
    "linear": Linear,
    "slerp": Slerp,
    "nuslerp": Nuslerp,
    "task_arithmetic": TaskArithmetic,
    "dare_linear": DareLinear,
    "dare_ties": DareTies,
    "della": Della,
    "della_linear": DellaLinear,
    "breadcrumbs": Breadcrumbs,
    "breadcrumbs_ties": BreadcrumbsTies,
    "sce": Sce,
    "multislerp": Multislerp,
    "karcher": Karcher,
    "nearswap": Nearswap,
    "passthrough": Passthrough,
}
"""Those that fuse models on disk."""

__all__ = ["METHODS", "RULES", "GatherRule", "JointRule", "Mean", "Rule", "SpanRule", "SumRule"]
