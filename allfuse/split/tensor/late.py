"""What the last map of a model gives: each rank has a slice of it, and the whole is put together
only where something asks for it.

To torch it is one tensor of the whole shape, which autograd follows like any other. What is
computed from it, forward and backward, is computed from slices where that gives slices (arithmetic
by element, views of other dims) or a few numbers for each row (a softmax, the loss of a class; see
sums.py). For all else the slices are gathered, so that the result is what it always is. All ranks
compute the same from it, in the same order, as with every collective.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from allfuse.base.tensors import map_nest, share
from allfuse.base.torch_private import (
    below_torch_functions,
    is_written,
    past_subclasses,
    shaped_like,
)
from allfuse.split.record import argument_leaves, map_arguments
from allfuse.split.tensor.sums import BACK, SUMS
from allfuse.split.tensor.traffic import Slice
from allfuse.split.tensor.views import VIEWS

aten = torch.ops.aten

AS_WHOLE = frozenset(
    {
        Tensor.numpy,
        Tensor.tolist,
        Tensor.data_ptr,
        Tensor.__array__,
        Tensor.__deepcopy__,
        Tensor.__dlpack__,
        Tensor.__reduce_ex__,
    }
)
"""Functions that look at a tensor's memory."""

BY_ELEMENT = frozenset(
    {
        aten.alias.default,
        aten.clone.default,
        aten.copy_.default,
        aten.detach.default,
        aten.empty_like.default,
        aten.fill_.Scalar,
        aten.fill_.Tensor,
        aten.full_like.default,
        aten.ones_like.default,
        aten._to_copy.default,
        aten.zero_.default,
        aten.zeros_like.default,
    }
)
"""Calls that work element by element, besides those that torch marks as such."""

NEW = frozenset(
    {
        aten.new_empty.default,
        aten.new_empty_strided.default,
        aten.new_full.default,
        aten.new_ones.default,
        aten.new_zeros.default,
    }
)
"""Calls that look at the type of a tensor alone."""


class Owner:
    """Whose slices they are: even runs of `size` along a dim.

    Attributes:
        start, stop: of this rank's run.
        writes: how often something was written to slices.
    """

    def __init__(self, slice_: Slice, size: int, name: str) -> None:
        self.slice, self.size, self.name = slice_, size, name
        self.start, self.stop = share(size, slice_.n, slice_.index)
        self.writes = 0

    def cut(self, whole: Tensor, along: int) -> Tensor:
        """This rank's slice, a view."""
        return whole.narrow(along, self.start, self.stop - self.start)

    def gather(self, piece: Tensor, along: int, what: str) -> Tensor:
        return self.slice.gather(
            piece, along % piece.dim(), self.size, f"gather what comes out of {self.name} {what}"
        )

    def sum(self, part: Tensor) -> Tensor:
        """The sum of what each rank has."""
        total = self.slice.sum(part.reshape(-1), f"sum over what comes out of {self.name}")
        return total.view(part.shape)

    def each(self, part: Tensor) -> Tensor:
        """What each rank has, one after the other in a dim of its own, the first."""
        operation = f"compare what comes out of {self.name}"
        return self.slice.gather(part.unsqueeze(0), 0, self.slice.n, operation)


class Late(Tensor):
    """A tensor of which each rank has a slice.

    Attributes:
        piece: this rank's.
        along: the dim that is cut, counted from the end: -1 is the last.
        total: its sum along that dim, kept, where all ranks know it.
    """

    piece: Tensor
    along: int
    owner: Owner
    total: Tensor | None
    _known: tuple[int, Tensor] | None  # the whole, and how often was written by then

    @classmethod
    def of(cls, piece: Tensor, along: int, owner: Owner) -> Late:
        shape = list(piece.shape)
        shape[along] = owner.size
        made: Late = shaped_like(cls, shape, piece)
        made.piece, made.along, made.owner = piece, along, owner
        made.total = made._known = None
        return made

    def like(self, piece: Tensor, along: int | None = None) -> Late:
        """Another one of the same ranks."""
        return Late.of(piece, self.along if along is None else along, self.owner)

    def mine(self, other: Tensor) -> Tensor | None:
        """This rank's slice of another tensor, cut as this one is. None where that is cut otherwise
        or goes on where this one is cut."""
        if isinstance(other, Late):
            alike = other.along == self.along and other.owner.size == self.owner.size
            return other.piece if alike and other.owner.slice is self.owner.slice else None
        if other.dim() < -self.along or other.shape[self.along] == 1:
            return other
        whole = other.shape[self.along] == self.owner.size
        return self.owner.cut(other, self.along) if whole else None

    def whole(self, what: str) -> Tensor:
        """All of it, without its history. All ranks ask."""
        if self._known is None or self._known[0] != self.owner.writes:
            whole = self.owner.gather(self.piece, self.along, what)
            self._known = self.owner.writes, whole
        return self._known[1]

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        """Gathers nothing, since one rank alone may be asked for it."""
        start, stop, dim = self.owner.start, self.owner.stop, self.dim() + self.along
        return (
            f"tensor of shape {tuple(self.shape)}, of which this rank has {start}:{stop} of dim "
            f"{dim}: {self.piece}"
        )

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        named = kwargs or {}
        if function is Tensor.untyped_storage and isinstance(args[0], Late):
            return args[0].piece.untyped_storage()
        if function in AS_WHOLE:
            args, named = _wholes(function.__name__, args, named)
        with past_subclasses():
            return function(*args, **named)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        named = kwargs or {}
        late = next(x for x in argument_leaves((args, named)) if isinstance(x, Late))
        with below_torch_functions(), _uncast(late.device.type):
            rule = _rule_of(function)
            found = NotImplemented if rule is None else rule(function, late, args, named)
            return _gathered(function, args, named) if found is NotImplemented else found


