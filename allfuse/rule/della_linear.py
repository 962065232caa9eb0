"""Drops small changes more often than large ones, and adds up the rest."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import ClassVar

from allfuse.rule.chance import check_preset, check_tilt, drop
from allfuse.rule.sift import Sift, check_density
from allfuse.rule.task_arithmetic import TaskArithmetic


@dataclass(frozen=True)
class DellaLinear(TaskArithmetic):
    """DELLA (Deep et al. 2024, arXiv:2406.11617), as `della` without the election of signs."""

    name: ClassVar[str] = "della_linear"
    density: float = 1.0
    epsilon: float = 0.15
    _: KW_ONLY
    preset: str = "mergekit"

    def __post_init__(self) -> None:
        check_density(self, self.density)
        check_preset(self, self.preset)
        check_tilt(self, self.density, self.epsilon)

    def sift(self, count: int) -> Sift | None:
        return drop(self.density, self.preset, self.epsilon)
