"""When the weights of a run are averaged along its steps, and how much each moment counts.

Lives beside the outer optimizers because it is one more answer to when weights are fused and what
becomes of them: here one replica's with its own earlier ones, which training never takes up again.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from allfuse.base.errors import JobError


@dataclass(frozen=True, kw_only=True)
class Averaging(ABC):
    """An average of weights along the steps: avg + share * (weights - avg) now and then.

    The first time it is a copy.

    Attributes:
        every: steps from one time to the next, or "epoch": at the end of each.
        start: no step before this one counts.
        renews_statistics: whether BatchNorm's statistics are taken anew for it at the end, or are
            averaged as weights are.
    """

    name: ClassVar[str]
    renews_statistics: ClassVar[bool] = False
    every: int | str = 1
    start: int = 0

    def __post_init__(self) -> None:
        every: object = self.every
        if every != "epoch" and (type(every) is not int or every < 1):
            raise self._refusal("every", "a whole number of steps from 1, or 'epoch'")
        if type(self.start) is not int or self.start < 0:
            raise self._refusal("start", "a whole number of steps from 0")

    def _refusal(self, name: str, allowed: str) -> JobError:
        received = getattr(self, name)
        return JobError(
            f"{type(self).__name__}({name}=...): received {received!r}; allowed: {allowed}"
        )

    def is_due(self, steps: int, ends_epoch: bool) -> bool:
        """Whether weights count after so many steps of the run."""
        if steps < self.start:
            return False
        return ends_epoch if self.every == "epoch" else steps % int(self.every) == 0

    @abstractmethod
    def share(self, updates: int) -> float:
        """How much the weights count when so many have counted already, at least one."""


@dataclass(frozen=True, kw_only=True)
class EMA(Averaging):
    """The exponential moving average: decay * avg + (1 - decay) * weights (Polyak and Juditsky
    1992, doi:10.1137/0330046, with weights that fade as in Tarvainen and Valpola 2017,
    arXiv:1703.01780).

    With `warmup` the decay is at most (1 + n) / (10 + n) after n times, so that early weights do
    not stay in a short run's average for long.

    Example:
        af.Job(..., average=af.EMA(decay=0.999))
    """

    name: ClassVar[str] = "ema"
    decay: float = 0.999
    warmup: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        decay: object = self.decay
        if isinstance(decay, bool) or not isinstance(decay, int | float) or not 0 <= decay < 1:
            raise self._refusal("decay", "a number from 0 to below 1, such as 0.999")
        if not isinstance(self.warmup, bool):
            raise self._refusal("warmup", "True or False")

    def share(self, updates: int) -> float:
        most = (1 + updates) / (10 + updates)
        return 1.0 - (min(self.decay, most) if self.warmup else self.decay)


@dataclass(frozen=True, kw_only=True)
class SWA(Averaging):
    """Stochastic weight averaging: the mean of all weights since `start` (Izmailov et al. 2018,
    arXiv:1803.05407, algorithm 1). BatchNorm's statistics are taken anew at the end, in one pass
    over the training data.

    Example:
        af.Job(..., average=af.SWA(start=1000, every=100))
    """

    name: ClassVar[str] = "swa"
    renews_statistics: ClassVar[bool] = True

    def share(self, updates: int) -> float:
        return 1.0 / (updates + 1)
