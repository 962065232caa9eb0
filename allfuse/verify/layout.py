"""The tensors of the plain model as a run's servers held them: whole, or in the parts that ranks of
a worker had."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from allfuse.roles.blueprint import Blueprint
from allfuse.split.piece import join

Named = dict[str, Tensor]


class Layout:
    """Takes tensors apart and puts them together.

    Args:
        blueprint: of what servers held.
    """

    def __init__(self, blueprint: Blueprint) -> None:
        self.blueprint = blueprint
        self._parts = {
            name: [(held.name, held.part.piece) for held in parts if held.part is not None]
            for name, parts in blueprint.parts.items()
        }

    @classmethod
    def of(cls, task: Mapping[str, Any]) -> Layout:
        """That of a run, as its first worker told it. An empty one where it told none."""
        told = task.get("blueprint")
        return cls(Blueprint.from_plain(told) if told else Blueprint((), ()))

    @property
    def is_cut(self) -> bool:
        return any(self._parts.values())

    def part(self, whole: Mapping[str, Tensor]) -> Named:
        """What servers held of tensors of the plain model."""
        found: Named = {}
        for name, value in whole.items():
            parts = self._parts.get(name)
            found |= {own: p.take(value) for own, p in parts} if parts else {name: value}
        return found

    def join(self, parted: Mapping[str, Tensor]) -> Named:
        """The tensors of the plain model of which there are all parts."""
        found: Named = {}
        taken: set[str] = set()
        for name, parts in self._parts.items():
            taken.update(own for own, _ in parts)
            if parts and all(own in parted for own, _ in parts):
                found[name] = join([(piece, parted[own]) for own, piece in parts])
        return {name: v for name, v in parted.items() if name not in taken} | found
