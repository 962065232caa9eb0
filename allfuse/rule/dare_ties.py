"""Drops changes at random, and keeps of the rest what agrees in sign."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import ClassVar

from allfuse.rule.chance import drop
from allfuse.rule.elected import Elected
from allfuse.rule.sift import Sift, check_density


@dataclass(frozen=True)
class DareTies(Elected):
    """DARE (Yu et al. 2024, arXiv:2311.03099) before TIES. Each change is kept with probability
    `density`; the rest is multiplied so that the tensor's L1 norm is as before, under preset=paper
    by 1 / density.
    """

    name: ClassVar[str] = "dare_ties"
    density: float = 1.0

    _: KW_ONLY
    normalize: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_density(self, self.density)

    def sift(self, count: int) -> Sift | None:
        return drop(self.density, self.preset)
