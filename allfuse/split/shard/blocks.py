"""Which modules' parameters are brought together at once: blocks, found by size."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

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


def find_blocks(
    model: nn.Module,
    recording: Recording | None,
    here: Collection[str] | None = None,
    apart: Collection[str] = (),
) -> list[str]:
    """Names of modules, none inside another, each of which runs as one: the largest that are small
    beside the model. What is in none of them belongs to the model as a whole.

    Args:
        recording: of a forward pass, to leave out modules whose parameters others use, and those
            that are not called themselves. None: nobody knows, so there are no blocks.
        here: names of the parameters that this rank has, beside which modules are small. None: all.
        apart: names of modules before which the model is cut into stages: what they are parts of
            runs as one nowhere.
    """
    if recording is None:
        return []
    sizes = {
        id(parameter): parameter.numel()
        for name, parameter in model.named_parameters()
        if here is None or name in here
    }
    usable, finder = _Usable(model, recording), _Finder(sizes, apart)
    return [name for name in finder.look_into(model, "") if usable.is_block(name)]


class _Finder:
    """Looks for modules of the right size.

    Args:
        sizes: of the parameters that count, by their `id`.
    """

    def __init__(self, sizes: Mapping[int, int], apart: Collection[str]) -> None:
        self.sizes, self.apart, self.total = sizes, apart, sum(sizes.values())

    def look_into(self, module: nn.Module, name: str) -> Iterator[str]:
        for child_name, child in module.named_children():
            path = f"{name}.{child_name}" if name else child_name
            size = sum(self.sizes.get(id(parameter), 0) for parameter in child.parameters())
            if size * SMALLEST_SHARE < self.total or size == 0:
                continue
            is_cut = any(other.startswith(f"{path}.") for other in self.apart)
            is_one = isinstance(child, ONE) or not any(True for _ in child.children())
            if not is_cut and (size * LARGEST_SHARE <= self.total or is_one):
                yield path
            else:
                yield from self.look_into(child, path)


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
