"""Drops small changes more often than large ones, and keeps of the rest what agrees in sign."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from allfuse.rule.chance import check_tilt, drop
from allfuse.rule.elected import Elected
from allfuse.rule.sift import Sift, check_density


@dataclass(frozen=True)
class Della(Elected):
    """DELLA (Deep et al. 2024, arXiv:2406.11617). A change is kept with a probability from density
    - epsilon for the smallest magnitude of its row to density + epsilon for the largest; the rest
    is multiplied so that the tensor's L1 norm is as before, under preset=paper by one over that
    probability.
    """

    name: ClassVar[str] = "della"
    density: float = 1.0
    epsilon: float = 0.15

    def __post_init__(self) -> None:
        super().__post_init__()
        check_density(self, self.density)
        check_tilt(self, self.density, self.epsilon)

    def sift(self, count: int) -> Sift | None:
        return drop(self.density, self.preset, self.epsilon)
