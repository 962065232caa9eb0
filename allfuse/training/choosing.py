"""Topologies that plans leave open: measured once, recorded, and the same when a run is resumed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from allfuse.link.costs import Costs

if TYPE_CHECKING:
    from torch import Tensor

    from allfuse.fusion.auto import Auto


def settle(auto: Auto, blocks: Iterable[Tensor], recorded: Mapping[str, Any]) -> str:
    """Pick a topology for each block; what was picked and why, for people.

    `recorded` is what `record_of` gave when the run was begun. It counts where the ranks stand on
    hosts as they did then; elsewhere the links are measured anew.
    """
    if recorded.get("hosts") == _places(auto):
        auto.costs = Costs.from_numbers(recorded["numbers"])
        auto.tried = {(size, width): name for size, width, name in recorded.get("tried", ())}
    picks = [auto.settle(block) for block in blocks]
    told = list(dict.fromkeys(pick.why for pick in sorted(picks, key=lambda pick: -pick.elements)))
    text = ". ".join(told[:MOST_TOLD])
    if len(told) > MOST_TOLD:
        text += f". And {len(told) - MOST_TOLD} more"
    if auto.measured_s is not None:
        text += f". The links were measured in {auto.measured_s:.1f} s"
    return text


def record_of(auto: Auto) -> dict[str, Any]:
    """What a run keeps, so that resuming picks the same."""
    numbers = [] if auto.costs is None else auto.costs.numbers()
    tried = [[*key, name] for key, name in auto.tried.items()]
    return {"hosts": _places(auto), "numbers": numbers, "tried": tried}


def _places(auto: Auto) -> list[list[int]]:
    return [list(group) for group in auto.layout.by_host]


MOST_TOLD = 3
