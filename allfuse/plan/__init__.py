"""L2: a plan is a product of axes. Parse it, check it, describe it. Loads no torch."""

from __future__ import annotations

from allfuse.plan.axes import AXES, Axis, Data, Member, Pipe, Promise, Shard, Site, Tensor
from allfuse.plan.describe import describe, layout
from allfuse.plan.plan import (
    Plan,
    PlanLike,
    as_plan,
    check_workers,
    data,
    member,
    pipe,
    shard,
    site,
    tensor,
)

__all__ = [
    "AXES",
    "Axis",
    "Data",
    "Site",
    "Member",
    "Tensor",
    "Pipe",
    "Shard",
    "Plan",
    "PlanLike",
    "Promise",
    "as_plan",
    "check_workers",
    "describe",
    "layout",
    "data",
    "site",
    "member",
    "tensor",
    "pipe",
    "shard",
]
