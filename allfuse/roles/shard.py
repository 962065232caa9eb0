"""One server's slices of all tensors, in pieces."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from allfuse.base.errors import CheckpointError
from allfuse.roles.blueprint import Blueprint
from allfuse.roles.cutting import Piece, cut, cut_at_grains
from allfuse.roles.slices import Options, Slice, Values

__all__ = ["Options", "Shard", "Values"]


class Shard:
    """What server `index` of `servers` holds, in pieces.

    Example:
        shard = Shard(blueprint, 0, 1)
        shard.put(0, weights)
        shard.update(0, [(1.0, gradients)], [])
        weights = shard.read(0)
    """

    def __init__(self, blueprint: Blueprint, index: int, servers: int) -> None:
        self.blueprint, self.index, self.servers = blueprint, index, servers
        self.pieces: list[Piece] = cut(blueprint.blocks, servers)[index]
        at_grains = cut_at_grains(blueprint.blocks, servers)
        self.slices = [
            [Slice(span, blueprint, at_grains=at_grains[span.block]) for span in piece]
            for piece in self.pieces
        ]

    def put(self, piece: int, values: Values) -> None:
        for each, given in zip(self.slices[piece], values, strict=True):
            each.put(given)

    @torch.no_grad()
    def update(
        self,
        piece: int,
        pushes: Sequence[tuple[float, Values]],
        options: Options,
        factor: float = 1.0,
    ) -> None:
        """One step of a piece by the weighted sum of pushes, added up in their order.

        Sums are taken in float32 or wider. What was pushed is left as it is.

        Args:
            factor: of gradients, that shortens them; changes stay as they are.
        """
        for place, each in enumerate(self.slices[piece]):
            scale = 1.0 if self.blueprint.pushes_changes(each.span.block) else factor
            parts = [(weight * scale, values[place]) for weight, values in pushes]
            changed = options[each.group] if options else {}
            each.step(weighted_sum(parts).to(each.dtype), changed)

    def read(self, piece: int) -> Values:
        """The weights of a piece as they are now, without a copy: later steps leave them alone."""
        return tuple(each.read() for each in self.slices[piece])

    def capture(self, piece: int) -> dict[str, Tensor]:
        """Weights and states of a piece by name, without a copy: later steps leave them alone."""
        return {
            f"{place}/{name}": tensor
            for place, each in enumerate(self.slices[piece])
            for name, tensor in each.capture().items()
        }

    def restore(self, piece: int, tensors: Mapping[str, Tensor]) -> None:
        """Take back what `capture` gave, of an equal blueprint cut alike.

        Raises:
            CheckpointError: it is of something else; weights may have changed by then.
        """
        found: list[dict[str, Tensor]] = [{} for _ in self.slices[piece]]
        try:
            for name, tensor in tensors.items():
                place, _, rest = name.partition("/")
                found[int(place)][rest] = tensor
            for each, own in zip(self.slices[piece], found, strict=True):
                each.restore(own)
        except (KeyError, IndexError, RuntimeError, ValueError) as error:
            raise CheckpointError(f"a server's shard of another model: {error!r}") from error


def weighted_sum(parts: Sequence[tuple[float, Tensor]]) -> Tensor:
    """In their order, in float32 or wider; the part itself where one alone counts whole."""
    (weight, first), *rest = parts
    if not rest and weight == 1.0:
        return first
    total = first.to(torch.promote_types(first.dtype, torch.float32)) * weight
    for weight, values in rest:
        total.add_(values, alpha=weight)
    return total
