"""The weights of a run with servers, as one process holds and steps them."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from allfuse.roles.blueprint import Blueprint
from allfuse.roles.cutting import Span, cut_at_grains, cut_shards, view_all
from allfuse.roles.elementwise import find_class, from_plain, is_per_element, to_text
from allfuse.verify.layout import Layout

Named: TypeAlias = dict[str, Tensor]
State: TypeAlias = list[tuple[Tensor, dict[str, Any]]]
"""The weights of each run of elements, and what its optimizer keeps."""

WHOLE = -1  # in place of a shard


@dataclass
class Run:
    """Elements of a block that are stepped as one. shard: that they are of."""

    shard: int
    span: Span
    weights: Parameter
    optimizer: torch.optim.Optimizer


class Central:
    """The weights that updates are applied to: whole tensors, end to end in blocks with an
    optimizer each, as a plain script would make it.

    It takes torch's fused steps where servers do. They round the last elements of what they are
    given otherwise, so that blocks are stepped whole.

    Args:
        layout: what is end to end in its blocks.
        by_shard: each server's part of a block has an optimizer of its own, since some of them were
            set back to earlier steps.
    """

    def __init__(
        self, layout: Layout, model: nn.Module, servers: int, *, by_shard: bool = False
    ) -> None:
        self.layout = layout
        self.blueprint = blueprint = layout.blueprint
        whole = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        named = layout.part({name: tensor.detach() for name, tensor in whole.items()})
        flats = [
            torch.cat([named[name].reshape(-1) for name in block.names])
            for block in blueprint.blocks
        ]
        self.weights = view_all(blueprint.blocks, flats)
        fused = cut_at_grains(blueprint.blocks, servers)
        self._runs: list[list[Run]] = [[] for _ in flats]
        for shard, span in _spans(blueprint, servers if by_shard else 0):
            weights = Parameter(flats[span.block][span.start : span.stop])
            optimizer = self._optimizer(span.block, weights, fused[span.block])
            self._runs[span.block].append(Run(shard, span, weights, optimizer))

    def _optimizer(self, number: int, flat: Parameter, at_grains: bool) -> torch.optim.Optimizer:
        block = self.blueprint.blocks[number]
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
        updates = [(weight, self.layout.part(values)) for weight, values in updates]
        for block, runs in zip(self.blueprint.blocks, self._runs, strict=True):
            if block.names[0] not in updates[0][1]:
                continue
            scale, group = 1.0, self.blueprint.groups[block.group]
            changed = from_plain(group.options)
            if group.pushed == "gradient":
                changed, scale = from_plain(options[block.group]), factor
            if averaged and block.fragment in averaged:
                plain = {"lr": averaged[block.fragment], "momentum": 0.0, "nesterov": False}
                changed = {**changed, **plain}
            summed = [
                add_up([(weight * scale, values[name]) for weight, values in updates])
                for name in block.names
            ]
            gradient = torch.cat([values.reshape(-1).to(block.dtype) for values in summed])
            for run in runs:
                run.optimizer.param_groups[0].update(changed)
                run.weights.grad = gradient[run.span.start : run.span.stop]
                run.optimizer.step()

    def capture(self, shard: int) -> State:
        """Copies of a server's weights and what its optimizers keep."""
        return [
            (run.weights.detach().clone(), copy.deepcopy(run.optimizer.state.get(run.weights, {})))
            for run in self._of(shard)
        ]

    @torch.no_grad()
    def restore(self, shard: int, state: State) -> None:
        """Set a server back to what `capture` gave."""
        for run, (weights, kept) in zip(self._of(shard), state, strict=True):
            run.weights.copy_(weights)
            run.optimizer.state[run.weights] = copy.deepcopy(kept)

    def _of(self, shard: int) -> list[Run]:
        return [run for runs in self._runs for run in runs if run.shard == shard]

    def norm(self, updates: Sequence[tuple[float, Named]]) -> float:
        """Of the weighted sum of gradients."""
        updates = [(weight, self.layout.part(values)) for weight, values in updates]
        names = [
            name
            for block in self.blueprint.blocks
            if self.blueprint.groups[block.group].pushed == "gradient"
            for name in block.names
        ]
        summed = [add_up([(weight, values[name]) for weight, values in updates]) for name in names]
        return float(torch.nn.utils.get_total_norm(summed))

    def copy(self) -> Named:
        """The weights by name, of the shapes of the model."""
        return self.layout.join({name: weight.clone() for name, weight in self.weights.items()})


def _spans(blueprint: Blueprint, servers: int) -> list[tuple[int, Span]]:
    """What is stepped as one, of which shard: what each server has of a block, or whole blocks."""
    blocks = blueprint.blocks
    if not servers:
        return [(WHOLE, Span(n, 0, block.elements)) for n, block in enumerate(blocks)]
    return [
        (shard, span)
        for fragment in sorted({block.fragment for block in blocks})
        for shard, spans in enumerate(cut_shards(blocks, servers, fragment))
        for span in spans
    ]


def add_up(parts: Sequence[tuple[float, Tensor]]) -> Tensor:
    """The weighted sum, in float32 or wider, in this order."""
    (weight, first), *rest = parts
    if not rest and weight == 1.0:
        return first
    total = first.to(torch.promote_types(first.dtype, torch.float32)) * weight
    for weight, values in rest:
        total.add_(values, alpha=weight)
    return total
