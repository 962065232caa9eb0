"""The one axis of a plan that a loop of others fuses over."""

from __future__ import annotations

from dataclasses import fields
from typing import TypeVar

from allfuse.base.errors import PlanError
from allfuse.fusion.base import Fusion, choose
from allfuse.plan import Axis, Data, Site, as_plan
from allfuse.plan.plan import PlanLike

# What a fusion is made of. All other keywords steer a loop, and here the loop belongs to others.
TAKEN = {"n", "topology", "sync", "codec", "rule"}
WHOSE = "is for a loop of allfuse's own, and this one belongs to others"

A = TypeVar("A", bound=Data | Site)


def read_axis(
    caller: str,
    plan: PlanLike,
    kinds: type[A] | tuple[type[A], ...],
    size: int,
    *,
    why: str,
    there: str,
    ignored: tuple[str, ...] = (),
) -> tuple[A, Fusion]:
    """The axis and its fusion.

    Args:
        caller: who asks, for errors.
        kinds: what kinds of axis can be.
        size: how many ranks there are.
        why: why no other kind can be.
        there: what has so many ranks, as "the process group has 2 ranks".
        ignored: keywords that the caller sees to.

    Raises:
        PlanError: the plan has other axes, another size, or keywords that have no meaning here.
    """
    chosen = as_plan(plan)
    given = f"{caller}({str(chosen)!r})"
    axis: Axis = chosen.axes[0]
    first = kinds[0] if isinstance(kinds, tuple) else kinds
    if len(chosen.axes) != 1 or not isinstance(axis, kinds):
        raise PlanError(given, why, f"{first.name}({size})")
    if axis.n != size:
        raise PlanError(given, there, _again(axis, size, ignored))
    for field in fields(axis):
        if field.name in TAKEN or field.name in ignored:
            continue
        if getattr(axis, field.name) != getattr(type(axis)(axis.n), field.name):
            raise PlanError(given, f"{field.name} {WHOSE}", _again(axis, size))
    if axis.sync.bound != 0:
        raise PlanError(given, f"sync={axis.sync} {WHOSE}", _again(axis, size, without="sync"))
    return axis, choose(axis.rule, axis.topology, axis.sync, axis.codec, axis.n)[0]


def _again(axis: Data | Site, size: int, kept: tuple[str, ...] = (), without: str = "") -> str:
    """The same axis of that size, of the keywords that have a meaning here."""
    has = {field.name for field in fields(axis)}
    names = ((TAKEN | set(kept)) & has) - {"n", without}
    said = {name: getattr(axis, name) for name in names}
    return str(type(axis)(size, **said))
