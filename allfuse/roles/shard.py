"""One server's slices of all tensors, and the optimizers that step them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from allfuse.base.errors import CheckpointError
from allfuse.roles.blueprint import Blueprint
from allfuse.roles.cutting import Piece, Span, cut
from allfuse.roles.elementwise import find_class, from_plain, make_optimizer
from allfuse.roles.pool import Pool

Options: TypeAlias = Sequence[Mapping[str, Any]]
"""For each group, those options that are not the blueprint's."""

Values: TypeAlias = tuple[Tensor, ...]
"""One tensor (elements,) for each span of a piece."""


class Slice:
    """A span with the optimizer that steps it: its own, so that pieces are stepped one by one."""

    def __init__(self, span: Span, blueprint: Blueprint) -> None:
        block = blueprint.blocks[span.block]
        self.span, self.group, self.dtype = span, block.group, block.dtype
        self.options = blueprint.groups[block.group].options
        self.parameter = Parameter(torch.zeros(span.elements, dtype=block.dtype))
        found = find_class(blueprint.groups[block.group].optimizer)
        assert found is not None
        self.optimizer: Optimizer = make_optimizer(found, self.options, self.parameter)
        self._pool = Pool(span.elements, block.dtype)
        self._copy: Tensor | None = None

    def put(self, values: Tensor) -> None:
        self.parameter.detach().copy_(values)
        self._copy = None

    def step(self, gradient: Tensor, options: Mapping[str, Any]) -> None:
        self.optimizer.param_groups[0].update(from_plain({**self.options, **options}))
        self.parameter.grad = gradient
        self.optimizer.step()
        self.parameter.grad = None
        self._copy = None

    def copy(self) -> Tensor:
        """The weights as they are now, which later steps leave alone."""
        if self._copy is None:
            self._copy = self._pool.take().copy_(self.parameter.detach())
        return self._copy

    @property
    def state(self) -> dict[str, Tensor]:
        """What the optimizer keeps: (elements,) for each element, () for all."""
        kept = self.optimizer.state[self.parameter] if self.optimizer.state else {}
        return {name: value for name, value in kept.items() if isinstance(value, Tensor)}

    def restore(self, weights: Tensor, state: Mapping[str, Tensor]) -> None:
        self.put(weights)
        self.optimizer.state[self.parameter] = {name: kept.clone() for name, kept in state.items()}


class Shard:
    """What server `index` of `servers` holds, in pieces.

    Example:
        shard = Shard(blueprint, 0, 1)
        shard.put(0, weights)
        shard.update(0, [(1.0, gradients)], [])
        copies = shard.copy(0)
    """

    def __init__(self, blueprint: Blueprint, index: int, servers: int) -> None:
        self.blueprint, self.index, self.servers = blueprint, index, servers
        self.pieces: list[Piece] = cut(blueprint.blocks, servers)[index]
        self.slices = [[Slice(span, blueprint) for span in piece] for piece in self.pieces]

    def put(self, piece: int, values: Values) -> None:
        for each, given in zip(self.slices[piece], values, strict=True):
            each.put(given)

    @torch.no_grad()
    def update(self, piece: int, pushes: Sequence[tuple[float, Values]], options: Options) -> None:
        """One step of a piece by the weighted sum of pushes, added up in their order.

        Sums are taken in float32 or wider. What was pushed is left as it is.
        """
        for place, each in enumerate(self.slices[piece]):
            parts = [(weight, values[place]) for weight, values in pushes]
            changed = options[each.group] if options else {}
            each.step(_weighted_sum(parts).to(each.dtype), changed)

    def copy(self, piece: int) -> Values:
        return tuple(each.copy() for each in self.slices[piece])

    def capture(self) -> dict[str, Tensor]:
        """Weights and states by name, those of a block end to end: live tensors where possible."""
        tensors: dict[str, Tensor] = {}
        for number, slices in self._by_block().items():
            weights = [each.parameter.detach() for each in slices]
            tensors[f"{number}/weights"] = torch.cat(weights)
            for name, kept in slices[0].state.items():
                whole = torch.cat([each.state[name] for each in slices]) if kept.dim() else kept
                tensors[f"{number}/state/{name}"] = whole
        return tensors

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take back what `capture` gave, of an equal blueprint cut alike.

        Raises:
            CheckpointError: it is of something else; weights may have changed by then.
        """
        try:
            for number, slices in self._by_block().items():
                sizes = [each.span.elements for each in slices]
                weights = tensors[f"{number}/weights"].split_with_sizes(sizes)
                start = f"{number}/state/"
                states: list[dict[str, Tensor]] = [{} for _ in slices]
                for name, kept in tensors.items():
                    if name.startswith(start):
                        parts = kept.split_with_sizes(sizes) if kept.dim() else [kept] * len(slices)
                        for state, part in zip(states, parts, strict=True):
                            state[name.removeprefix(start)] = part
                for each, own, state in zip(slices, weights, states, strict=True):
                    each.restore(own, state)
        except (KeyError, RuntimeError, ValueError) as error:
            raise CheckpointError(f"a server's shard of another model: {error}") from error

    def _by_block(self) -> dict[int, list[Slice]]:
        found: dict[int, list[Slice]] = {}
        for slices in self.slices:
            for each in slices:
                found.setdefault(each.span.block, []).append(each)
        return found


def _weighted_sum(parts: Sequence[tuple[float, Tensor]]) -> Tensor:
    """In float32 or wider; the part itself where there is one that counts whole."""
    (weight, first), *rest = parts
    if not rest and weight == 1.0:
        return first
    total = first.to(torch.promote_types(first.dtype, torch.float32)) * weight
    for weight, values in rest:
        total.add_(values, alpha=weight)
    return total
