"""Drops the largest and the smallest changes, and keeps of the rest what agrees in sign."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import ClassVar

from allfuse.rule.elected import Elected
from allfuse.rule.ranks import band, check_band
from allfuse.rule.sift import Sift, check_density


@dataclass(frozen=True)
class BreadcrumbsTies(Elected):
    """As `breadcrumbs` (Davari and Belilovsky 2024, arXiv:2312.06795) before the election of signs
    of TIES."""

    name: ClassVar[str] = "breadcrumbs_ties"
    density: float = 1.0
    gamma: float = 0.01

    _: KW_ONLY
    normalize: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_density(self, self.density)
        check_band(self, self.gamma)

    def sift(self, count: int) -> Sift | None:
        return band(self.density, self.gamma, count)
