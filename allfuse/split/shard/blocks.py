"""Which modules' parameters are brought together at once: blocks, found by size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn
from torch.nn import Parameter

from allfuse.split.record import Recording

LARGEST_SHARE = 12
"""A module of more than one in so many of all parameters is looked into for smaller ones: a whole
block is in memory beside the shards when it runs."""
SMALLEST_SHARE = 1000
"""A module of fewer than one in so many makes no block of its own: a transfer costs time however
small it is."""

ONE = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
"""Modules that are not looked into: when they do not learn they hand the parameters of all their
parts to one function of torch, without calling the parts."""


def find_blocks(model: nn.Module, recording: Recording | None) -> list[str]:
    """Names of modules, none inside another, each of which runs as one: the largest that are small
    beside the model. What is in none of them belongs to the model as a whole.

    Args:
        recording: of a forward pass, to leave out modules whose parameters others use, and those
            that are not called themselves. None: nobody knows, so there are no blocks.
    """
    if recording is None:
        return []
    total = sum(parameter.numel() for parameter in model.parameters())
    usable = _Usable(model, recording)
    return [name for name in _look_into(model, "", total) if usable.is_block(name)]


def _look_into(module: nn.Module, name: str, total: int) -> Iterator[str]:
    for child_name, child in module.named_children():
        path = f"{name}.{child_name}" if name else child_name
        size = sum(parameter.numel() for parameter in child.parameters())
        if size * SMALLEST_SHARE < total or size == 0:
            continue
        is_one = isinstance(child, ONE) or not any(True for _ in child.children())
        if size * LARGEST_SHARE <= total or is_one:
            yield path
        else:
            yield from _look_into(child, path, total)


class _Usable:
    """Whether all that a forward pass does with a module's parameters, it does inside of it."""

    def __init__(self, model: nn.Module, recording: Recording) -> None:
        self.modules = dict(model.named_modules())
        names: dict[int, str] = {}
        for name, parameter in model.named_parameters():
            names.setdefault(id(parameter), name)
        self.first_names = names
        self.owners = _count_owners(model)
        self.spans: dict[str, list[tuple[int, int]]] = {}
        for visit in recording.visits:
            self.spans.setdefault(visit.module, []).append((visit.begin, visit.end))
        self.uses: dict[str, list[int]] = {}
        for call in recording.calls:
            for number in call.inputs:
                if number in recording.parameters:
                    self.uses.setdefault(recording.parameters[number], []).append(call.index)

    def is_block(self, name: str) -> bool:
        module = self.modules[name]
        spans = self.spans.get(name, [])
        inside = _count_owners(module)
        for parameter in module.parameters():
            if inside[id(parameter)] != self.owners[id(parameter)]:
                return False  # tied to one outside
            for index in self.uses.get(self.first_names[id(parameter)], ()):
                if not any(begin <= index < end for begin, end in spans):
                    return False
        return bool(spans)


def _count_owners(model: nn.Module) -> dict[int, int]:
    """How many modules have each parameter, by its `id`."""
    found: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                found[id(parameter)] = found.get(id(parameter), 0) + 1
    return found


def owners_of(
    model: nn.Module, parameters: Sequence[Parameter]
) -> list[list[tuple[nn.Module, str]]]:
    """Of each parameter, all modules that have it, and its name there."""
    found: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                found.setdefault(id(parameter), []).append((module, name))
    return [found[id(parameter)] for parameter in parameters]
