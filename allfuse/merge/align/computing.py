"""Operators that compute: elementwise ones, products, convolutions and norms."""

from __future__ import annotations

from collections.abc import Sequence

from allfuse.merge.align.call import Call, Dims, broadcast
from allfuse.merge.align.factors import Dim, Factors


def elementwise(call: Call) -> Sequence[Dims]:
    """All that meets in a number of the result is in one place, or has one number for all."""
    given = [call.dims(tensor) for tensor in call.tensors()]
    return [broadcast(call, given, shape) for shape in call.shapes]


def alike(call: Call) -> Sequence[Dims]:
    """The result's numbers stand where those of the first argument do."""
    return [call.dims(call.tensors()[0])]


def uniform(call: Call) -> Sequence[Dims]:
    """One number everywhere: any order is the same."""
    return [[call.factors.new(size) for size in shape] for shape in call.shapes]


def filled(call: Call) -> Sequence[Dims]:
    """Numbers of its own that stand in their order."""
    return [[call.fixed(size) for size in shape] for shape in call.shapes]


# ----- products -----


def product(call: Call) -> Sequence[Dims]:
    """mm, bmm, mv, dot: the last dim of the one runs along the last but one of the other."""
    one, other = (call.dims(tensor) for tensor in call.tensors())
    return [_product(call, one, other)]


def _product(call: Call, one: Dims, other: Dims) -> Dims:
    inner = -2 if len(other) > 1 else -1
    call.factors.join(one[-1], other[inner])
    for left, right in zip(one[:-2], other[:-2], strict=False):
        call.factors.join(left, right)
    return [*one[:-1], *([other[-1]] if len(other) > 1 else [])]


def product_and_sum(call: Call) -> Sequence[Dims]:
    """addmm, baddbmm, addmv."""
    start, one, other = (call.dims(tensor) for tensor in call.tensors())
    made = _product(call, one, other)
    return [broadcast(call, [made, start], call.shapes[0])]


def convolution(call: Call) -> Sequence[Dims]:
    """Channels of groups are split into (group, channel of the group)."""
    factors, groups = call.factors, call["groups"]
    taken, weight = call.dims(call["input"]), call.dims(call["weight"])
    batch, channels, places = taken[0], taken[1], taken[2:]
    for place in (*places, *weight[2:]):
        factors.freeze(place, "it is a place in the picture")
    first, inside = weight[:2]
    if groups > 1:
        first = _grouped(factors, first, groups)
    if call["transposed"]:  # the weight is (in, out of a group, ...)
        factors.join(channels, first)
        own = factors.split(first, [groups, factors.size_of(first) // groups])[0]
        made = factors.merge([own, inside])
    else:
        parts = factors.split(channels, [groups, factors.size_of(channels) // groups])
        factors.join(parts[1], inside)
        own = factors.split(first, [groups, factors.size_of(first) // groups])[0]
        factors.join(parts[0], own)
        made = first
    if call["bias"] is not None:
        factors.join(made, call.dims(call["bias"])[0])
    return [[batch, made, *(call.fixed(size) for size in call.shapes[0][2:])]]


def _grouped(factors: Factors, dim: Dim, groups: int) -> Dim:
    return factors.merge(factors.split(dim, [groups, factors.size_of(dim) // groups]))


# ----- norms -----


def batch_norm(call: Call) -> Sequence[Dims]:
    """Channels with their weight, bias and statistics."""
    taken, *others = (call.dims(tensor) for tensor in call.tensors())
    for other in others:
        call.factors.join(taken[1], other[0])
    return [taken, *_kept(call, [taken[1]])]


def _kept(call: Call, dims: Dims) -> Sequence[Dims]:
    """Results after the first: statistics of these dims, or nothing."""
    sizes = [call.factors.size_of(dim) for dim in dims]
    return [
        dims if list(shape) == sizes else [call.fixed(size) for size in shape]
        for shape in call.shapes[1:]
    ]


def layer_norm(call: Call) -> Sequence[Dims]:
    """The dims that are normalized, with weight and bias."""
    taken, *others = (call.dims(tensor) for tensor in call.tensors())
    count = len(call["normalized_shape"])
    for other in others:
        for own, dim in zip(taken[-count:], other, strict=True):
            call.factors.join(own, dim)
    return [taken, *_kept(call, [*taken[:-count], *[((),)] * count])]


def group_norm(call: Call) -> Sequence[Dims]:
    """Channels are split into (group, channel of the group)."""
    taken, *others = (call.dims(tensor) for tensor in call.tensors())
    sizes = [call["group"], call["C"] // call["group"]]
    group, own = call.factors.split(taken[1], sizes)
    channels = call.factors.merge([group, own])
    for other in others:
        call.factors.join(channels, other[0])
    return [[taken[0], channels, *taken[2:]], *_kept(call, [taken[0], group])]


def weight_norm(call: Call) -> Sequence[Dims]:
    """A weight, and the lengths of its slices of one dim."""
    weight, lengths = call.dims(call["v"]), call.dims(call["g"])
    for dim, length in zip(weight, lengths, strict=True):
        if call.factors.size_of(dim) == call.factors.size_of(length):
            call.factors.join(dim, length)
    return [weight, lengths]