def put_off(x: Tensor, slice_: Slice, dim: int, size: int, name: str) -> Tensor:
    """The tensor whose slices these are, even runs of `size` along a dim."""
    result: Tensor = _PutOff.apply(x, dim - x.dim(), Owner(slice_, size, name))  # type: ignore[no-untyped-call]
    return result


class _PutOff(torch.autograd.Function):
    """Forward nothing; backward this slice's piece of the gradient."""

    @staticmethod
    def forward(context: Any, x: Tensor, along: int, owner: Owner) -> Tensor:
        context.along, context.owner = along, owner
        return Late.of(x.detach(), along, owner)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        gradient, owner = gradients[0], context.owner
        if isinstance(gradient, Late) and gradient.along == context.along:
            return gradient.piece, None, None
        if isinstance(gradient, Late):
            gradient = gradient.whole("for its gradient")
        return owner.cut(gradient, context.along).contiguous(), None, None


def _uncast(device: str) -> AbstractContextManager[Any]:
    """Types are what torch has made them already."""
    if torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


Rule = Callable[[Any, Late, tuple[Any, ...], dict[str, Any]], Any]
"""Computes a call from slices; `NotImplemented` where that is not to be had."""


@functools.cache
def _rule_of(function: Any) -> Rule | None:
    """How a call is computed from slices; None where it is not."""
    if function in VIEWS or function in SUMS:
        return functools.partial(_by_first, (VIEWS | SUMS)[function])
    if function in BACK:
        return functools.partial(_by_any, BACK[function])
    if function in NEW:
        return _new
    drawn = torch.Tag.nondeterministic_seeded in function.tags
    if function in BY_ELEMENT or (torch.Tag.pointwise in function.tags and not drawn):
        return _by_element
    return None


def _by_first(
    inner: Callable[..., Any], function: Any, late: Late, args: Any, named: dict[str, Any]
) -> Any:
    """By a rule for calls whose first argument is cut."""
    return inner(function, *args, **named) if args[0] is late else NotImplemented


def _by_any(
    inner: Callable[..., Any], function: Any, late: Late, args: Any, named: dict[str, Any]
) -> Any:
    return inner(late, *args, **named)


def _by_element(function: Any, late: Late, args: Any, named: dict[str, Any]) -> Any:
    missing = False

    def fill(leaf: Any) -> Any:
        nonlocal missing
        if not isinstance(leaf, Tensor):
            return leaf
        found = late.mine(leaf)
        missing = missing or found is None
        return found

    writes = is_written(function, 0)
    if "out" in named or (writes and args[0] is not late):
        return NotImplemented
    placed, by_name = map_arguments(fill, (tuple(args), dict(named)))
    if missing:
        return NotImplemented
    result = function(*placed, **by_name)
    if writes:
        late.owner.writes += 1
        late.total = None
        return late
    return late.like(result) if result.device == late.piece.device else NotImplemented


def _new(function: Any, late: Late, args: Any, named: dict[str, Any]) -> Any:
    """Zeros that gradients of rows are put into are cut as these are."""
    if args[0] is not late:
        return NotImplemented
    _, shape, *rest = args
    if function is aten.new_zeros.default and len(shape) >= -late.along:
        own = list(shape)
        if own[late.along] == late.owner.size:
            own[late.along] = late.owner.stop - late.owner.start
            return late.like(function(late.piece, own, *rest, **named))
    return function(late.piece, shape, *rest, **named)


def _gathered(function: Any, args: Any, named: dict[str, Any]) -> Any:
    """A call on the whole. What it writes to it, slices get; what looks into its memory shares it
    with the slices from then on."""
    what = f"for {function.__name__.partition('.')[0]}"
    placed, by_name = _wholes(what, args, named)
    result = function(*placed, **by_name)
    lates = [x for x in (*args, *named.values()) if isinstance(x, Late)]
    if function.is_view:
        for late in lates:
            late.piece = late.owner.cut(late.whole(what), late.along)
    writes = [at for at, x in enumerate(args) if isinstance(x, Late) and is_written(function, at)]
    for at in writes:
        late, whole = args[at], placed[at]
        late.piece.copy_(late.owner.cut(whole, late.along))
        late.owner.writes += 1
        late._known, late.total = (late.owner.writes, whole), None
    known = {id(placed[at]): args[at] for at in writes}
    return map_nest(lambda leaf: known.get(id(leaf), leaf), result)


def _wholes(what: str, args: Any, named: dict[str, Any]) -> Any:
    """Arguments with the whole in place of slices."""

    def fill(leaf: Any) -> Any:
        return leaf.whole(what) if isinstance(leaf, Late) else leaf

    return map_arguments(fill, (tuple(args), dict(named)))
