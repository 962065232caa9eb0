"""The axes of a plan. An axis says how many, what they share, and what is fused between them.

A keyword is accepted as soon as its behaviour exists: adding one is one field here, or one entry
in the table that its values come from.
"""

# an Option is a descriptor, made once for its field, not a default shared by accident
# ruff: noqa: RUF009

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from allfuse.base.choice import Choice
from allfuse.base.errors import PlanError
from allfuse.codec import CODECS, Codec, Identity
from allfuse.plan.option import Option
from allfuse.plan.pace import refuse_mixing, refuse_pace
from allfuse.plan.pairing import refuse_balance, refuse_out_of_step, refuse_pairing
from allfuse.plan.parse import clip
from allfuse.plan.schedule import SCHEDULES, OneForwardOneBackward, Schedule
from allfuse.rule import RULES, Mean, Rule
from allfuse.sync import SYNCS, Bsp, Sync
from allfuse.sync.outer import OUTERS, Average, Outer
from allfuse.topology import TOPOLOGIES, Topology
from allfuse.topology.central import Central

Promise = Literal["exact", "replayed", "statistical"]

MAX_SIZE = 1_000_000


@dataclass(frozen=True)
class Axis(Choice, ABC):
    """One factor of a plan: `n` ranks, or groups of ranks, in a row.

    Class variables say what kind of axis it is:
        replicates: each of the n is a whole copy of the model (else the n hold one copy together);
        divides_batch: each of the n gets a share of each batch (else each gets all of it);
        place: axes stand in this order, outermost lowest; those of one place in any order;
        executable: this version can train under it.
    """

    n: int

    replicates: ClassVar[bool] = False
    divides_batch: ClassVar[bool] = False
    place: ClassVar[int] = 3
    executable: ClassVar[bool] = False

    def __post_init__(self) -> None:
        size: object = self.n
        if type(size) is int and 1 <= size <= MAX_SIZE:
            return
        raise PlanError(
            f"{self.name}({clip(repr(size), 40)})",
            f"n must be a whole number from 1 to {MAX_SIZE:,}",
            f"{self.name}({_nearest_size(size)})",
        )

    @property
    def promise(self) -> Promise:
        """What this axis alone promises of the numbers that come out."""
        return "exact"

    @abstractmethod
    def explain(self) -> str:
        """One sentence on what is shared and what is fused, when and how, without its full stop."""


@dataclass(frozen=True, kw_only=True)
class Data(Axis):
    """Replicas that share each batch; their gradients are fused every step.

    `balance` says how a batch is shared out: "even", or by measured "speed".

    >>> str(Data(4, codec="identity"))
    'data(4)'
    """

    name: ClassVar[str] = "data"
    replicates: ClassVar[bool] = True
    divides_batch: ClassVar[bool] = True
    place: ClassVar[int] = 2
    executable: ClassVar[bool] = True

    topology: Option[Topology | None] = Option(TOPOLOGIES, None)
    sync: Option[Sync] = Option(SYNCS, Bsp())
    codec: Option[Codec] = Option(CODECS, Identity())
    rule: Option[Rule] = Option(RULES, Mean())
    balance: str = "even"
    min: int | None = None
    max: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _refuse_meaningless(self)
        refuse_balance(str(self), self.n, self.balance, self.has_roles)
        if self.rule.of_changes:
            size = _nearest_size(self.n)
            raise PlanError(
                f"{self.name}({size}, rule={self.rule})",
                f"{self.rule} fuses what weights have become since all were equal, and gradients "
                "are fused every step",
                f"site({size}, every=20, rule={self.rule})",
            )
        if self.topology is not None and not self.topology.exact:
            raise PlanError(
                f"{self.name}({clip(repr(self.n), 20)}, topology={self.topology})",
                "replicas that share each batch must end each step with the same gradient, and "
                f"{self.topology.name} only mixes",
                f"site({_nearest_size(self.n)}, topology={self.topology})",
            )

    @property
    def has_roles(self) -> bool:
        """Whether a scheduler and servers run it: it is out of step, or names its servers."""
        return _has_roles(self)

    @property
    def promise(self) -> Promise:
        exact = self.sync.bound == 0 and self.codec.lossless and isinstance(self.rule, Mean)
        return "exact" if exact else "replayed"

    def explain(self) -> str:
        if self.n == 1:
            return "one replica takes each batch; there are no other gradients to fuse"
        how = ", in parts as large as they are fast" if self.balance == "speed" else ""
        return (
            f"{self.n} replicas share each batch{how}; every step their gradients are "
            f"{_explain_fusion(self)}. Each counts as much as the samples (or tokens) behind it"
        )


