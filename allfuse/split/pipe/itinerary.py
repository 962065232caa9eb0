"""What stages pass to each other, and in which order all ranks begin with it. Pure, no I/O.

Where transfers wait in a queue on each rank until their other side has come to them (NCCL), two
ranks whose queues have the same two transfers in another order wait for each other for ever. So
all ranks begin theirs in one order: that in which a clock has the parcels made. Nobody needs a
parcel before one that is made earlier, or begins to make one that is needed earlier, so that the
first transfer in that order which is not done is next on both of its sides, or will be.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

from allfuse.plan.schedule import Action, Order, time_actions


class Parcel(NamedTuple):
    """What crosses between stage `crossing` and the next: for it, or the gradient back."""

    back: bool
    crossing: int
    microbatch: int

    @property
    def operation(self) -> str:
        what = "gradients" if self.back else "activations"
        return f"pass {what} between stages {self.crossing} and {self.crossing + 1}"

    @property
    def giver(self) -> int:
        """The stage that makes it."""
        return self.crossing + self.back

    @property
    def taker(self) -> int:
        """The stage that needs it."""
        return self.crossing + (not self.back)


Exchange: TypeAlias = tuple[Parcel, ...]
"""A parcel, or two that two ranks give each other at the same time."""


def taken_by(action: Action, stages: int) -> Parcel | None:
    """What an action takes from another stage; None where it takes nothing."""
    kind, stage, microbatch = action
    if kind == "forward":
        return Parcel(False, stage - 1, microbatch) if stage else None
    if kind == "weight" or stage + 1 == stages:
        return None
    return Parcel(True, stage, microbatch)


def parcel_of(action: Action, stages: int) -> Parcel | None:
    """What an action gives to another stage; None where it gives nothing."""
    kind, stage, microbatch = action
    if kind == "forward":
        return Parcel(False, stage, microbatch) if stage + 1 < stages else None
    if kind == "weight" or stage == 0:
        return None
    return Parcel(True, stage - 1, microbatch)


def order_exchanges(
    orders: Sequence[Order], stages: int, owner: Callable[[int], int]
) -> list[list[Exchange]]:
    """What each rank passes on or gets, in the order in which it is to begin with it.

    A parcel goes together with the one that comes from its taker next, where both are next to each
    other for both ranks, and neither is needed to make the other.

    Args:
        orders: what each rank does. owner: the rank that has a stage.
    """
    ends = time_actions(list(orders), stages)
    found: list[list[Exchange]] = [[] for _ in orders]
    taken: set[Parcel] = set()
    for action in sorted(ends, key=lambda each: (ends[each], each)):
        own = taken_by(action, stages)
        if own is not None:
            taken.add(own)
        parcel = parcel_of(action, stages)
        if parcel is None:
            continue
        giver, taker = owner(parcel.giver), owner(parcel.taker)
        if giver == taker:
            continue
        before = found[giver][-1] if found[giver] else ()
        is_between = bool(found[taker]) and found[taker][-1] is before and len(before) == 1
        if is_between and owner(before[0].giver) == taker and before[0] not in taken:
            found[giver][-1] = found[taker][-1] = (*before, parcel)
        else:
            exchange = (parcel,)
            found[giver].append(exchange)
            found[taker].append(exchange)
    return found
