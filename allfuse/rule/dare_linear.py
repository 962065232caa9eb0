"""Drops changes at random, and adds up the rest."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import ClassVar

from allfuse.rule.chance import check_preset, drop
from allfuse.rule.sift import Sift, check_density
from allfuse.rule.task_arithmetic import TaskArithmetic


@dataclass(frozen=True)
class DareLinear(TaskArithmetic):
    """DARE (Yu et al. 2024, arXiv:2311.03099). Each change is kept with probability `density`; the
    rest is multiplied so that the tensor's L1 norm is as before, under preset=paper by 1 / density.
    """

    name: ClassVar[str] = "dare_linear"
    density: float = 1.0
    _: KW_ONLY
    preset: str = "mergekit"

    def __post_init__(self) -> None:
        check_density(self, self.density)
        check_preset(self, self.preset)

    def sift(self, count: int) -> Sift | None:
        return drop(self.density, self.preset)
