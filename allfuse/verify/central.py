"""The weights of a run with servers, as one process holds and steps them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from allfuse.roles.blueprint import Blueprint
from allfuse.roles.cutting import Block, cut_at_grains, view_all
from allfuse.roles.elementwise import find_class, from_plain, is_per_element, to_text

Named: TypeAlias = dict[str, Tensor]


class Central:
    """The weights that updates are applied to: whole tensors, end to end in blocks with an
    optimizer each, as a plain script would make it.

    It takes torch's fused steps where servers do. They round the last elements of what they are
    given otherwise, so that blocks are stepped whole.
    """

    def __init__(self, blueprint: Blueprint, model: nn.Module, servers: int) -> None:
        self.blueprint = blueprint
        named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        self._flats = [
            Parameter(torch.cat([named[name].detach().reshape(-1) for name in block.names]))
            for block in blueprint.blocks
        ]
        self.weights = view_all(blueprint.blocks, [flat.detach() for flat in self._flats])
        fused = cut_at_grains(blueprint.blocks, servers)
        self._optimizers = list(map(self._optimizer, blueprint.blocks, self._flats, fused))

    def _optimizer(self, block: Block, flat: Parameter, at_grains: bool) -> torch.optim.Optimizer:
        group = self.blueprint.groups[block.group]
        made: Any = find_class(group.optimizer)
        text = to_text(group.options)
        fused = at_grains and is_per_element(group.optimizer, text, block.dtype, fused=True)
        how = {"fused": True} if fused else {}
        optimizer: torch.optim.Optimizer = made([flat], **from_plain(group.options), **how)
        return optimizer

    @torch.no_grad()
    def apply(
        self,
        updates: Sequence[tuple[float, Named]],
        options: list[dict[str, Any]],
        factor: float = 1.0,
        averaged: Mapping[int, float] | None = None,
    ) -> None:
        """One step of what is in them by the weighted sum of updates.

        Args:
            options: of each group whose gradients are pushed; the others' are the blueprint's.
            factor: of gradients.
            averaged: fragments that are averaged, without an outer step, and at which rate.
        """
        each = zip(self.blueprint.blocks, self._flats, self._optimizers, strict=True)
        for block, flat, optimizer in each:
            if block.names[0] not in updates[0][1]:
                continue
            scale, group = 1.0, self.blueprint.groups[block.group]
            if group.pushed == "gradient":
                optimizer.param_groups[0].update(from_plain(options[block.group]))
                scale = factor
            else:
                optimizer.param_groups[0].update(from_plain(group.options))
            if averaged and block.fragment in averaged:
                plain = {"lr": averaged[block.fragment], "momentum": 0.0, "nesterov": False}
                optimizer.param_groups[0].update(plain)
            summed = [
                add_up([(weight * scale, values[name]) for weight, values in updates])
                for name in block.names
            ]
            flat.grad = torch.cat([values.reshape(-1).to(block.dtype) for values in summed])
            optimizer.step()

    def norm(self, updates: Sequence[tuple[float, Named]]) -> float:
        """Of the weighted sum of gradients."""
        names = [
            name
            for block in self.blueprint.blocks
            if self.blueprint.groups[block.group].pushed == "gradient"
            for name in block.names
        ]
        summed = [add_up([(weight, values[name]) for weight, values in updates]) for name in names]
        return float(torch.nn.utils.get_total_norm(summed))

    def copy(self) -> Named:
        return {name: weight.clone() for name, weight in self.weights.items()}


def add_up(parts: Sequence[tuple[float, Tensor]]) -> Tensor:
    """The weighted sum, in float32 or wider, in this order."""
    (weight, first), *rest = parts
    if not rest and weight == 1.0:
        return first
    total = first.to(torch.promote_types(first.dtype, torch.float32)) * weight
    for weight, values in rest:
        total.add_(values, alpha=weight)
    return total
