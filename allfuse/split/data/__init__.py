"""Cuts data: which samples make up each step's batch, and which replica reads which of them."""

from __future__ import annotations

from allfuse.split.data.base import Collate, Settings, Source
from allfuse.split.data.batches import Batches, BatchPlan, SamplerPlan, plan_batches
from allfuse.split.data.columns import ColumnSource
from allfuse.split.data.iterable import IterableLoader
from allfuse.split.data.learned import Learned, Stretch
from allfuse.split.data.loader import Loader
from allfuse.split.data.mapped import MapSource
from allfuse.split.data.permutation import Permutation
from allfuse.split.data.portion import Portion
from allfuse.split.data.sources import as_source
from allfuse.split.data.stream import Stream

__all__ = [
    "as_source",
    "plan_batches",
    "Batches",
    "BatchPlan",
    "SamplerPlan",
    "Loader",
    "IterableLoader",
    "Learned",
    "Stretch",
    "Portion",
    "Source",
    "ColumnSource",
    "MapSource",
    "Stream",
    "Settings",
    "Collate",
    "Permutation",
]
