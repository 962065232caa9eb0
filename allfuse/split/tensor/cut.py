"""A cut of a tensor into pieces, one for each rank, and how a call of torch passes cuts on.

No table of operators: a call is tried on pieces of random numbers, and passes cuts on if what comes
out are pieces of what the whole call gives. So whatever torch can do may stand between two layers
that are cut, and nothing is taken on trust.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from allfuse.base.tensors import share
from allfuse.split.piece import Piece, cut_piece
from allfuse.split.record import (
    Call,
    Recording,
    Ref,
    argument_leaves,
    list_spans,
    map_arguments,
    tensors_in,
)

NOT_TAKEN = (RuntimeError, TypeError, ValueError, IndexError)
"""What torch raises for arguments that do not fit each other."""


@dataclass(frozen=True)
class Cut:
    """A tensor cut along `dim`, where parts of these sizes lie one after the other.

    Of every part each rank has a run, as even as they can be in multiples of `unit` (the size of a
    head of attention). Several parts are several things packed into one tensor, as queries, keys
    and values are.
    """

    dim: int
    parts: tuple[int, ...]
    unit: int = 1

    @property
    def size(self) -> int:
        return sum(self.parts)

    def reaches(self, n: int) -> bool:
        """Whether every rank gets something of every part."""
        return all(part % self.unit == 0 and part // self.unit >= n for part in self.parts)

    def is_even(self, n: int) -> bool:
        """Whether every rank gets as much."""
        return all(part % n == 0 for part in self.parts)

    def runs(self, n: int, index: int) -> list[tuple[int, int]]:
        """Where the run of rank `index` of n begins and ends, within each part."""
        return [_run_of(part, self.unit, n, index) for part in self.parts]

    def piece(self, tensor: Tensor, n: int, index: int) -> Tensor:
        """What rank `index` of n has. Several parts are copied, one is a view."""
        parts = tensor.split(list(self.parts), self.dim)
        pieces = [
            part.narrow(self.dim, start, stop - start)
            for part, (start, stop) in zip(parts, self.runs(n, index), strict=True)
        ]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, self.dim)

    def lie(self, shape: tuple[int, ...], n: int, index: int) -> Piece:
        """Where the piece of rank `index` of n lies in a tensor of a shape."""
        return cut_piece(shape, self.dim, self.parts, self.runs(n, index))

    def join(self, pieces: list[Tensor]) -> Tensor:
        """The whole of what all ranks have."""
        n = len(pieces)
        split = [
            piece.split([stop - start for start, stop in self.runs(n, index)], self.dim)
            for index, piece in enumerate(pieces)
        ]
        return torch.cat(list(itertools.chain(*zip(*split, strict=True))), self.dim)


@dataclass(frozen=True)
class Size:
    """A number among the arguments of a call that is smaller for a piece: what it is for the whole,
    and what it comes in multiples of."""

    whole: int
    unit: int = 1

    def of(self, n: int, index: int) -> int:
        start, stop = _run_of(self.whole, self.unit, n, index)
        return stop - start


def _run_of(size: int, unit: int, n: int, index: int) -> tuple[int, int]:
    start, stop = share(size // unit, n, index)
    return start * unit, stop * unit


@dataclass(frozen=True)
class Passed:
    """What a call makes of cuts.

    Attributes:
        outputs: how each output is cut; None where all ranks have the whole.
        parameters: how parameters among its inputs have to be cut, by their number.
        whole: parameters among its inputs that stay whole.
        sizes: arguments that are smaller for a piece, by their place among all arguments.
    """

    outputs: tuple[Cut | None, ...]
    parameters: Mapping[int, Cut]
    whole: tuple[int, ...]
    sizes: Mapping[int, Size]


Cuts = Mapping[int, Cut]


class Passing:
    """Passes cuts into n pieces on through the calls of a recording, and remembers the outcomes."""

    def __init__(self, recording: Recording, n: int) -> None:
        self.recording, self.n = recording, n
        self._known: dict[Any, Passed | None] = {}

    def through(self, call: Call, cuts: Cuts) -> Passed | None:
        """What a call makes of its inputs that are cut. None where it mixes what would be cut."""
        key = self._signature(call, cuts)
        if key not in self._known:
            found = self._try(call, cuts)
            self._known[key] = None if found is None else _numbered(found, call.inputs)
        known = self._known[key]
        return None if known is None else _renumbered(known, call.inputs)

    def _signature(self, call: Call, cuts: Cuts) -> Any:
        """Equal for calls that differ in the numbers of their values alone."""
        place = {number: at for at, number in enumerate(call.inputs)}
        described = map_arguments(
            lambda x: f"%{place[x.number]}" if isinstance(x, Ref) else repr(x), call.arguments
        )
        about = [
            (self.recording.shapes[i], self.recording.dtypes[i], cuts.get(i), self._is_parameter(i))
            for i in call.inputs
        ]
        return repr((call.name, described, about))

    def _is_parameter(self, number: int) -> bool:
        return number in self.recording.parameters or number in self.recording.buffers

    def _try(self, call: Call, cuts: Cuts) -> Passed | None:
        generator = torch.Generator().manual_seed(0)
        values = {i: self._sample(i, generator) for i in call.inputs}
        try:
            whole = _run(call, values, {})
        except NOT_TAKEN:
            return None  # random numbers are none that it takes
        parameters = [i for i in call.inputs if self._is_parameter(i) and i not in cuts]
        for also in self._choices(parameters, cuts):
            for sizes in self._sizes(call, cuts):
                outputs = self._compare(call, values, whole, {**cuts, **also}, sizes)
                if outputs is not None:
                    kept = tuple(i for i in parameters if i not in also)
                    return Passed(outputs, also, kept, sizes)
        return None

    def _sample(self, number: int, generator: torch.Generator) -> Tensor:
        shape, dtype = self.recording.shapes[number], self.recording.dtypes[number]
        if dtype.is_floating_point or dtype.is_complex:
            return torch.randn(shape, generator=generator).to(dtype)
        make = torch.ones if dtype == torch.bool else torch.zeros
        return make(shape, dtype=dtype)

    def _choices(self, parameters: list[int], cuts: Cuts) -> Iterator[dict[int, Cut]]:
        """Parameters stay whole; or those of the size of what is cut are cut as it is."""
        yield {}
        like: dict[int, Cut] = {}
        for number in parameters:
            shape = self.recording.shapes[number]
            for cut in cuts.values():
                dims = [dim for dim, size in enumerate(shape) if size == cut.size]
                if len(dims) == 1 and number not in like:
                    like[number] = Cut(dims[0], cut.parts, cut.unit)
        if like:
            yield like

    def _sizes(self, call: Call, cuts: Cuts) -> Iterator[dict[int, Size]]:
        """Arguments stay what they are; or one of them is that of a piece; or all of those in one
        list, such as the lengths of parts."""
        yield {}
        ints = {
            place: leaf
            for place, leaf in enumerate(argument_leaves(call.arguments))
            if type(leaf) is int and leaf > 1
        }
        units = [dict.fromkeys(ints, 1)]
        for cut in cuts.values():
            units.append(dict.fromkeys(ints, cut.unit))
            units.append({place: leaf // cut.size for place, leaf in ints.items()})
        for number, unit in enumerate(units):
            if unit in units[:number]:
                continue
            able = {
                place: Size(leaf, unit[place])
                for place, leaf in ints.items()
                if unit[place] and leaf % unit[place] == 0 and leaf // unit[place] >= self.n
            }
            for place, size in able.items():
                yield {place: size}
            for begin, end in list_spans(call.arguments):
                several = {place: size for place, size in able.items() if begin <= place < end}
                if len(several) > 1:
                    yield several

    def _compare(
        self,
        call: Call,
        values: Mapping[int, Tensor],
        whole: list[Tensor],
        cuts: Cuts,
        sizes: Mapping[int, Size],
    ) -> tuple[Cut | None, ...] | None:
        """How outputs are cut when inputs are. None where they are no pieces of the whole."""
        n = self.n
        pieces = []
        for index in (0, n - 1):
            own = {i: cuts[i].piece(v, n, index) if i in cuts else v for i, v in values.items()}
            try:
                here = {at: size.of(n, index) for at, size in sizes.items()}
                pieces.append(_run(call, own, here))
            except NOT_TAKEN:
                return None
        if any(len(each) != len(whole) for each in pieces):
            return None
        found: list[Cut | None] = []
        for full, first, last in zip(whole, *pieces, strict=True):
            if first.shape == full.shape and _same(first, full) and _same(last, full):
                found.append(None)
                continue
            cut = self._find(full, first, last, cuts)
            if cut is None:
                return None
            found.append(cut)
        return tuple(found)

    def _find(self, full: Tensor, first: Tensor, last: Tensor, cuts: Cuts) -> Cut | None:
        """The cut of which these are the first and the last piece."""
        n = self.n
        if first.dim() != full.dim():
            return None
        for dim in [d for d in range(full.dim()) if first.shape[d] < full.shape[d]]:
            size = full.shape[dim]
            options = [(size,), *(cut.parts for cut in cuts.values() if cut.size == size)]
            options += [(size // k,) * k for k in (3, 2) if size % k == 0]
            units = [1, *(cut.unit for cut in cuts.values())]
            units += [size // cut.size for cut in cuts.values() if size % cut.size == 0]
            for parts, unit in itertools.product(dict.fromkeys(options), dict.fromkeys(units)):
                cut = Cut(dim, parts, unit)
                if (
                    cut.reaches(n)
                    and _same(first, cut.piece(full, n, 0))
                    and _same(last, cut.piece(full, n, n - 1))
                ):
                    return cut
        return None


def _run(call: Call, values: Mapping[int, Tensor], sizes: Mapping[int, int]) -> list[Tensor]:
    """The outputs of a call with these values for its inputs, and these sizes in its arguments."""
    used = {number: value.clone() for number, value in values.items()}
    count = itertools.count()

    def fill(leaf: Any) -> Any:
        place = next(count)
        return used[leaf.number] if isinstance(leaf, Ref) else sizes.get(place, leaf)

    placed, named = map_arguments(fill, call.arguments)
    with torch.no_grad():
        result = call.function(*placed, **named)
    return [placed[0]] if call.in_place else list(tensors_in(result))


def _same(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape:
        return False
    if not one.dtype.is_floating_point:
        return torch.equal(one, other)
    loose = {torch.float32: 1e-5, torch.float64: 1e-10}.get(one.dtype, 2e-2)
    return torch.allclose(one, other, rtol=loose, atol=loose, equal_nan=True)


def _numbered(passed: Passed, inputs: tuple[int, ...]) -> Passed:
    """With places among the inputs instead of numbers of values."""
    place = {number: at for at, number in enumerate(inputs)}
    return _with_numbers(passed, place.__getitem__)


def _renumbered(passed: Passed, inputs: tuple[int, ...]) -> Passed:
    return _with_numbers(passed, inputs.__getitem__)


def _with_numbers(passed: Passed, number: Callable[[int], int]) -> Passed:
    return Passed(
        passed.outputs,
        {number(i): cut for i, cut in passed.parameters.items()},
        tuple(number(i) for i in passed.whole),
        passed.sizes,
    )
