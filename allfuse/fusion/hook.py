"""Fusions for loops that belong to others: a communication hook for DistributedDataParallel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from allfuse.base.errors import PlanError, UserError
from allfuse.fusion.base import choose
from allfuse.plan import Data, as_plan
from allfuse.plan.plan import PlanLike
from allfuse.rule import Mean
from allfuse.topology import Native

Hook = Callable[[object, Any], torch.futures.Future[Tensor]]


def comm_hook(plan: PlanLike, group: dist.ProcessGroup | None = None) -> Hook:
    """A hook that fuses DistributedDataParallel's buckets as a `data(n)` plan says.

        model = DistributedDataParallel(net)
        model.register_comm_hook(None, af.comm_hook("data(4)"))

    DistributedDataParallel gives every rank the same weight, so this is its plain mean; a session
    weighs ranks by their samples.

    Args:
        plan: one data axis, of as many workers as the group has.
        group: the group that DistributedDataParallel was given; None is the default one.

    Raises:
        UserError: there is no process group yet.
        PlanError: the plan has other axes, or another number of workers.
    """
    chosen = as_plan(plan)
    if not dist.is_available() or not dist.is_initialized():
        raise UserError(
            "comm_hook: there is no process group; next: call torch.distributed.init_process_group "
            "first, or use af.session, which needs none"
        )
    size = dist.get_world_size(group)
    axis = chosen.axes[0]
    if len(chosen.axes) != 1 or not isinstance(axis, Data):
        raise PlanError(
            f"comm_hook({str(chosen)!r})",
            "DistributedDataParallel fuses gradients of whole models only",
            f"data({size})",
        )
    if axis.n != size:
        raise PlanError(
            f"comm_hook({str(chosen)!r})", f"the process group has {size} ranks", f"data({size})"
        )
    fusion, _ = choose(axis.rule, axis.topology, axis.sync, axis.codec)
    rule = fusion.rule
    if not isinstance(fusion.topology, Native) or not isinstance(rule, Mean):
        raise PlanError(
            f"comm_hook({str(chosen)!r})",
            "this version's hook fuses by the mean over the group's own all-reduce only",
            f"data({size})",
        )

    def fuse(state: object, bucket: Any) -> torch.futures.Future[Tensor]:
        flat = rule.prepare(bucket.buffer(), 1.0 / size)
        work: Any = dist.all_reduce(flat, group=group, async_op=True)
        future: torch.futures.Future[Any] = work.get_future()
        return future.then(lambda done: rule.finish(done.value()[0], 1.0))

    # DistributedDataParallel compares the annotations themselves, not their text.
    fuse.__annotations__ |= {
        "bucket": vars(dist)["GradBucket"],
        "return": torch.futures.Future[Tensor],
    }
    return fuse