@dataclass(frozen=True, kw_only=True)
class Site(Axis):
    """Replicas that share the data and step on their own; their weights are fused now and then.

    `every` is the number of steps from one fusion to the next, or "end" for one at the end.
    `fragments` is how many parts of the model are fused by themselves, at staggered steps; `delay`
    is how many steps go on while a part is fused, before what comes out is taken in.

    >>> str(Site(4, every=50, fragments=5, delay=3))
    'site(4, every=50, fragments=5, delay=3)'
    """

    name: ClassVar[str] = "site"
    replicates: ClassVar[bool] = True
    divides_batch: ClassVar[bool] = True
    place: ClassVar[int] = 1
    executable: ClassVar[bool] = True

    every: int | Literal["end"] = 1
    outer: Option[Outer] = Option(OUTERS, Average())
    fragments: int = 1
    delay: int = 0
    topology: Option[Topology | None] = Option(TOPOLOGIES, None)
    sync: Option[Sync] = Option(SYNCS, Bsp())
    codec: Option[Codec] = Option(CODECS, Identity())
    rule: Option[Rule] = Option(RULES, Mean())
    min: int | None = None
    max: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _refuse_meaningless(self)
        if not self.rule.fuses_weights:
            size = _nearest_size(self.n)
            raise PlanError(
                f"{self.name}({size}, rule={self.rule})",
                f"sites fuse weights, and {self.rule} has a meaning for gradients only",
                f"data({size}, rule={self.rule})",
            )
        every: object = self.every
        if every != "end" and not (type(every) is int and every >= 1):
            raise PlanError(
                f"{self.name}({self.n}, every={clip(repr(every), 40)})",
                "every must be a whole number of steps from 1, or the word end",
                f"{self.name}({self.n}, every=1)",
            )
        if every == "end" and self.has_roles:
            raise PlanError(
                f"{self.name}({self.n}, every=end, sync={self.sync})",
                "weights that are fused once, at the end, have nobody to be ahead of",
                f"{self.name}({self.n}, every=end)",
            )
        refuse_pace(str(self), self.n, self.every, self.fragments, self.delay, self.has_roles)
        if self.topology is not None and not self.topology.exact:
            refuse_mixing(str(self), self.n, self.topology, self.outer, self.fragments, self.delay)

    @property
    def has_roles(self) -> bool:
        """Whether a scheduler and servers run it: it is out of step, or names its servers."""
        return _has_roles(self)

    @property
    def promise(self) -> Promise:
        return "replayed"

    def explain(self) -> str:
        when = {1: "after every step", "end": "once, at the end,"}
        if self.n == 1:
            return "one site takes each batch; there are no other weights to fuse"
        text = (
            f"{self.n} sites share each batch and step on their own, each with its own optimizer "
            f"state; {when.get(self.every, f'after every {self.every} steps')} their weights are "
            f"{_explain_fusion(self)}"
        )
        if not isinstance(self.outer, Average):
            text += f", and the outer optimizer {self.outer} steps from there"
        if self.fragments > 1:
            text += f", in {self.fragments} fragments of whole tensors at staggered steps"
        if self.delay:
            text += (
                f", in the background: {_count(self.delay, 'step')} later what comes out becomes "
                "the mean of itself and of what the site has come to meanwhile"
            )
        return text


@dataclass(frozen=True, kw_only=True)
class Member(Axis):
    """Models that each see all the data; their predictions are fused when predicting."""

    name: ClassVar[str] = "member"
    replicates: ClassVar[bool] = True
    place: ClassVar[int] = 0

    def explain(self) -> str:
        return (
            f"{_count(self.n, 'model')} of the same kind, each trained on all the data by workers "
            "of its own; nothing is fused while training, their predictions are when predicting"
        )


@dataclass(frozen=True, kw_only=True)
class Tensor(Axis):
    """One model cut inside its layers."""

    name: ClassVar[str] = "tensor"
    executable: ClassVar[bool] = True

    def explain(self) -> str:
        return f"one model is cut inside its layers into {_count(self.n, 'slice')}, one per rank"


