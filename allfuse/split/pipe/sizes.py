"""Shapes of what stages skip and pass on, for a microbatch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from typing import Any

import torch
from torch import Tensor

from allfuse.base.errors import UserError
from allfuse.base.tensors import map_nest
from allfuse.split.pipe.boundary import Boundary
from allfuse.split.record import Recording, Ref, Visit
from allfuse.split.shapes import Shapes

Shape = tuple[int, ...]


class Sizes(ABC):
    """Shapes and types of what a forward pass over one microbatch computes."""

    def __init__(self, recording: Recording) -> None:
        counts: Counter[str] = Counter()
        self._visits: dict[tuple[str, int], Visit] = {}
        for visit in sorted(recording.visits, key=lambda each: each.began):
            self._visits[visit.module, counts[visit.module]] = visit
            counts[visit.module] += 1

    def takes(self) -> list[Shape]:
        """The shapes of the tensors that the model itself takes."""
        root = self._visits.get(("", 0))
        return [] if root is None else [self._shape(number) for number in root.taken]

    def hollow(self, module: str, number: int, device: torch.device) -> Any:
        """What a pass through a module returns, without contents."""

        def make(leaf: Any) -> Any:
            return self._empty(leaf.number, device) if isinstance(leaf, Ref) else leaf

        return map_nest(make, self._find(module, number).result)

    def crossing(self, place: Boundary, device: torch.device) -> Tensor:
        """A tensor for what crosses at a place."""
        taken = self._find(place.module, place.visit).taken
        return self._empty(taken[place.argument], device)

    def _find(self, module: str, number: int) -> Visit:
        visit = self._visits.get((module, number))
        if visit is None:
            raise UserError(
                f"the forward pass over this batch does not go through {module} as it did over the "
                "first samples, by which the model was cut into stages; allowed: a forward pass "
                "that takes one way for all batches; next: a plan without pipe"
            )
        return visit

    def _empty(self, number: int, device: torch.device) -> Tensor:
        return torch.empty(self._shape(number), dtype=self._dtype(number), device=device)

    @abstractmethod
    def _shape(self, number: int) -> Shape: ...

    @abstractmethod
    def _dtype(self, number: int) -> torch.dtype: ...


class Scaled(Sizes):
    """Those of the first samples, for so many rows."""

    def __init__(self, shapes: Shapes) -> None:
        super().__init__(shapes.one)
        self.shapes, self.rows = shapes, 0

    def of(self, rows: int) -> Scaled:
        made = object.__new__(Scaled)
        made._visits, made.shapes, made.rows = self._visits, self.shapes, rows
        return made

    def _shape(self, number: int) -> Shape:
        return self.shapes.of(number, self.rows)

    def _dtype(self, number: int) -> torch.dtype:
        return self.shapes.dtypes[number]


class Followed(Sizes):
    """Those of a pass that was followed again, since its samples have other shapes."""

    def __init__(self, recording: Recording) -> None:
        super().__init__(recording)
        self.recording = recording

    def _shape(self, number: int) -> Shape:
        return self.recording.shapes[number]

    def _dtype(self, number: int) -> torch.dtype:
        return self.recording.dtypes[number]


class Seen(BaseException):
    """What a model was called with. No `Exception`, so that a job's code lets it by."""

    def __init__(self, shapes: list[Shape]) -> None:
        self.shapes = shapes


class Ended(BaseException):
    """A pass that is followed has come to the end of the model."""
