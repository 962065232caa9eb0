"""Fusing by what models do with data: one file for each method, on any module of a job."""

from __future__ import annotations

from allfuse.merge.learned.adamerging import AdaMerging
from allfuse.merge.learned.base import Learned
from allfuse.merge.learned.fisher import Fisher
from allfuse.merge.learned.regmean import RegMean
from allfuse.merge.learned.regmean_plus import RegMeanPlus

LEARNED: dict[str, type[Learned]] = {
    "fisher": Fisher,
    "regmean": RegMean,
    "regmean++": RegMeanPlus,
    "adamerging": AdaMerging,
}

__all__ = ["LEARNED", "Learned"]
