"""Views of a tensor that is cut into slices along one dim, by those of the slices.

A rule takes the call, the tensor that is cut and the call's other arguments. It gives
`NotImplemented` where the view looks along the dim that is cut, or mixes it with others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from allfuse.split.tensor.late import Late

aten = torch.ops.aten


def place_of(x: Late) -> int:
    """The dim that is cut, counted from the front."""
    return x.dim() + x.along


def own_size(x: Late) -> int:
    """How much of it this rank has."""
    return x.owner.stop - x.owner.start


def _view(_: Any, x: Late, shape: Sequence[int]) -> Any:
    """As many numbers stand before the dim that is cut as did."""
    sizes = list(shape)
    if -1 in sizes:
        sizes[sizes.index(-1)] = x.numel() // max(-math.prod(sizes), 1)
    before = math.prod(x.shape[: place_of(x)])
    for at, size in enumerate(sizes):
        if size == x.owner.size and math.prod(sizes[:at]) == before:
            sizes[at] = own_size(x)
            return x.like(x.piece.reshape(sizes), at - len(sizes))
    return NotImplemented


def _permute(_: Any, x: Late, order: Sequence[int]) -> Any:
    order = [dim % x.dim() for dim in order]
    return x.like(x.piece.permute(order), order.index(place_of(x)) - x.dim())


def _transpose(function: Any, x: Late, one: int, other: int) -> Any:
    order = list(range(x.dim()))
    order[one], order[other] = order[other], order[one]
    return _permute(function, x, order)


def _turn(function: Any, x: Late) -> Any:
    return _permute(function, x, list(reversed(range(x.dim()))))


def _unsqueeze(_: Any, x: Late, dim: int) -> Any:
    dim %= x.dim() + 1
    return x.like(x.piece.unsqueeze(dim), x.along - (dim > place_of(x)))


def _squeeze(_: Any, x: Late, dims: int | Sequence[int] | None = None) -> Any:
    """A slice may be one number wide where the whole is not."""
    asked = range(x.dim()) if dims is None else [dims] if isinstance(dims, int) else dims
    gone = sorted({dim % x.dim() for dim in asked if x.shape[dim] == 1})
    after = sum(dim > place_of(x) for dim in gone)
    return x.like(x.piece.squeeze(tuple(gone)), x.along + after)


def _expand(_: Any, x: Late, shape: Sequence[int], *, implicit: bool = False) -> Any:
    sizes = list(shape)
    sizes[x.along] = -1
    return x.like(x.piece.expand(sizes))


def _slice(
    function: Any,
    x: Late,
    dim: int = 0,
    start: int | None = None,
    end: int | None = None,
    step: int = 1,
) -> Any:
    if dim % x.dim() != place_of(x):
        return x.like(function(x.piece, dim, start, end, step))
    all_of_it = not start and (end is None or end >= x.owner.size) and step == 1
    return x.like(x.piece) if all_of_it else NotImplemented


def _slice_back(function: Any, x: Late, shape: Sequence[int], dim: int, *rest: int) -> Any:
    if dim % len(shape) == place_of(x):
        return NotImplemented
    sizes = list(shape)
    sizes[x.along] = own_size(x)
    return x.like(function(x.piece, sizes, dim, *rest))


def _select(function: Any, x: Late, dim: int, index: int) -> Any:
    dim %= x.dim()
    if dim == place_of(x):
        return NotImplemented
    return x.like(function(x.piece, dim, index), x.along + (dim > place_of(x)))


def _select_back(function: Any, x: Late, shape: Sequence[int], dim: int, index: int) -> Any:
    sizes, dim = list(shape), dim % len(shape)
    along = x.along - (dim > place_of(x))
    sizes[along] = own_size(x)
    return x.like(function(x.piece, sizes, dim, index), along)


def _counts_before(x: Late, indices: Sequence[Tensor | None]) -> bool:
    """Whether these are the first dims, and the one that is cut comes after them."""
    if any(index is None for index in indices):
        return False
    masks = (torch.bool, torch.uint8)
    dims = [i.dim() if i is not None and i.dtype in masks else 1 for i in indices]
    return sum(dims) <= place_of(x)


def _index(function: Any, x: Late, indices: Sequence[Tensor | None]) -> Any:
    return x.like(function(x.piece, indices)) if _counts_before(x, indices) else NotImplemented


def _put(
    function: Any,
    x: Late,
    indices: Sequence[Tensor | None],
    values: Tensor,
    accumulate: bool = False,
) -> Any:
    """Rows put into others, as the gradient of rows that were taken is."""
    own = x.mine(values)
    if own is None or not _counts_before(x, indices):
        return NotImplemented
    return x.like(function(x.piece, indices, own, accumulate))


VIEWS: dict[Any, Callable[..., Any]] = {
    aten.view.default: _view,
    aten._unsafe_view.default: _view,
    aten.permute.default: _permute,
    aten.transpose.int: _transpose,
    aten.t.default: _turn,
    aten.unsqueeze.default: _unsqueeze,
    aten.squeeze.default: _squeeze,
    aten.squeeze.dim: _squeeze,
    aten.squeeze.dims: _squeeze,
    aten.expand.default: _expand,
    aten.slice.Tensor: _slice,
    aten.slice_backward.default: _slice_back,
    aten.select.int: _select,
    aten.select_backward.default: _select_back,
    aten.index.Tensor: _index,
    aten.index_put.default: _put,
}
