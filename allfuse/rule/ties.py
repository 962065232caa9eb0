"""Keeps the largest changes of each model, and of those the ones that agree in sign."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from allfuse.rule.elected import Elected
from allfuse.rule.ranks import top
from allfuse.rule.sift import Sift, check_density


@dataclass(frozen=True)
class Ties(Elected):
    """TIES-merging (Yadav et al. 2023, arXiv:2306.01708). Of each tensor the max(1, int(density *
    count)) changes of largest magnitude are kept; of equal ones those of lower index.
    """

    name: ClassVar[str] = "ties"
    density: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_density(self, self.density)

    def sift(self, count: int) -> Sift | None:
        return top(self.density, count)
