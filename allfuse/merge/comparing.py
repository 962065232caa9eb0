"""Goes through a tensor of two models, block by block, and sums what figures follow from."""

from __future__ import annotations

import torch
from torch import Tensor

from allfuse.merge.blocks import Files
from allfuse.merge.course import Found
from allfuse.merge.header import Entry
from allfuse.merge.sums import Sums
from allfuse.rule.ranks import top
from allfuse.rule.sift import Sift, Stretch


@torch.no_grad()
def compare_tensor(
    files: Files, parts: tuple[Entry, Entry, Entry | None], block: int, density: float
) -> Sums:
    """The sums of a tensor: of the first model, the second, and the base, which may be None.

    Args:
        block: numbers that are held at once. density: the part of the tensor that counts as its
            largest.
    """
    first = parts[0]
    blocks = [(begin, min(block, first.count - begin)) for begin in range(0, first.count, block)]
    sift = top(density, first.count) if first.is_float and first.count else None
    found = [Found(), Found()]
    for turn in range(sift.turns if sift else 0):
        assert sift is not None
        running = turn in sift.running
        for number, (begin, count) in enumerate(blocks):
            for own, values in zip(found, _read(files, parts, begin, count), strict=True):
                stretch = Stretch(values, begin, first.shape)
                own.take(number, sift.measure(turn, stretch, own.at(number, sift.running)), running)
        for own in found:
            own.close_turn()
    sums = Sums()
    for number, (begin, count) in enumerate(blocks):
        x, y = _read(files, parts, begin, count)
        sums += _sums(x, y)
        if sift is not None:
            tops = [
                _largest(sift, Stretch(values, begin, first.shape), own.at(number, sift.running))
                for own, values in zip(found, (x, y), strict=True)
            ]
            held = sum(int(each.count_nonzero()) for each in tops)
            sums += Sums(common=int((tops[0] & tops[1]).count_nonzero()), top=held / 2)
    return sums


def _read(
    files: Files, parts: tuple[Entry, Entry, Entry | None], begin: int, count: int
) -> tuple[Tensor, Tensor]:
    """A block of both, or of their changes: float32; of tensors of whole numbers float64."""
    first, second, base = parts
    dtype = torch.float32 if first.is_float else torch.float64
    values = [files.read(entry, begin, count).to(dtype) for entry in (first, second)]
    if base is not None:
        start = files.read(base, begin, count).to(dtype)
        values = [each - start for each in values]
    return values[0], values[1]


def _sums(x: Tensor, y: Tensor) -> Sums:
    change = x - y
    signed = (x != 0) | (y != 0)
    return Sums(
        count=len(x),
        changed=int((x != y).count_nonzero()),
        difference=_total(change.square()),
        first=_total(x.square()),
        second=_total(y.square()),
        product=_total(x * y),
        agreeing=int(((x.sign() == y.sign()) & signed).count_nonzero()),
        signed=int(signed.count_nonzero()),
        largest=float(change.abs_().max()),
    )


def _total(values: Tensor) -> float:
    return float(values.sum())  # of float32 in a tree, which loses less than a digit of the last


def _largest(sift: Sift, stretch: Stretch, found: list[Tensor]) -> Tensor:
    """Which of a block are among the largest of the tensor: a mask. Takes its values."""
    return sift.apply(stretch, found) != 0
