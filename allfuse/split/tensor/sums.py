"""What is computed along the dim in which a tensor is cut, by a few numbers for each row.

For T rows, n ranks and numbers of B bytes a softmax sends (n - 1) T B from each rank forward. The
loss of a class adds 2 (n - 1) / n B, and nothing backward: all ranks know the sum of its gradient
along the row. Other losses sum their gradients by row, 2 (n - 1) / n T B. (Shoeybi et al. 2019,
arXiv:1909.08053, section 3, have such a loss, in which more numbers a row are summed.)

A rule takes the call, the tensor that is cut and the call's other arguments. It gives
`NotImplemented` where the call needs the whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from allfuse.base.torch_private import assert_soon
from allfuse.split.tensor.views import own_size, place_of

if TYPE_CHECKING:
    from allfuse.split.tensor.late import Late

aten = torch.ops.aten
SHORT = (torch.float16, torch.bfloat16)
MEANS = (aten.mean.default, aten.mean.dim)


def _widened(x: Tensor) -> Tensor:
    """In the type in which torch itself computes sums of it."""
    return x.float() if x.dtype in SHORT else x


def _by_row(x: Late, dim: int) -> bool:
    return dim % x.dim() == place_of(x)


def _log_of_sum(x: Late, own: Tensor) -> Tensor:
    """The logarithm of the sum of exponentials of each row, of this rank's slice."""
    return x.owner.each(own.logsumexp(x.along, keepdim=True)).logsumexp(0)


def _log_softmax(function: Any, x: Late, dim: int, to_float: bool) -> Any:
    if not _by_row(x, dim):
        return x.like(function(x.piece, dim, to_float))
    own = _widened(x.piece)
    return x.like((own - _log_of_sum(x, own)).to(own.dtype if to_float else x.dtype))


def _softmax(function: Any, x: Late, dim: int, to_float: bool) -> Any:
    if not _by_row(x, dim):
        return x.like(function(x.piece, dim, to_float))
    own = _widened(x.piece)
    return x.like((own - _log_of_sum(x, own)).exp_().to(own.dtype if to_float else x.dtype))


def _log_softmax_back(
    late: Late, gradient: Tensor, output: Tensor, dim: int, dtype: torch.dtype
) -> Any:
    own, slope = late.mine(output), late.mine(gradient)
    if own is None or slope is None or not _by_row(late, dim):
        return NotImplemented
    total = _total(late, gradient, slope)
    return late.like((_widened(slope) - _widened(own).exp() * total).to(dtype))


def _softmax_back(
    late: Late, gradient: Tensor, output: Tensor, dim: int, dtype: torch.dtype
) -> Any:
    own, slope = late.mine(output), late.mine(gradient)
    if own is None or slope is None or not _by_row(late, dim):
        return NotImplemented
    weighed = _widened(slope) * own
    total = late.owner.sum(weighed.sum(late.along, keepdim=True))
    return late.like((weighed - own * total).to(dtype))


def _total(late: Late, gradient: Tensor, slope: Tensor) -> Tensor:
    """The sum of each row of a gradient, of which this rank has `slope`."""
    if type(gradient) is Tensor:  # all ranks have all of it
        return _widened(gradient).sum(late.along, keepdim=True)
    known: Tensor | None = gradient.total  # type: ignore[attr-defined]
    if known is not None:
        return known
    return late.owner.sum(_widened(slope).sum(late.along, keepdim=True))


class _Targets:
    """Which class counts in each row, how much, and whether this rank has it.

    Raises:
        IndexError: there is no such class.
    """

    def __init__(self, x: Late, target: Tensor, weight: Tensor | None, ignored: int) -> None:
        owner = x.owner
        counts = target != ignored
        _check(target, counts, owner.size)
        self.here = counts & (target >= owner.start) & (target < owner.stop)
        self.index = (target - owner.start).clamp(0, own_size(x) - 1).unsqueeze(1)
        dtype = _widened(x.piece[:0]).dtype
        if weight is None:
            self.weight = counts.to(dtype)
        else:
            self.weight = weight.to(dtype)[target.clamp(0, owner.size - 1)].masked_fill(~counts, 0)


def _check(target: Tensor, counts: Tensor, size: int) -> None:
    bad = counts & ((target < 0) | (target >= size))
    if target.device.type == "cpu":
        if bad.any():
            raise IndexError(f"Target {int(target[bad][0])} is out of bounds.")
    else:
        assert_soon(~bad.any(), f"a target is none of the {size} classes")


def _has_classes(x: Late) -> bool:
    """Whether classes are in dim 1, and are what is cut."""
    return x.dim() > 1 and place_of(x) == 1


