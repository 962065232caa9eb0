"""Weight matching: the orders in which the weights of two models are most alike.

Ainsworth, Hayase and Srinivasa 2023, "Git Re-Basin", arXiv:2209.04836, section 3.2 and algorithm 1:
sum of <A, P(B)> over all parameters is made as large as it can be, one group at a time with the
others as they are, each time a linear assignment problem. That ends where no group alone gains. We
start twice, from the order that the models have, and from one that follows the layers from the
inputs on, where each group is paired by what is known by then; the better end is taken.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from allfuse.merge.align.assigning import assign
from allfuse.merge.align.groups import Groups, Place

SWEEPS = 100
GAIN = 1e-6
"""What a pairing must gain to count, of the sum: float32 products are that exact."""


def match_weights(
    groups: Groups, reference: Mapping[str, Tensor], other: Mapping[str, Tensor], seed: int = 0
) -> list[Tensor]:
    """The order of each group in which `other` is most like `reference`.

    Unit i of the reference and unit order[i] of the other are alike: `groups.permute(other,
    orders)` puts them there. Takes time by the cube of a group's size in the worst case.

    Args:
        reference, other: the models' tensors, by name.
        seed: of the order in which groups take turns.
    """
    every, ends = range(len(groups.groups)), []
    for from_inputs in (True, False):
        match = Matching(groups, reference, other)
        if from_inputs:
            match.follow_layers(every)
        match.improve(every, seed)
        ends.append(match)
    best = max(ends, key=lambda match: match.total())  # the first of equals
    return best.orders


class Matching:
    """Two models, of which the second is brought into the order of the first.

    Attributes:
        orders: of each group, so far.
    """

    def __init__(
        self,
        groups: Groups,
        reference: Mapping[str, Tensor],
        other: Mapping[str, Tensor],
        orders: Sequence[Tensor] | None = None,
    ) -> None:
        self.groups = groups
        self.orders = groups.identity() if orders is None else list(orders)
        self._reference = {name: reference[name].float() for name in groups.learned}
        start = {name: other[name].float() for name in groups.learned}
        self._now = groups.permute(start, self.orders)
        self._places = [
            [place for place in places if place.tensor in groups.learned]
            for places in groups.places
        ]

    def total(self) -> float:
        """How alike they are: the sum over parameters of <A, B>."""
        return sum(_inner(self._reference[name], self._now[name]) for name in sorted(self._now))

    def follow_layers(self, chosen: Iterable[int]) -> None:
        """Pair each group by what hangs on inputs, or on groups that are paired already. Where
        there is nothing of that, as of heads, by what does not depend on the order of the others:
        the numbers of a unit sorted along them."""
        left = set(chosen)
        while left:
            group, places = self._next(sorted(left))
            self._take(group, assign(self._scores(places, left)))
            left.remove(group)

    def _next(self, left: Sequence[int]) -> tuple[int, list[Place]]:
        """The first group of which something is known, and where; else the first one."""
        for group in left:
            places = [
                place
                for place in self._places[group]
                if not any(others.intersection(left) for others in self._around(place).values())
            ]
            if places:
                return group, places
        return left[0], self._places[left[0]]

    def _around(self, place: Place) -> dict[int, set[int]]:
        """The groups beside one at a place of a tensor, by the dim where `units` has them."""
        found: dict[int, set[int]] = {}
        for dim, cut in enumerate(self.groups.cuts[place.tensor]):
            if dim != place.dim:
                shifted = dim if dim < place.dim else dim + len(place.parts) - 1
                found[shifted] = {
                    part.group for parts in cut for part in parts if part.group is not None
                }
        for at, part in enumerate(place.parts):
            if at != place.part and part.group is not None:
                found[place.dim + at] = {part.group}
        return found

    def improve(self, chosen: Iterable[int], seed: int) -> None:
        """Pair one group after the other anew, until none of those chosen gains by it."""
        chosen = list(chosen)
        generator = torch.Generator().manual_seed(seed)
        for _ in range(SWEEPS):
            turns = torch.randperm(len(chosen), generator=generator).tolist()
            gains = [self._improve(chosen[turn]) for turn in turns]
            if not any(gains):
                break

    def _improve(self, group: int) -> bool:
        scores = self._scores(self._places[group])
        order = assign(scores)
        if torch.equal(order, torch.arange(len(order))):
            return False
        names = sorted({place.tensor for place in self._places[group]})
        before, old, kept = self._sum(names), self.orders[group], dict(self._now)
        self._take(group, order)
        if self._sum(names) > before + GAIN * abs(before):
            return True
        self.orders[group], self._now = old, kept
        return False

    def _sum(self, names: Iterable[str]) -> float:
        return sum(_inner(self._reference[name], self._now[name]) for name in names)

    def _take(self, group: int, order: Tensor) -> None:
        """Bring a group into another order than the one it is in by now."""
        self.orders[group] = self.orders[group][order]
        step = self.groups.identity()
        step[group] = order
        own = {place.tensor: self._now[place.tensor] for place in self._places[group]}
        self._now |= self.groups.permute(own, step)

    def _scores(self, places: Iterable[Place], open_: Collection[int] = ()) -> Tensor:
        """scores[i, j], float64: how alike unit i of the first and unit j of the second are,
        whatever the order of groups that are open."""
        total: Tensor | None = None
        for place in places:
            mixed = [dim for dim, own in self._around(place).items() if own.intersection(open_)]
            one = units(self._reference[place.tensor], place, mixed)
            other = units(self._now[place.tensor], place, mixed)
            part = (one @ other.T).double()
            total = part if total is None else total + part
        assert total is not None  # a group is in a parameter
        return total


def units(tensor: Tensor, place: Place, mixed: Sequence[int] = ()) -> Tensor:
    """The numbers of each unit, (units, all else); sorted along some dims as one, counted when the
    place's own dim is unfolded into its parts."""
    sizes = [part.size for part in place.parts]
    own: Tensor = tensor.narrow(place.dim, place.begin, place.size).unflatten(place.dim, sizes)
    if mixed:
        rest = [dim for dim in range(own.dim()) if dim not in mixed]
        here = rest.index(place.dim + place.part)
        own = own.permute(*rest, *mixed).flatten(len(rest)).sort(-1).values
        own = own.movedim(here, 0)
    else:
        own = own.movedim(place.dim + place.part, 0)
    return own.reshape(len(own), -1)


def _inner(one: Tensor, other: Tensor) -> float:
    return float((one.double() * other.double()).sum())
