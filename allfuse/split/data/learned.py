"""What of coming batches was learned from already, by workers that were ahead of others."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from allfuse.base.tensors import share
from allfuse.split.data.permutation import Indices


class Stretch(NamedTuple):
    """Part `part` of `parts` of the batches of `steps` steps, from step `first` of the run on."""

    first: int
    steps: int
    part: int
    parts: int

    @property
    def end(self) -> int:
        return self.first + self.steps


class Learned:
    """Parts of batches that were learned from out of turn: a run that goes on leaves them out.

    >>> Learned([Stretch(7, 1, part=0, parts=2)]).left(np.arange(5), step=7)
    array([2, 3, 4])
    """

    def __init__(self, stretches: Iterable[Sequence[int]] = ()) -> None:
        self.stretches = [Stretch(*each) for each in stretches]

    def __bool__(self) -> bool:
        return bool(self.stretches)

    def __iter__(self) -> Iterator[Stretch]:
        return iter(self.stretches)

    @property
    def end(self) -> int:
        """The first step from which on nothing was learned; 0 for nothing at all."""
        return max((each.end for each in self.stretches), default=0)

    def after(self, step: int) -> Learned:
        """Without what lies before a step."""
        return Learned(each for each in self.stretches if each.end > step)

    def plain(self) -> list[list[int]]:
        """As lists of numbers, which make it again."""
        return [list(each) for each in self.stretches]

    def left(self, batch: Indices, step: int) -> Indices:
        """What of the batch of a step nobody has learned from, in its order."""
        gone = [each for each in self.stretches if each.first <= step < each.end]
        if not gone:
            return batch
        keeps = np.ones(len(batch), dtype=bool)
        for each in gone:
            keeps[slice(*share(len(batch), each.parts, each.part))] = False
        return batch[keeps]

    def rest(self, whole: int, parts: int, every: int) -> list[list[Stretch]]:
        """What is left of the steps from `whole` to `end`, to be shared out: for some steps at a
        time, at most `every`, the parts that nobody has learned from.

        Args:
            parts: into how many batches are cut of which nothing was learned.
        """
        blocks: list[list[Stretch]] = []
        for step in range(whole, self.end):
            gone = [each for each in self.stretches if each.first <= step < each.end]
            count = gone[0].parts if gone else parts
            left = [part for part in range(count) if part not in {each.part for each in gone}]
            before = blocks[-1] if blocks else []
            same = [(each.part, each.parts) for each in before] == [(p, count) for p in left]
            if left and same and before[0].end == step and before[0].steps < every:
                blocks[-1] = [each._replace(steps=each.steps + 1) for each in before]
            elif left:
                blocks.append([Stretch(step, 1, part, count) for part in left])
        return blocks