def _class_loss(
    _: Any, x: Late, target: Tensor, weight: Tensor | None, reduction: int, ignored: int
) -> Any:
    """The loss of the class of each row, of logarithms of probabilities (N, C) or (N, C, H, W)."""
    if not _has_classes(x):
        return NotImplemented
    rows = _Targets(x, target, weight, ignored)
    picked = _widened(x.piece.gather(1, rows.index).squeeze(1))
    own = -(picked * rows.weight).masked_fill(~rows.here, 0)
    if not reduction:
        return x.owner.sum(own).to(x.dtype), x.piece.new_zeros(())
    total, count = x.owner.sum(own.sum()), rows.weight.sum()
    return (total / count if reduction == 1 else total).to(x.dtype), count


def _class_loss_back(
    late: Late,
    gradient: Tensor,
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: int,
    ignored: int,
    count: Tensor,
) -> Any:
    if x is not late or not _has_classes(late):
        return NotImplemented
    rows = _Targets(late, target, weight, ignored)
    each = gradient / count if reduction == 1 else gradient
    slope = -(each * rows.weight).masked_fill(target == ignored, 0).to(x.dtype).unsqueeze(1)
    own = torch.zeros_like(late.piece)
    own.scatter_(1, rows.index, slope.masked_fill(~rows.here.unsqueeze(1), 0))
    made = late.like(own)
    made.total = _widened(slope)
    return made


def _sum(
    function: Any,
    x: Late,
    dims: Sequence[int] | None = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> Any:
    found = sorted({dim % x.dim() for dim in (dims or range(x.dim()))})
    if place_of(x) not in found:
        after = 0 if keepdim else sum(dim > place_of(x) for dim in found)
        return x.like(function(x.piece, found, keepdim, dtype=dtype), x.along + after)
    own = _widened(x.piece).sum(found, keepdim, dtype=dtype)
    total = x.owner.sum(own)
    if function in MEANS:
        total = total / math.prod(x.shape[dim] for dim in found)
    is_whole = not (x.dtype.is_floating_point or x.dtype.is_complex)
    return total.to(dtype or (own.dtype if is_whole else x.dtype))


def _logsumexp(function: Any, x: Late, dims: Sequence[int], keepdim: bool = False) -> Any:
    if len(dims) != 1 or not _by_row(x, dims[0]):
        return NotImplemented
    found = _log_of_sum(x, _widened(x.piece)).to(x.dtype)
    return found if keepdim else found.squeeze(x.along)


def _pick(function: Any, x: Late, dim: int, index: Tensor, *, sparse_grad: bool = False) -> Any:
    """Numbers of each row, by their place in it."""
    if not _by_row(x, dim):
        return NotImplemented
    here = (index >= x.owner.start) & (index < x.owner.stop)
    own = (index - x.owner.start).clamp(0, own_size(x) - 1)
    return x.owner.sum(x.piece.gather(dim, own).masked_fill(~here, 0))


def _largest(function: Any, x: Late, dim: int, keepdim: bool = False) -> Any:
    """The largest number of each row, and the first place where it is."""
    if not _by_row(x, dim):
        return NotImplemented
    own = x.piece.max(x.along, keepdim)
    values, places = x.owner.each(own.values), x.owner.each(own.indices + x.owner.start)
    best = values.argmax(0, keepdim=True)
    return values.gather(0, best)[0], places.gather(0, best)[0]


def _argmax(function: Any, x: Late, dim: int | None = None, keepdim: bool = False) -> Any:
    if dim is None:
        return NotImplemented
    found = _largest(function, x, dim, keepdim)
    return found if found is NotImplemented else found[1]


SUMS: dict[Any, Callable[..., Any]] = {
    aten._log_softmax.default: _log_softmax,
    aten._softmax.default: _softmax,
    aten.nll_loss_forward.default: _class_loss,
    aten.nll_loss2d_forward.default: _class_loss,
    aten.sum.default: _sum,
    aten.sum.dim_IntList: _sum,
    aten.mean.default: _sum,
    aten.mean.dim: _sum,
    aten.logsumexp.default: _logsumexp,
    aten.gather.default: _pick,
    aten.max.dim: _largest,
    aten.argmax.default: _argmax,
}
"""Of calls whose first argument is cut."""

BACK: dict[Any, Callable[..., Any]] = {
    aten._log_softmax_backward_data.default: _log_softmax_back,
    aten._softmax_backward_data.default: _softmax_back,
    aten.nll_loss_backward.default: _class_loss_back,
    aten.nll_loss2d_backward.default: _class_loss_back,
}
"""Of calls in which the first two may be."""
