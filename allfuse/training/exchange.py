"""The figures that every rank learns in each step of all that share a batch with it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import torch

if TYPE_CHECKING:
    from allfuse.fusion.gradients import GradientFusion
    from allfuse.link import Link

Losses: TypeAlias = Sequence[tuple[torch.Tensor, float]]
"""Losses of a step with the factor that makes each of them a sum."""


@dataclass(slots=True)
class Figures:
    """What all ranks said, one entry for each.

    losses: sums of losses, 0 of a rank without samples. counts: what the means are over. busy_s:
    seconds of own work in the step before. stops: what each rank wishes: 0 to go on, 1 to stop, 2
    to stop as it was interrupted.
    """

    losses: list[float]
    counts: list[float]
    busy_s: list[float]
    stops: list[int]

    @property
    def total(self) -> float:
        return sum(self.counts)

    @property
    def loss(self) -> float:
        """The mean loss of the whole batch; NaN where it is over nothing."""
        return sum(self.losses) / self.total if self.total else math.nan

    def first_not_finite(self) -> int | None:
        """The first rank whose own loss is NaN or infinite."""
        for rank, loss in enumerate(self.losses):
            if not math.isfinite(loss):
                return rank
        return None


class Exchange:
    """Four numbers of every rank. They travel with the first bucket of gradients where they can.

    Else (gradients of short types, or on a GPU) it is one sum of (n, 4) float64 over the data axis,
    sent while the backward pass runs: 32 n bytes. A rank alone sends nothing.
    """

    def __init__(self, link: Link, device: torch.device) -> None:
        self.link, self.device = link, device

    def start(
        self, losses: Losses, count: float, busy_s: float, stop: int, fusion: GradientFusion
    ) -> Callable[[], Figures]:
        """Tell the peers; the function that is returned waits for what they say."""
        if self.link.size == 1:
            read = _read_later(losses) if self.device.type == "cuda" else lambda: _sum(losses)
            return lambda: Figures([read()], [count], [busy_s], [stop])
        if fusion.carries and fusion.link.members == self.link.members:
            fusion.carry((_sum(losses), count, busy_s, stop))
            return lambda: _figures(fusion.carried())
        rows = torch.zeros(self.link.size, 4, dtype=torch.float64)
        on_host = self.device.type == "cpu"
        own = (_sum(losses) if on_host else 0.0, count, busy_s, stop)
        rows[self.link.rank] = torch.tensor(own, dtype=torch.float64)
        if not on_host:  # reading the losses would wait for the whole forward pass
            rows = rows.to(self.device, non_blocking=True)
            for loss, factor in losses:
                rows[self.link.rank, 0] += loss.double() * factor
        work = self.link.all_reduce(rows, "exchange losses and counts")

        def wait() -> Figures:
            work.wait()
            return _figures(rows.tolist())

        return wait


def _read_later(losses: Losses) -> Callable[[], float]:
    """Begin to bring the sum of losses here; what is returned waits for it, and for no backward
    pass that is queued after it."""
    total = torch.stack([loss.double() * factor for loss, factor in losses]).sum()
    here = torch.empty((), dtype=torch.float64, pin_memory=True)
    here.copy_(total, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()

    def read() -> float:
        arrived.synchronize()
        return float(here)

    return read


def _figures(rows: list[list[float]]) -> Figures:
    said, counts, busy, stops = (list(column) for column in zip(*rows, strict=True))
    return Figures(said, counts, busy, [int(stop) for stop in stops])


def _sum(losses: Losses) -> float:
    return sum(float(loss) * factor for loss, factor in losses)
