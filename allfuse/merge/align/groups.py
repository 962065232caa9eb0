"""Which units of a model can be permuted, and where in its tensors they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor


@dataclass(frozen=True)
class Group:
    """Units that are in one order: the hidden units of a layer, channels, heads.

    Attributes:
        name: the first place where they are, such as "0.weight[0]" for dim 0 of that tensor; or
            "query.weight[0] part 1", where that dim has several parts.
        size: how many.
    """

    name: str
    size: int


@dataclass(frozen=True)
class Part:
    """A factor of a stretch of a dim: `group` is None where it stays as it is."""

    size: int
    group: int | None


Cut = tuple[tuple[Part, ...], ...]
"""A dim as stretches that lie end to end, each a product of parts, the outermost first."""


@dataclass(frozen=True)
class Place:
    """Where a group is in a tensor: in `stretch` of `dim`, from `begin`, as its part `part`."""

    tensor: str
    dim: int
    begin: int
    parts: tuple[Part, ...]
    part: int

    @property
    def size(self) -> int:
        return prod(part.size for part in self.parts)


@dataclass(frozen=True)
class Sight:
    """Where a group can be seen at work: in the result of a call of an operator.

    Attributes:
        number: of the call, among those that are no views. operator: its name.
        dim: of the result, in which no other dim has a group; `parts` of it, the group is `part`.
    """

    number: int
    operator: str
    dim: int
    parts: tuple[Part, ...]
    part: int

    @property
    def size(self) -> int:
        return prod(part.size for part in self.parts)


@dataclass(frozen=True)
class Groups:
    """What can be permuted.

    Attributes:
        cuts: of each tensor, by name, how its dims are cut.
        fixed: dims that no group is in, such as "0.weight[1]", and why.
        learned: the names of parameters; other tensors are buffers.
        sights: of each group, the results in which it can be seen, in order.
        places: of each group, where it is.
    """

    groups: tuple[Group, ...]
    cuts: Mapping[str, tuple[Cut, ...]]
    fixed: Mapping[str, str]
    learned: frozenset[str]
    sights: tuple[tuple[Sight, ...], ...]
    places: tuple[tuple[Place, ...], ...] = field(init=False)

    def __post_init__(self) -> None:
        places: list[list[Place]] = [[] for _ in self.groups]
        for name, cuts in self.cuts.items():
            for dim, cut in enumerate(cuts):
                begin = 0
                for parts in cut:
                    for place, part in enumerate(parts):
                        if part.group is not None:
                            places[part.group].append(Place(name, dim, begin, parts, place))
                    begin += prod(part.size for part in parts)
        object.__setattr__(self, "places", tuple(map(tuple, places)))

    def identity(self) -> list[Tensor]:
        """Each group in the order it is in."""
        return [torch.arange(group.size) for group in self.groups]

    def random(self, generator: torch.Generator) -> list[Tensor]:
        """Each group in a random order."""
        return [torch.randperm(group.size, generator=generator) for group in self.groups]

    def permute(self, tensors: Mapping[str, Tensor], orders: Sequence[Tensor]) -> dict[str, Tensor]:
        """The same model with its units in other orders: unit i becomes what unit order[i] was.

        Args:
            tensors: by name; those that no group is in are given back as they are.
        """
        made = dict(tensors)
        for name, cuts in self.cuts.items():
            for dim, cut in enumerate(cuts if name in made else ()):
                if any(part.group is not None for parts in cut for part in parts):
                    order = order_of(cut, orders)
                    if not torch.equal(order, torch.arange(len(order))):
                        made[name] = made[name].index_select(dim, order)
        return made


def order_of(cut: Cut, orders: Sequence[Tensor]) -> Tensor:
    """The order of a dim's places that those of the groups make."""
    stretches, begin = [], 0
    for parts in cut:
        own = torch.zeros(1, dtype=torch.int64)
        for part in parts:
            inner = torch.arange(part.size) if part.group is None else orders[part.group]
            own = (own[:, None] * part.size + inner).flatten()
        stretches.append(own + begin)
        begin += len(own)
    return torch.cat(stretches)
