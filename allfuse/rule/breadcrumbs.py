"""Drops the largest and the smallest changes, and adds up the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from allfuse.rule.ranks import band, check_band
from allfuse.rule.sift import Sift, check_density
from allfuse.rule.task_arithmetic import TaskArithmetic


@dataclass(frozen=True)
class Breadcrumbs(TaskArithmetic):
    """Model breadcrumbs (Davari and Belilovsky 2024, arXiv:2312.06795). The part `gamma` of a
    tensor's changes of largest magnitude is dropped, and of the smallest as many that `density` of
    all is left.
    """

    name: ClassVar[str] = "breadcrumbs"
    density: float = 1.0
    gamma: float = 0.01

    def __post_init__(self) -> None:
        check_density(self, self.density)
        check_band(self, self.gamma)

    def sift(self, count: int) -> Sift | None:
        return band(self.density, self.gamma, count)
