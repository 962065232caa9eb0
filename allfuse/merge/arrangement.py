"""Which tensors of which models become which tensor of the result, by their names alone.

Layers are found without knowing architectures: where names differ in nothing but a number, as
`model.layers.0.mlp.weight` and `model.layers.1.mlp.weight` do, the number is that of a layer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from allfuse.base.errors import MergeError
from allfuse.merge.recipe import Part, Recipe, Slice
from allfuse.merge.source import Source

BEFORE = re.compile(r"(?<!un)emb|wte|wpe|patch|stem|^shared\.", re.IGNORECASE)
AFTER = re.compile(r"embed_out")
"""In names of tensors of no layer: those of the input come before all layers, others after."""


@dataclass(frozen=True)
class Place:
    """One tensor of the result.

    Attributes:
        said: the slice it belongs to. names: of the tensor in the model of each of its parts.
        at: how far along the slice's layers it lies, from 0 to 1; 0 in no layer.
    """

    name: str
    said: Slice
    names: tuple[str, ...]
    at: float


@dataclass(frozen=True)
class Stacks:
    """The layers of a model: their numbers, by what stands before these in names."""

    numbers: dict[str, tuple[int, ...]]

    def split(self, name: str) -> tuple[str, int, str] | None:
        """What stands before a layer's number, that, and what stands after; None: in no layer."""
        for prefix, number, rest in _numbered(name):
            if prefix in self.numbers:
                return prefix, number, rest
        return None

    def at(self, name: str) -> float:
        """How far along its layers a tensor lies, from 0 to 1; 0 in no layer."""
        found = self.split(name)
        if found is None:
            return 0.0
        numbers = self.numbers[found[0]]
        return along(numbers.index(found[1]), len(numbers))


def along(place: int, count: int) -> float:
    """How far along so many layers one lies; a single one is the last."""
    return place / (count - 1) if count > 1 else 1.0


def find_stacks(names: Iterable[str]) -> Stacks:
    """Where the layers are: the outermost numbers in names of which there are several."""
    found: dict[str, set[int]] = {}
    for name in names:
        for prefix, number, _ in _numbered(name):
            found.setdefault(prefix, set()).add(number)
    several = {prefix: tuple(sorted(each)) for prefix, each in found.items() if len(each) > 1}
    if not several:
        several = {prefix: tuple(each) for prefix, each in found.items()}
    outer = {
        prefix: numbers
        for prefix, numbers in several.items()
        if not any(before in several for before, *_ in _numbered(prefix))
    }
    return Stacks(outer)


def _numbered(name: str) -> list[tuple[str, int, str]]:
    """Each number in a name, with what stands before it and what after."""
    parts = name.split(".")
    return [
        (".".join([*parts[:place], ""]), int(part), ".".join(["", *parts[place + 1 :]]))
        for place, part in enumerate(parts)
        if part.isdecimal()
    ]


def is_before(name: str) -> bool:
    """Whether a tensor of no layer belongs to the input."""
    return bool(BEFORE.search(name)) and not AFTER.search(name)


def arrange(recipe: Recipe, sources: Sequence[Source], base: Source | None) -> list[Place]:
    """The tensors of the result.

    Raises:
        MergeError: layers that a slice names are not there, or cannot be told from the names.
    """
    first = sources[0] if base is None else base
    kept = [name for name in first.entries if name not in first.tied]
    if not recipe.is_stacked:
        (said,) = recipe.cuts
        stacks, count = find_stacks(kept), len(said.parts)
        return [Place(name, said, (name,) * count, stacks.at(name)) for name in kept]

    def source(part: Part) -> Source:
        return first if part.model is None else sources[part.model]

    head, tail = recipe.slices[0], recipe.slices[-1]
    outer = source(head.parts[0])
    prefix, _ = one_stack(outer)
    places = []
    for name in outer_names(outer, prefix):
        said = head if is_before(name) else tail
        places.append(Place(name, said, (name,) * len(said.parts), 0.0))
    number = 0
    for count, said in enumerate(recipe.slices, start=1):
        for part in said.parts:
            _check_range(part.layers or range(0), source(part), prefix, count)
        rests = layer_names(source(said.parts[0]), prefix)
        ranges = [part.layers or range(0) for part in said.parts]
        for step, chosen in enumerate(zip(*ranges, strict=True)):
            at = along(step, len(ranges[0]))
            for rest in rests[chosen[0]]:
                names = tuple(f"{prefix}{layer}{rest}" for layer in chosen)
                places.append(Place(f"{prefix}{number}{rest}", said, names, at))
            number += 1
    if not number:
        raise MergeError("the slices take no layer at all; allowed: one or more")
    return places


def _check_range(layers: range, source: Source, prefix: str, place: int) -> None:
    own, count = one_stack(source)
    if layers.stop > count or own != prefix:
        raise MergeError(
            f"slice {place} takes layers {layers.start} to {layers.stop} of {source.path}, which "
            f"has {count} under {own}*; the first model's are under {prefix}*"
        )


def one_stack(source: Source) -> tuple[str, int]:
    """What stands before the numbers of a model's layers, and how many it has.

    Raises:
        MergeError: it has none, layers of several kinds, or some are missing.
    """
    numbers = find_stacks(source.entries).numbers
    whole = {prefix: len(each) for prefix, each in numbers.items() if each[-1] == len(each) - 1}
    if len(whole) == 1:
        return next(iter(whole.items()))
    said = ", ".join(f"{len(each)} under {prefix}*" for prefix, each in numbers.items()) or "none"
    raise MergeError(
        f"{source.path}: which tensors are layers cannot be told from their names, for there are "
        f"{said}; allowed with slices: models whose layers are numbered from 0 under one name; "
        "next: fuse whole models"
    )


def outer_names(source: Source, prefix: str) -> list[str]:
    """Those of tensors in no layer."""
    return [
        name
        for name in source.entries
        if name not in source.tied and prefix not in [before for before, *_ in _numbered(name)]
    ]


def layer_names(source: Source, prefix: str) -> dict[int, list[str]]:
    """What stands after each layer's number."""
    found: dict[int, list[str]] = {}
    for name in source.entries:
        if name not in source.tied:
            for before, number, rest in _numbered(name):
                if before == prefix:
                    found.setdefault(number, []).append(rest)
    return found
