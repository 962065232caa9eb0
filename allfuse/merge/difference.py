"""Where two models on disk differ, tensor by tensor, in little memory.

x and y are the numbers of the two models, or, with a base, what each changed since it. Of each
tensor, and of several together:

    distance    |x - y| / |x|, in the L2 norm
    cosine      <x, y> / (|x| |y|)
    signs       the part of the places where either is not 0 at which both have one sign
    overlap     of the places of each tensor's 10 % largest |x|, and |y|: the part that both have
    largest     the largest |x - y|
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

from allfuse.base.errors import MergeError
from allfuse.base.order import natural
from allfuse.merge.grouping import Group, group_by, place_of
from allfuse.merge.header import FLOATS, Entry
from allfuse.merge.outline import BLOCK
from allfuse.merge.source import Source, open_source
from allfuse.merge.sums import Sums
from allfuse.merge.tying import with_ties_of

TOP = 0.1
"""The part of a tensor whose places are compared as its largest."""

Tell = Callable[..., None]


@dataclass(frozen=True)
class Pair:
    """One tensor, in both models and in the base."""

    name: str
    first: Entry
    second: Entry
    base: Entry | None

    @property
    def parts(self) -> tuple[Entry, Entry, Entry | None]:
        return self.first, self.second, self.base

    @property
    def bytes(self) -> int:
        return sum(entry.bytes for entry in self.parts if entry is not None)


@dataclass(frozen=True)
class Compared:
    """What is known of one tensor. dtypes: of the first model and of the second."""

    name: str
    shape: tuple[int, ...]
    dtypes: tuple[str, str]
    sums: Sums

    @property
    def is_float(self) -> bool:
        return all(dtype in FLOATS for dtype in self.dtypes)

    @property
    def place(self) -> tuple[str, str]:
        """Its layer, and which part of the layer it is."""
        return place_of(self.name)


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Where two models differ.

    Attributes:
        tensors: those that both have, in the order of their names, numbers in them as numbers.
        only_first, only_second: names of tensors that one of the models lacks.
        shaped: of tensors of other shapes in the models, what they are.
        tied: how many names more there are of the same tensors (tied weights).
    """

    first: str
    second: str
    base: str | None
    tensors: list[Compared]
    only_first: list[str]
    only_second: list[str]
    shaped: list[str]
    tied: int
    seconds: float = field(compare=False)

    @property
    def same(self) -> bool:
        """Whether the models have the same tensors with the same numbers."""
        others = self.only_first or self.only_second or self.shaped
        return not others and not any(each.sums.changed for each in self.tensors)

    @property
    def floats(self) -> list[Compared]:
        """Those of floating-point numbers: what follows is of these, for one counter outweighs all
        weights."""
        return [each for each in self.tensors if each.is_float]

    @property
    def whole(self) -> Sums:
        """All tensors together."""
        return sum((each.sums for each in self.floats), Sums())

    def layers(self) -> list[Group]:
        """The tensors of each layer together."""
        return group_by((each.place[0], each.sums) for each in self.floats)

    def kinds(self) -> list[Group]:
        """The tensors of each kind together, such as all layers' `mlp.up_proj.weight`."""
        return group_by((each.place[1], each.sums) for each in self.floats)

    def cells(self) -> dict[tuple[str, str], Sums]:
        """By layer and kind."""
        found: dict[tuple[str, str], Sums] = {}
        for each in self.floats:
            found[each.place] = found.get(each.place, Sums()) + each.sums
        return found


def compare(
    first: Path,
    second: Path,
    base: Path | None = None,
    *,
    threads: int | None = None,
    tell: Tell = lambda name, **data: None,
) -> Difference:
    """Compare two models on disk, in any form that can be fused.

    Each thread goes through one tensor at a time, block by block, so a process holds some blocks
    whatever the size of the models. The figures do not depend on the number of threads.

    Args:
        base: what the changes of both are counted from. threads: None: as many as there are cores.

    Raises:
        UserError: a model cannot be read, or the models have no tensor in common.
    """
    begun = time.monotonic()
    one = open_source(first)
    two = with_ties_of(one, open_source(second))
    start = None if base is None else with_ties_of(one, open_source(base))
    pairs = find_pairs(one, two, start)
    tell("comparing", bytes=0, total=sum(pair.bytes for pair in pairs))
    sums = _compare_all(pairs, threads or os.cpu_count() or 1, tell)
    tensors = [
        Compared(pair.name, pair.first.shape, (pair.first.dtype, pair.second.dtype), own)
        for pair, own in zip(pairs, sums, strict=True)
    ]
    names = [one.entries.keys(), two.entries.keys()]
    return Difference(
        first=str(one.path),
        second=str(two.path),
        base=None if start is None else str(start.path),
        tensors=tensors,
        only_first=[name for name in names[0] if name not in names[1]],
        only_second=[name for name in names[1] if name not in names[0]],
        shaped=[
            f"{name} {list(one.entries[name].shape)} and {list(two.entries[name].shape)}"
            for name in names[0]
            if name in names[1] and one.entries[name].shape != two.entries[name].shape
        ],
        tied=len(one.tied),
        seconds=time.monotonic() - begun,
    )


def find_pairs(one: Source, two: Source, base: Source | None) -> list[Pair]:
    """The tensors that can be compared, each once.

    Raises:
        MergeError: there are none, or the base lacks one of them.
    """
    pairs = []
    for name in sorted(one.entries, key=natural):
        own, other = one.entries[name], two.entries.get(name)
        if name in one.tied or other is None or other.shape != own.shape:
            continue
        start = None if base is None else base.entries.get(name)
        if base is not None and (start is None or start.shape != own.shape):
            raise MergeError(
                f"{base.path} has no {name} {list(own.shape)}, as {one.path} and {two.path} have; "
                "next: the base that both come from"
            )
        pairs.append(Pair(name, own, other, start))
    if not pairs:
        raise MergeError(
            f"{one.path} and {two.path} have no tensor of the same name and shape in common; the "
            f"first has {next(iter(one.entries), 'none')}, the second "
            f"{next(iter(two.entries), 'none')}"
        )
    return pairs


def _compare_all(pairs: list[Pair], threads: int, tell: Tell) -> list[Sums]:
    """The sums of each pair, large ones first, so that no thread is left alone with one."""
    import torch

    from allfuse.merge.blocks import Files
    from allfuse.merge.comparing import compare_tensor

    found: dict[int, Sums] = {}
    files, before = Files(), torch.get_num_threads()
    torch.set_num_threads(1)  # each block in one thread, so that its bits do not depend on them
    try:
        with ThreadPoolExecutor(threads, "allfuse-diff") as pool:
            order = sorted(range(len(pairs)), key=lambda at: -pairs[at].bytes)
            ends = {
                pool.submit(compare_tensor, files, pairs[at].parts, BLOCK, TOP): at for at in order
            }
            try:
                for end in as_completed(ends):
                    found[ends[end]] = end.result()
                    tell("compared_tensor", bytes=pairs[ends[end]].bytes)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    except OSError as error:
        raise MergeError(f"a model cannot be read: {error}") from error
    finally:
        torch.set_num_threads(before)
        files.close()
    return [found[at] for at in range(len(pairs))]
