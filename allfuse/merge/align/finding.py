"""The groups of a module's units, from one pass through it."""

from __future__ import annotations

from typing import Any

from torch import nn

from allfuse.base.errors import MergeError
from allfuse.merge.align.factors import Dim, Factors
from allfuse.merge.align.groups import Cut, Group, Groups, Part, Sight
from allfuse.merge.align.recording import Forward, record, state_of
from allfuse.merge.align.tracing import Result, Trace

UNUSED = "the model does not use it"
SHOWN = 5


def find_groups(module: nn.Module, batch: Any, forward: Forward) -> Groups:
    """The units of a module that can be permuted, by following one pass through it.

    Args:
        batch: samples, at least two, as `forward` takes them.

    Raises:
        MergeError: an operator that nobody knows takes what would move, the pass depends on what it
            computed, or nothing can be permuted; says where.
    """
    state = state_of(module)
    trace = Trace(state, batch, *record(module, batch, forward))
    learned = {name: each for name, each in module.named_parameters() if name in state}
    dims = {name: trace.mark(each).dims for name, each in {**learned, **state}.items()}
    _settle(trace, [dim for own in dims.values() for dim in own])
    found = _Found(trace.factors)
    for name, tensor in state.items():
        if not trace.mark(tensor).is_used:
            for dim in dims[name]:
                trace.factors.freeze(dim, UNUSED)
    for name in learned:
        for place, dim in enumerate(dims[name]):
            found.note(dim, f"{name}[{place}]")
    fixed = {
        f"{name}[{place}]": why
        for name, own in dims.items()
        for place, dim in enumerate(own)
        if (why := trace.factors.why_all(dim)) is not None
    }
    _refuse_unknown(trace, found)
    if not found.groups:
        reasons = "; ".join(f"{name}: {why}" for name, why in list(fixed.items())[:SHOWN])
        raise MergeError(
            f"the model has no hidden units that could be in another order ({reasons}); next: "
            "merge without --align"
        )
    return Groups(
        groups=tuple(found.groups),
        cuts={name: tuple(map(found.cut, own)) for name, own in dims.items()},
        fixed=fixed,
        learned=frozenset(learned),
        sights=_sights(trace.results, found),
    )


class _Found:
    """The factors that move and are in a parameter, each a group."""

    def __init__(self, factors: Factors) -> None:
        self.factors = factors
        self.groups: list[Group] = []
        self.number: dict[int, int] = {}

    def note(self, dim: Dim, title: str) -> None:
        factors = [factor for stretch in self.factors.read(dim) for factor in stretch]
        for part, factor in enumerate(factors, start=1):
            if factor not in self.number and self.factors.reason(factor) is None:
                name = title if len(factors) == 1 else f"{title} part {part}"
                self.number[factor] = len(self.groups)
                self.groups.append(Group(name, self.factors.factor_size(factor)))

    def cut(self, dim: Dim) -> Cut:
        return tuple(
            tuple(Part(self.factors.factor_size(f), self.number.get(f)) for f in stretch)
            for stretch in self.factors.read(dim)
        )


def _settle(trace: Trace, dims: list[Dim]) -> None:
    """Read all once: that freezes what has several parts inside."""
    seen = [dim for result in trace.results for dim in result.dims]
    for dim in (*dims, *seen, *(dim for _, taken in trace.unknown for dim in taken)):
        trace.factors.read(dim)


def _refuse_unknown(trace: Trace, found: _Found) -> None:
    for place, dims in trace.unknown:
        moving = [part.group for dim in dims for parts in found.cut(dim) for part in parts]
        if any(group is not None for group in moving):
            raise MergeError(
                f"{place}: it is not known what this operator does to units in another order, so "
                "the model cannot be aligned; next: merge without --align"
            )


def _sights(results: list[Result], found: _Found) -> tuple[tuple[Sight, ...], ...]:
    """The results in which a group can be compared: where only one dim moves."""
    sights: list[list[Sight]] = [[] for _ in found.groups]
    for result in results:
        cuts = [found.cut(dim) for dim in result.dims]
        moving = [dim for dim, cut in enumerate(cuts) if any(map(_moves, cut))]
        if len(moving) != 1 or len(cuts[moving[0]]) != 1:
            continue
        (parts,) = cuts[moving[0]]
        if any(part.group is None for part in parts):  # perhaps samples, of which there may be less
            continue
        for place, part in enumerate(parts):
            if part.group is not None and parts.count(part) == 1:
                sight = Sight(result.number, result.operator, moving[0], parts, place)
                sights[part.group].append(sight)
    return tuple(map(tuple, sights))


def _moves(parts: tuple[Part, ...]) -> bool:
    return any(part.group is not None for part in parts)
