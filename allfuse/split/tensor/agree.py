"""Which of the regions that were found can be cut beside each other, and beside all else that the
model calls."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from allfuse.split.record import Call, Recording, argument_leaves
from allfuse.split.tensor.cut import Cut
from allfuse.split.tensor.maps import Map

if TYPE_CHECKING:
    from allfuse.split.tensor.search import Region

VIEWS = ("__get__", "detach", "view", "reshape", "t", "transpose", "permute", "__getitem__")
"""Functions of torch, by name, that give other sights of a tensor's memory; `__get__` is .data."""


def edited(recording: Recording) -> dict[str, str]:
    """Parameters that the forward pass changes in place, which it would do to a piece alone."""
    same = dict(recording.parameters)  # values that share memory with parameters
    found: dict[str, str] = {}
    for call in recording.calls:
        held = same.get(call.inputs[0]) if call.inputs else None
        if held is not None and (call.in_place or call.name in VIEWS):
            same |= dict.fromkeys(call.outputs, held)
            if call.in_place:
                found[held] = f"{call.module or 'the model'} changes it in place"
    return found


def agreeing(regions: list[Region], maps: Mapping[int, Map], why: dict[int, str]) -> list[Region]:
    """Regions whose weights are cut in one way wherever they are used. Of others `why` is told, by
    the index of each call of a map."""
    calls: dict[str, list[int]] = {}
    for index, each in maps.items():
        calls.setdefault(each.weight, []).append(index)
    while True:
        used: dict[str, dict[int, Cut]] = {}
        along: dict[str, set[Cut | None]] = {}
        for region in regions:
            for each, cut in [*region.columns, *region.rows]:
                used.setdefault(each.weight, {})[each.call.index] = cut
            for name, cut in region.cuts.items():
                along.setdefault(name, set()).add(cut)
            for name in region.partial:
                along.setdefault(name, set()).add(None)
        bad = {
            name
            for name, cuts in used.items()
            if len(set(cuts.values())) > 1 or set(cuts) != set(calls[name])
        }
        bad |= {name for name, cuts in along.items() if len(cuts) > 1 or name in used}
        kept = [region for region in regions if not bad.intersection(_names(region))]
        if len(kept) == len(regions):
            return regions
        for region in regions:
            if region not in kept:
                for each, _ in [*region.columns, *region.rows]:
                    why[each.call.index] = (
                        "a weight of it is used in several places, which cannot all be cut"
                    )
        regions = kept


def telling_apart(regions: list[Region], recording: Recording, why: dict[int, str]) -> list[Region]:
    """Regions whose sizes are seen in calls of theirs alone: arguments are corrected by the module,
    the function and what they say. Of others `why` is told."""
    calls: dict[tuple[str, str], list[Call]] = {}
    for call in recording.calls:
        calls.setdefault((call.module, call.name), []).append(call)
    while True:
        known = {(c.index, place) for region in regions for c, place, _ in region.sizes}
        kept = []
        for region in regions:
            other = next(
                (
                    other
                    for call, place, size in region.sizes
                    for other in calls[call.module, call.name]
                    if (other.index, place) not in known and _says(other, place, size.whole)
                ),
                None,
            )
            if other is None:
                kept.append(region)
                continue
            for each, _ in [*region.columns, *region.rows]:
                why[each.call.index] = (
                    f"{said(other)} is called with the same sizes for what is cut and for "
                    "what is not"
                )
        if len(kept) == len(regions):
            return regions
        regions = kept


def _names(region: Region) -> set[str]:
    weights = {each.weight for each, _ in [*region.columns, *region.rows]}
    return weights | set(region.cuts) | region.partial


def _says(call: Call, place: int, size: int) -> bool:
    """Whether an argument of a call is a number."""
    given = argument_leaves(call.arguments)
    return place < len(given) and type(given[place]) is int and given[place] == size


def said(call: Call) -> str:
    return f"{call.name.strip('_')} in {call.module or 'the model'}"
