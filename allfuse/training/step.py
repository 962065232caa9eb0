"""A step of training on one rank, as far as it has come."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from allfuse.split.data import Portion
from allfuse.training.exchange import Figures
from allfuse.training.learner import Learner


class Step:
    """A step under way, or the one done last.

    portion: this rank's samples; None when the script brings its own. group: the shares of the
    ranks of its data axis, by their places in `portion.shares`. handed: what a script got for it.
    idle: this rank's site has no
    sample of the batch. counted: it counts as done already, though losses of the same batch may
    still come. busy_s: seconds of its own work on the batch, without those in which it waited for
    others. stepped: the learners whose optimizers have stepped. left_open: those that had
    gradients and had not stepped when it was counted.
    """

    def __init__(self, portion: Portion | None, group: Sequence[int], size: int) -> None:
        self.portion, self.group, self._size = portion, list(group), size
        self.handed: Any = None
        self.begin = time.perf_counter()
        self.waited_s = 0.0
        self.busy_s = 0.0
        self.losses: list[tuple[Tensor, float]] = []
        self.count = 0.0
        self.pending: Callable[[], Figures] | None = None
        self.figures: Figures | None = None
        self.norm: float | None = None
        self.differentiated: list[Learner] = []
        self.stepped: list[Learner] = []
        self.left_open: list[Learner] = []
        self.passed = False
        self.counted = False

    @property
    def idle(self) -> bool:
        return self.portion is not None and self.reference == 0

    @property
    def reference(self) -> float:
        """Samples of the whole batch that the group shares; 1 a rank when nobody knows.

        0 where a site has no sample of a batch: then it is idle and learns nothing.
        """
        if self.portion is None:
            return float(self._size)
        return float(sum([self.portion.shares[index] for index in self.group]))

    @property
    def weights(self) -> list[float]:
        """How much each rank of the group counts: its samples, all alike when nobody knows."""
        if self.portion is None:
            return [1.0] * self._size
        return [float(self.portion.shares[index]) for index in self.group]

    def keep_peers(self, places: Sequence[int]) -> None:
        self.group, self._size = [self.group[place] for place in places], len(places)

    @property
    def takes_part(self) -> bool:
        """Whether this rank has samples of its own; else it works on a stand-in of weight 0."""
        return self.portion is None or self.portion.rows > 0

    @property
    def learned(self) -> bool:
        """Whether the whole batch has been differentiated."""
        return self.figures is not None or bool(self.stepped) or self.passed
