"""Operators that put numbers elsewhere, or look along a dim."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch

from allfuse.merge.align.call import Call, Dims, broadcast
from allfuse.merge.align.computing import filled

# ----- along a dim -----


def reduce(call: Call) -> Sequence[Dims]:
    """A statistic of whole dims, for which their order does not matter."""
    taken = call.dims(call.tensors()[0])
    made = _without(taken, _places(call, len(taken)), call["keepdim"])
    return [made for _ in call.shapes]


def find_place(call: Call) -> Sequence[Dims]:
    """The place of a number along a dim."""
    taken = call.dims(call.tensors()[0])
    if len(call.shapes) == 1 and not call.name.startswith("arg"):
        return reduce(call)  # the number alone
    for place in _places(call, len(taken)):
        call.factors.freeze(taken[place], "places are counted along it")
    return [_without(taken, _places(call, len(taken)), call["keepdim"]) for _ in call.shapes]


def in_order(call: Call) -> Sequence[Dims]:
    """The order along a dim matters; the result may be of another length there."""
    taken = call.dims(call.tensors()[0])
    places = _places(call, len(taken))
    for place in places:
        call.factors.freeze(taken[place], "its order matters")
    return [
        [call.fixed(size) if i in places else taken[i] for i, size in enumerate(shape)]
        for shape in call.shapes
    ]


def _places(call: Call, count: int) -> list[int]:
    """Which dims an argument named dim or dims says; all, if it says none."""
    said = call["dims"] if call["dims"] is not None else call["dim"]
    if said is None or said == []:
        return list(range(count))
    return [place % max(count, 1) for place in (said if isinstance(said, list | tuple) else [said])]


def _without(dims: Dims, places: Sequence[int], keep: bool | None) -> Dims:
    kept = [((),) if i in places else dim for i, dim in enumerate(dims)]
    return kept if keep else [dim for i, dim in enumerate(kept) if i not in places]


def pool(call: Call) -> Sequence[Dims]:
    """Places of a picture are put together, or made more; channels stay apart."""
    taken = call.dims(call.tensors()[0])
    count = int(re.findall(r"([123])d", call.name)[-1])
    for place in taken[-count:]:
        call.factors.freeze(place, "it is a place in the picture")
    return [
        [*taken[:-count], *(call.fixed(size) for size in shape[-count:])] for shape in call.shapes
    ]


# ----- shapes -----


def view(call: Call) -> Sequence[Dims]:
    if call["dtype"] is not None:  # the same bytes as numbers of another type
        return frozen(call)
    return [call.factors.view(call.dims(call.tensors()[0]), call.shapes[0])]


def transpose(call: Call) -> Sequence[Dims]:
    dims = call.dims(call.tensors()[0])
    if call.name == "t":
        return [dims[::-1]]
    if call.name == "permute":
        return [[dims[place] for place in call["dims"]]]
    one, other = call["dim0"], call["dim1"]
    dims = list(dims)
    dims[one], dims[other] = dims[other], dims[one]
    return [dims]


def squeeze(call: Call) -> Sequence[Dims]:
    dims = call.dims(call.tensors()[0])
    left_out = _places(call, len(dims))
    return [
        [
            dim
            for place, dim in enumerate(dims)
            if place not in left_out or call.factors.size_of(dim) != 1
        ]
    ]


def unsqueeze(call: Call) -> Sequence[Dims]:
    dims = list(call.dims(call.tensors()[0]))
    dims.insert(call["dim"] % (len(dims) + 1), ((),))
    return [dims]


def expand(call: Call) -> Sequence[Dims]:
    """One number for a whole dim: any order of it is the same."""
    return [broadcast(call, [call.dims(call.tensors()[0])], call.shapes[0])]


def repeat(call: Call) -> Sequence[Dims]:
    dims, times = call.dims(call.tensors()[0]), list(call["repeats"])
    dims = [((),)] * (len(times) - len(dims)) + dims
    single = [call.factors.size_of(dim) == 1 for dim in dims]
    return [
        [
            call.factors.new(count) if one else dim * count
            for dim, count, one in zip(dims, times, single, strict=True)
        ]
    ]


def join_ends(call: Call) -> Sequence[Dims]:
    """cat."""
    taken = [dims for each in call.tensors() if (dims := call.dims(each)) != [()]]
    place = call["dim"] % len(taken[0])
    made = list(taken[0])
    for other in taken[1:]:
        for own, dim in [*enumerate(other[:place]), *enumerate(other[place + 1 :], place + 1)]:
            call.factors.join(made[own], dim)
    made[place] = tuple(stretch for dims in taken for stretch in dims[place])
    return [made]


def stack(call: Call) -> Sequence[Dims]:
    taken = [call.dims(each) for each in call.tensors()]
    sizes = [call.factors.size_of(dim) for dim in taken[0]]
    made = broadcast(call, taken, sizes)
    made.insert(call["dim"] % (len(made) + 1), call.fixed(len(taken)))
    return [made]


def take_parts(call: Call) -> Sequence[Dims]:
    """split, split_with_sizes: stretches of a dim, one after the other."""
    dims, made, begin = call.dims(call.tensors()[0]), [], 0
    place = call["dim"] % len(dims)
    for shape in call.shapes:
        end = begin + shape[place]
        own = call.factors.part(dims[place], begin, end)
        made.append([*dims[:place], own, *dims[place + 1 :]])
        begin = end
    return made


def take_slice(call: Call) -> Sequence[Dims]:
    dims = call.dims(call.tensors()[0])
    place = call["dim"] % len(dims)
    size = call.factors.size_of(dims[place])
    begin, end, step = slice(call["start"], call["end"], call["step"]).indices(size)
    if step != 1:
        call.factors.freeze(dims[place], "each so many are taken of it")
        own = call.fixed(call.shapes[0][place])
    else:
        own = call.factors.part(dims[place], begin, max(begin, end))
    return [[*dims[:place], own, *dims[place + 1 :]]]


def take_places(call: Call) -> Sequence[Dims]:
    """select, unbind: single places of a dim, which stay where they are."""
    dims = call.dims(call.tensors()[0])
    place = call["dim"] % len(dims)
    size = call.factors.size_of(dims[place])
    chosen = range(size) if call["index"] is None else [call["index"] % size]
    for each in chosen:
        call.factors.part(dims[place], each, each + 1)
    return [[*dims[:place], *dims[place + 1 :]] for _ in chosen]


def pad(call: Call) -> Sequence[Dims]:
    """constant_pad_nd: one number before and after."""
    dims, sizes = list(call.dims(call.tensors()[0])), call["pad"]
    for back, (before, after) in enumerate(zip(sizes[::2], sizes[1::2], strict=True), 1):
        if before < 0 or after < 0:
            call.factors.freeze(dims[-back], "its ends are cut off")
            dims[-back] = call.fixed(call.shapes[0][-back])
        else:
            ends = call.factors.new(before), call.factors.new(after)
            dims[-back] = (*ends[0], *dims[-back], *ends[1])
    return [dims]


def shuffle_pixels(call: Call) -> Sequence[Dims]:
    """pixel_shuffle: channels (c, r, r) become places."""
    dims = call.dims(call.tensors()[0])
    square = call["upscale_factor"] ** 2
    channels, inner = call.factors.split(
        dims[-3], [call.factors.size_of(dims[-3]) // square, square]
    )
    for dim in (inner, *dims[-2:]):
        call.factors.freeze(dim, "it is a place in the picture")
    return [[*dims[:-3], channels, *(call.fixed(size) for size in call.shapes[0][-2:])]]


def shuffle_channels(call: Call) -> Sequence[Dims]:
    """channel_shuffle: (group, channel of the group) becomes (channel, group)."""
    dims, groups = list(call.dims(call.tensors()[0])), call["groups"]
    parts = call.factors.split(dims[1], [groups, call.factors.size_of(dims[1]) // groups])
    dims[1] = call.factors.merge(parts[::-1])
    return [dims]


def halve(call: Call) -> Sequence[Dims]:
    """glu: the second half of a dim is the gate of the first."""
    dims = list(call.dims(call.tensors()[0]))
    place = call["dim"] % len(dims)
    half = call.factors.size_of(dims[place]) // 2
    one, other = (call.factors.part(dims[place], i * half, (i + 1) * half) for i in (0, 1))
    call.factors.join(one, other)
    dims[place] = one
    return [dims]


# ----- tables and places -----


def embedding(call: Call) -> Sequence[Dims]:
    """Rows of a table by their places."""
    table = call.dims(call["weight"])
    call.factors.freeze(table[0], "its rows are asked for by their places")
    return [[*call.dims(call["indices"]), *table[1:]]]


def choose(call: Call) -> Sequence[Dims]:
    """index_select: along one dim by places."""
    dims = list(call.dims(call.tensors()[0]))
    place = call["dim"] % len(dims)
    call.factors.freeze(dims[place], "it is asked for by places")
    dims[place] = call.fixed(call.shapes[0][place])
    return [dims]


def index(call: Call) -> Sequence[Dims]:
    """x[i]: one tensor of places keeps the other dims; several hold all in their order."""
    taken, chosen = call.dims(call["self"]), call["indices"]
    said = [place for place, each in enumerate(chosen) if each is not None]
    if len(said) != 1 or chosen[said[0]].dtype in (torch.bool, torch.uint8):
        return frozen(call)
    (place,) = said
    call.factors.freeze(taken[place], "it is asked for by places")
    return [[*taken[:place], *call.dims(chosen[place]), *taken[place + 1 :]]]


def gather(call: Call) -> Sequence[Dims]:
    """By places along one dim, of which each row has its own."""
    taken, places = call.dims(call["self"]), list(call.dims(call["index"]))
    along = call["dim"] % len(taken)
    for i, (dim, other) in enumerate(zip(taken, places, strict=True)):
        if i == along or call.factors.size_of(dim) != call.factors.size_of(other):
            call.factors.freeze(dim, "it is asked for by places")
            call.factors.freeze(other, "it is asked for by places")
        else:
            call.factors.join(dim, other)
    return [places]


def frozen(call: Call) -> Sequence[Dims]:
    """Nothing that goes in may move."""
    for tensor in call.tensors():
        for dim in call.dims(tensor):
            call.factors.freeze(dim, "places matter there")
    return filled(call)
