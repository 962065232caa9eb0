"""The figures that every rank of a data axis learns of all others in each step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from allfuse.link import Link, Work


@dataclass(frozen=True)
class Figures:
    """What all ranks said, one entry for each.

    losses: sums of losses. counts: what the means are over. busy_s: seconds of own work in the step
    before. stops: what each rank wishes: 0 to go on, 1 to stop, 2 to stop as it was interrupted.
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
        """The mean loss of the whole batch. A rank without samples says nothing."""
        said = [loss for loss, count in zip(self.losses, self.counts, strict=True) if count > 0]
        return sum(said) / self.total if self.total else math.nan

    def first_not_finite(self) -> int | None:
        """The first rank whose own loss is NaN or infinite."""
        for rank, loss in enumerate(self.losses):
            if not math.isfinite(loss):
                return rank
        return None


class Exchange:
    """One sum of (n, 4) float64 over the data axis: every rank fills its own row.

    Sent while the backward pass runs, so it costs 32 n bytes and no waiting of its own.
    """

    def __init__(self, link: Link, device: torch.device) -> None:
        self.link, self.device = link, device

    def start(self, loss: float, count: float, busy_s: float, stop: int) -> Pending:
        rows = torch.zeros(self.link.size, 4, dtype=torch.float64)
        rows[self.link.rank] = torch.tensor((loss, count, busy_s, stop), dtype=torch.float64)
        rows = rows.to(self.device)
        return Pending(rows, self.link.all_reduce(rows, "exchange losses and counts"))


class Pending:
    """An exchange under way."""

    def __init__(self, rows: torch.Tensor, work: Work) -> None:
        self.rows, self.work = rows, work

    def wait(self) -> Figures:
        self.work.wait()
        losses, counts, busy, stops = self.rows.t().tolist()
        return Figures(losses, counts, busy, [int(stop) for stop in stops])
