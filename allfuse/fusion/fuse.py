"""Fusion of any tensors in place, for loops that belong to others."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from allfuse.base.errors import PlanError, UserError
from allfuse.fusion.axis import read_axis
from allfuse.fusion.base import Fusion
from allfuse.fusion.fuser import Fuser
from allfuse.fusion.roster import host_number, layout_of, number_of, tell
from allfuse.fusion.weights import WeightFusion
from allfuse.launcher import World, current_world
from allfuse.link.borrowed import BorrowedLink
from allfuse.link.check import SUMMABLE
from allfuse.link.lone import LoneLink
from allfuse.plan import Data, Site, as_plan
from allfuse.plan.plan import PlanLike
from allfuse.rule import SumRule

if TYPE_CHECKING:
    from allfuse.link import Link


def fuse_(
    tensors: Iterable[Tensor],
    axis: PlanLike,
    *,
    weight: float | None = None,
    group: dist.ProcessGroup | None = None,
    round: int = 0,
    timeout_s: float = 300.0,
) -> None:
    """Replace tensors by their fused value over all ranks, in place, as an axis says.

        af.fuse_(model.parameters(), "site(4, rule=median)")
        af.fuse_([gradient], af.data(2, topology="ring"), weight=samples)

    The ranks are those of `group`; else those that `allfuse run` or `af.launch` started; else those
    of torch.distributed's default group. All of them call it alike, and nothing else of the group
    is under way meanwhile. Floating-point tensors of any strides; those of whole numbers, which
    count what a rank itself has done, stay as they are. Nothing is kept from call to call, so a
    site's `every` is up to the caller, and codecs that send later what they leave out are refused.

    Phases, for B bytes of tensors on n ranks:
      1. ranks tell each other their weights and what they came with: 32 n bytes;
      2. a round of `WeightFusion`: 2 (n-1)/n B bytes sent by each, or what the topology says.

    Args:
        axis: a plan of one data or site axis, in any form.
        weight: how much this rank counts, such as its samples; all alike if no rank gives one.
        round: which one this is, for topologies that do other things in each (gossip).
        timeout_s: the deadline of every wait for a peer.

    Raises:
        UserError: there is no process group, tensors cannot be fused, or ranks differ in what they
            came with: on all ranks alike.
        PlanError: the plan has other axes, another size, or a codec that loses something.
        PeerLost: a rank died, or did not come.
    """
    held = [tensors] if isinstance(tensors, Tensor) else _list(tensors)
    device = _device_of(held, group)
    link = _find_link(axis, device, group, timeout_s)
    read, fusion = read_axis(
        "fuse_",
        axis,
        (Data, Site),
        link.size,
        why="tensors are fused over one axis, data or site",
        there="there is 1 rank" if link.size == 1 else f"there are {link.size} ranks",
        ignored=("every",),
    )
    if not fusion.codec.lossless:
        raise PlanError(
            f"fuse_({str(read)!r})",
            f"{fusion.codec} sends later what it leaves out now, and nothing is kept between calls",
            str(type(read)(read.n, rule=read.rule, topology=read.topology)),
        )
    if fusion.rule.of_changes:
        raise PlanError(
            f"fuse_({str(read)!r})",
            f"{fusion.rule} fuses what changed since all were equal, and nothing is kept between "
            "calls",
            str(type(read)(read.n, topology=read.topology)),
        )
    wrong = _find_wrong(held, weight, fusion)
    floating = [tensor for tensor in held if not wrong and tensor.is_floating_point()]
    kinds = [(str(tensor.dtype), tuple(tensor.shape)) for tensor in floating]
    came_with = number_of(f"{read} {round} {weight is None} {kinds}")
    own = 0.0 if wrong else 1.0 if weight is None else float(weight)
    rows = tell(link, device, (host_number(), bool(wrong), came_with, own), "agree on a fusion")
    hosts, wrongs, all_came_with, weights = (list(column) for column in zip(*rows, strict=True))
    if wrong:
        raise UserError(f"fuse_: {wrong}")
    _refuse_differences(link, wrongs, all_came_with)
    if not (total := sum(weights)) > 0:
        raise UserError("fuse_: the weights of all ranks are 0; allowed: at least one above 0")
    if not math.isfinite(total):
        raise UserError(f"fuse_: the sum of the weights {weights} is beyond the range of numbers")
    fuser = Fuser(fusion, link, layout_of(hosts))
    try:
        _shorten(floating, fusion)
        WeightFusion(floating, fuser).fuse([each / total for each in weights], round)
    finally:
        fuser.close()


def _list(tensors: object) -> list[Any]:
    """All that was given; what is no tensor is found later, where other ranks hear of it."""
    if isinstance(tensors, str | bytes | Mapping) or not isinstance(tensors, Iterable):
        tensors = [tensors]
    return list(tensors)


def _find_wrong(tensors: Sequence[Any], weight: Any, fusion: Fusion) -> str:
    """What cannot be fused here, "" if all can. Other ranks hear of it, for they would wait."""
    for number, tensor in enumerate(tensors):
        if not isinstance(tensor, Tensor):
            kind = type(tensor).__name__
            return f"received a {kind}; allowed: a tensor, or a list of them; next: dict.values()"
        if tensor.is_meta:
            return f"tensor {number} is on the meta device, where nothing has a value"
        if tensor.layout != torch.strided:
            return f"tensor {number} is sparse; allowed: dense tensors; next: tensor.to_dense()"
        if hasattr(tensor, "to_local"):
            return f"tensor {number} is cut over ranks; next: pass what is here, tensor.to_local()"
        if any(n > 1 and step == 0 for n, step in zip(tensor.shape, tensor.stride(), strict=True)):
            return f"tensor {number} is expanded: its elements share memory; next: tensor.clone()"
        fits = not tensor.is_complex() and tensor.dtype in SUMMABLE
        if not fits and (tensor.is_complex() or tensor.is_floating_point()):
            return (
                f"tensor {number} is of {tensor.dtype}; allowed: float64, float32, float16, "
                "bfloat16; next: fuse torch.view_as_real(tensor), or a wider copy"
            )
    if weight is None:
        return ""
    if not fusion.topology.exact:
        return f"{fusion.topology} mixes by weights of its own; next: leave weight out"
    try:
        told = math.nan if isinstance(weight, str) else float(weight)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # nor a tensor of several values
        told = math.nan
    return "" if 0 <= told < math.inf else f"weight: received {weight!r}; allowed: 0 or more"


def _refuse_differences(link: Link, wrongs: list[float], came_with: list[float]) -> None:
    """Raise on all ranks alike what only one of them can see."""
    for member, wrong in zip(link.members, wrongs, strict=True):
        if wrong:
            raise UserError(f"fuse_: rank {member} has something that cannot be fused; see there")
    others = [
        str(member)
        for member, what in zip(link.members, came_with, strict=True)
        if what != came_with[0]
    ]
    if others:
        raise UserError(
            f"fuse_: what rank {link.members[0]} came with is not what came from rank "
            f"{', '.join(others)}; allowed: tensors of the same sizes and types in the same order, "
            "the same axis and round, and a weight on every rank or on none"
        )


def _shorten(tensors: Sequence[Tensor], fusion: Fusion) -> None:
    """Where a rule bounds the norm of all that a rank has to say."""
    if isinstance(rule := fusion.rule, SumRule) and rule.needs_norm and tensors:
        squares = [tensor.detach().double().square().sum() for tensor in tensors]
        factor = rule.shrink(math.sqrt(sum(square.item() for square in squares)))
        for tensor in tensors:
            tensor.detach().mul_(factor)


def _device_of(tensors: Sequence[Any], group: dist.ProcessGroup | None) -> torch.device:
    for tensor in tensors:
        if isinstance(tensor, Tensor) and not tensor.is_meta:
            return tensor.device
    queues = dist.is_available() and dist.is_initialized() and dist.get_backend(group) == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if queues else torch.device("cpu")


_links: weakref.WeakKeyDictionary[World, dict[str, Link]] = weakref.WeakKeyDictionary()


def _find_link(
    axis: PlanLike, device: torch.device, group: dist.ProcessGroup | None, timeout_s: float
) -> Link:
    """To all ranks. That of a world is kept: making one takes the time of many fusions."""
    world = current_world() if group is None else None
    if world is not None and world.size > 1:
        links = _links.setdefault(world, {})
        if device.type not in links:
            links[device.type] = link = world.link("fuse_", tuple(range(world.size)), device)
            weakref.finalize(world, link.close).atexit = False
        return links[device.type]
    if dist.is_available() and dist.is_initialized():
        return BorrowedLink(group or dist.group.WORLD, timeout_s=timeout_s)
    if world is not None or as_plan(axis).workers == 1:
        return LoneLink()
    raise UserError(
        "fuse_: there is no process group; next: call torch.distributed.init_process_group first, "
        "or start the script with allfuse run"
    )