@dataclass(frozen=True, kw_only=True)
class Pipe(Axis):
    """One model cut between its layers.

    `microbatches` is the number that each replica's share of a batch is cut into; None derives it.

    >>> str(Pipe(4, schedule="interleaved(3)", microbatches=8))
    'pipe(4, schedule=interleaved(stages=3), microbatches=8)'
    """

    name: ClassVar[str] = "pipe"
    executable: ClassVar[bool] = True

    schedule: Option[Schedule] = Option(SCHEDULES, OneForwardOneBackward())
    microbatches: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        count: object = self.microbatches
        if count is None:
            return
        given = f"pipe({self.n}, schedule={self.schedule}, microbatches={clip(repr(count), 40)})"
        if not (type(count) is int and 1 <= count <= MAX_SIZE):
            why = f"microbatches is a whole number from 1 to {MAX_SIZE:,}"
            raise PlanError(given, why, f"pipe({self.n}, microbatches={4 * self.n})")
        most = self.schedule.most(count, self.n)
        if most != count:
            why = (
                f"{self.schedule} takes microbatches in {count // self.n} rounds of as many each, "
                f"and {count} cannot be cut so"
            )
            nearest = replace(self, microbatches=most)
            raise PlanError(given, why, str(nearest))

    @property
    def teller(self) -> int:
        """Where on the axis the last stage is, and so what the model gives."""
        return self.schedule.owner(self.n * self.schedule.each - 1, self.n)

    def explain(self) -> str:
        if self.n == 1:
            return "one rank has all layers; there are no other stages to pass microbatches to"
        each = self.schedule.each
        stages = f"{_count(self.n * each, 'stage')}, {'one' if each == 1 else each} per rank"
        count = "" if self.microbatches is None else f"{self.microbatches} "
        return (
            f"one model is cut between its layers into {stages}; {count}microbatches flow through "
            f"them in the order of {self.schedule.name}"
        )


@dataclass(frozen=True, kw_only=True)
class Shard(Axis):
    """One model whose state is cut evenly; its ranks share each batch.

    `offload` keeps that state in the memory of the host, where the optimizer then steps.

    >>> str(Shard(4, offload=True))
    'shard(4, offload=true)'
    """

    name: ClassVar[str] = "shard"
    divides_batch: ClassVar[bool] = True
    executable: ClassVar[bool] = True

    offload: bool = False

    def explain(self) -> str:
        return (
            "the parameters, gradients and optimizer state of one model are cut evenly into "
            f"{_count(self.n, 'shard')}, one per rank, and its ranks share each batch; blocks of "
            "the model are brought together when they run"
            + ("; they are kept in the memory of the host" if self.offload else "")
        )


AXES: dict[str, type[Axis]] = {
    "data": Data,
    "site": Site,
    "member": Member,
    "tensor": Tensor,
    "pipe": Pipe,
    "shard": Shard,
}


def _refuse_meaningless(axis: Data | Site) -> None:
    """Refuse choices of an axis that have no meaning together."""
    refuse_pairing(axis.rule, axis.topology, axis.codec, axis.sync)
    refuse_out_of_step(axis.name, axis.n, axis.sync, axis.topology, axis.rule, axis.codec)
    for name, value, low, high in (
        ("min", axis.min, 1, axis.n),
        ("max", axis.max, axis.n, MAX_SIZE),
    ):
        if value is not None and not (type(value) is int and low <= value <= high):
            raise PlanError(
                f"{axis.name}({axis.n}, {name}={clip(repr(value), 40)})",
                f"{name} is a whole number of replicas from {low:,} to {high:,}, with n between "
                "min and max",
                f"{axis.name}({axis.n}, {name}={axis.n})",
            )
    if axis.max is not None and not axis.has_roles:
        raise PlanError(
            f"{axis.name}({axis.n}, min={axis.min or axis.n}, max={axis.max or axis.n})",
            "replicas can join only where a scheduler hands out the work",
            f"{axis.name}({axis.n}, topology=central, sync=asp, min={axis.min or axis.n}, "
            f"max={axis.max or axis.n})",
        )


def _has_roles(axis: Data | Site) -> bool:
    named = isinstance(axis.topology, Central) and axis.topology.servers is not None
    return axis.sync.bound != 0 or named


def _explain_fusion(axis: Data | Site) -> str:
    """How an axis fuses, from what its choices declare: "averaged, over native"."""
    parts = ["averaged" if isinstance(axis.rule, Mean) else f"fused by {axis.rule}"]
    if axis.sync.bound is None:
        parts.append("each as it is ready")
    elif axis.sync.bound > 0:
        parts.append(f"at most {_count(axis.sync.bound, 'step')} apart")
    if axis.has_roles and axis.topology is not None and not axis.topology.exact:
        parts.append(f"in pairs and in the background, over {axis.topology}")
    elif axis.has_roles:
        parts.append("by servers")
    elif axis.topology is None:
        parts.append("over a topology that is picked when training starts")
    else:
        parts.append(f"over {axis.topology}")
    if not isinstance(axis.codec, Identity):
        loss = "without loss" if axis.codec.lossless else "with loss"
        parts.append(f"encoded by {axis.codec} ({loss})")
    return ", ".join(parts)


def _count(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _nearest_size(size: object) -> int:
    if not isinstance(size, int | float | str):
        return 1
    try:
        return min(max(int(size), 1), MAX_SIZE)
    except (ValueError, OverflowError):
        return 1
