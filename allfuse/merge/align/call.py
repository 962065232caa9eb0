"""One call of an operator, as the operators' descriptions see it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor

from allfuse.merge.align.factors import Dim, Factors

Dims = list[Dim]


class Call(Protocol):
    """One call of an operator: its arguments by name, and what it gave."""

    @property
    def factors(self) -> Factors: ...

    @property
    def name(self) -> str:
        """The operator's."""

    @property
    def shapes(self) -> Sequence[tuple[int, ...]]:
        """Of what it gave."""

    def __getitem__(self, name: str) -> Any:
        """An argument; None: it has none of that name."""

    def tensors(self) -> list[Tensor]:
        """All that it took."""

    def dims(self, tensor: Tensor) -> Dims:
        """Of a tensor that it took."""

    def fixed(self, size: int) -> Dim:
        """A dim that stays as it is."""


Operator = Callable[[Call], Sequence[Dims]]
"""The dims of each result; joins or freezes those of what the call took."""


def broadcast(call: Call, given: Sequence[Dims], shape: Sequence[int]) -> Dims:
    """Join dims that meet in one of the result, from the last one back; those of the result."""
    made: Dims = []
    for back, size in zip(range(len(shape), 0, -1), shape, strict=True):
        own = [dims[-back] for dims in given if len(dims) >= back]
        own = [dim for dim in own if call.factors.size_of(dim) == size]
        if size == 1 or not own:
            made.append(call.factors.new(size))
            continue
        for dim in own[1:]:
            call.factors.join(own[0], dim)
        made.append(own[0])
    return made
