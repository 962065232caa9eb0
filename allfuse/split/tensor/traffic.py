"""What crosses between slices: sums and gathers that autograd can follow.

For an activation of B bytes and n ranks each sum sends 2 (n - 1) / n B from each rank, and a gather
(n - 1) / n B: every rank sends its piece to each other one.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from allfuse.base.tensors import share
from allfuse.base.torch_private import is_fake
from allfuse.link import Link


class Slice:
    """One rank's place among those that share a model's layers.

    Args:
        link: to the ranks that have the other slices.
    """

    def __init__(self, link: Link) -> None:
        self.link = link

    @property
    def n(self) -> int:
        return self.link.size

    @property
    def index(self) -> int:
        return self.link.rank

    def sum(self, tensor: Tensor, operation: str) -> Tensor:
        """The sum over all slices, in new memory."""
        total = tensor.clone(memory_format=torch.contiguous_format)
        if is_fake(tensor):  # only shapes are asked for
            return total
        self.link.all_reduce(total, operation).wait()
        return total

    def gather(self, tensor: Tensor, dim: int, size: int, operation: str) -> Tensor:
        """The pieces of all slices, put together along a dim, where they are even runs of `size`.

        One transfer from each rank to each other one, all under way at once.
        """
        if self.n == 1:
            return tensor
        if is_fake(tensor):
            return tensor.new_empty([*tensor.shape[:dim], size, *tensor.shape[dim + 1 :]])
        own, pieces, works = tensor.contiguous(), [], []
        for peer in range(self.n):
            if peer == self.index:
                pieces.append(own)
                continue
            start, stop = share(size, self.n, peer)
            shape = [*tensor.shape[:dim], stop - start, *tensor.shape[dim + 1 :]]
            pieces.append(tensor.new_empty(shape))
            works.append(self.link.receive(pieces[-1], peer, operation))
        works += [
            self.link.send(own, peer, operation) for peer in range(self.n) if peer != self.index
        ]
        for work in works:
            work.wait()
        return torch.cat(pieces, dim)


class _Enter(torch.autograd.Function):
    """Forward nothing; backward the sum of what each slice found for the same value."""

    @staticmethod
    def forward(context: Any, x: Tensor, slice_: Slice, name: str) -> Tensor:
        context.slice, context.name = slice_, name
        return x.view_as(x)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        operation = f"sum gradients of what goes into {context.name}"
        return context.slice.sum(gradients[0], operation), None, None


class _Leave(torch.autograd.Function):
    """Forward the sum over slices; backward nothing, since each has the gradient of the sum."""

    @staticmethod
    def forward(context: Any, x: Tensor, slice_: Slice, name: str) -> Tensor:
        return slice_.sum(x, f"sum what comes out of {name}")

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0], None, None


class _Gather(torch.autograd.Function):
    """Forward the pieces of all slices; backward this slice's piece of the gradient."""

    @staticmethod
    def forward(context: Any, x: Tensor, slice_: Slice, dim: int, size: int, name: str) -> Tensor:
        context.slice, context.dim, context.size = slice_, dim, size
        return slice_.gather(x, dim, size, f"gather what comes out of {name}")

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        start, stop = share(context.size, context.slice.n, context.slice.index)
        piece = gradients[0].narrow(context.dim, start, stop - start)
        return piece.contiguous(), None, None, None, None


def leave(x: Tensor, slice_: Slice, name: str) -> Tensor:
    """Sum a part of a result over all slices."""
    result: Tensor = _Leave.apply(x, slice_, name)  # type: ignore[no-untyped-call]
    return result


def gather(x: Tensor, slice_: Slice, dim: int, size: int, name: str) -> Tensor:
    """Put the pieces of a result together, which are even runs of `size` along a dim."""
    result: Tensor = _Gather.apply(x, slice_, dim, size, name)  # type: ignore[no-untyped-call]
    return result


class Entrance:
    """Where a value that all slices have enters a region. Maps that take the same value share one
    sum of its gradient."""

    def __init__(self, slice_: Slice, name: str) -> None:
        self.slice, self.name = slice_, name
        self._x: Callable[[], Tensor | None] = lambda: None
        self._entered: Callable[[], Tensor | None] = lambda: None

    def enter(self, x: Tensor) -> Tensor:
        if not (torch.is_grad_enabled() and x.requires_grad):
            return x
        known = self._entered()
        if self._x() is x and known is not None and known._version == x._version:
            return known
        entered: Tensor = _Enter.apply(x, self.slice, self.name)  # type: ignore[no-untyped-call]
        self._x, self._entered = weakref.ref(x), weakref.ref(entered)
        return entered
