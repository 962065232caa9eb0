"""What a model's figures are on some data, and what the monitored one is made of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from allfuse.job import Job, Metric, MetricFunction, default_forward
from allfuse.link.lone import LoneLink
from allfuse.merge.loaded import Reads, open_loader
from allfuse.split.data import Source, Stream
from allfuse.training.learner import Precision
from allfuse.training.measure import measure, sum_and_count

MOST_PARTS = 5000
"""More than so many parts of a figure are kept as the sums of neighbours."""


@dataclass(frozen=True)
class Measured:
    """A model's figures by name over so many samples, and the parts of the monitored one.

    Attributes:
        units: what a part is of: "samples", or "batches" where the metric has no value for each
            sample, or groups of either.
        parts: one for each unit; the figure follows from their sum, which is (sum, count), or what
            a `Metric` makes its result of.
    """

    figures: dict[str, float]
    samples: int
    units: str
    parts: list[Any]

    def plain(self) -> dict[str, Any]:
        """As plain data, for JSON."""
        return dict(vars(self))

    @classmethod
    def read(cls, plain: Mapping[str, Any]) -> Measured:
        """What `plain` described. Raises ValueError, TypeError, KeyError: it is something else."""
        figures = {str(name): float(value) for name, value in plain["figures"].items()}
        parts = np.asarray(plain["parts"], dtype=np.float64).tolist()
        return cls(figures, int(plain["samples"]), str(plain["units"]), parts)


def monitored(job: Job) -> MetricFunction | Metric:
    """The metric that decides."""
    return {**job.metrics, "loss": job.loss}[job.monitor_name]


def figure_of(metric: MetricFunction | Metric, total: Any) -> float:
    """The figure that follows from the sum of parts."""
    if isinstance(metric, Metric):
        return float(metric.result(torch.as_tensor(total)))
    return float(total[0] / total[1])


def measure_model(
    model: nn.Module, job: Job, data: Source | Stream, device: torch.device
) -> Measured:
    """The job's metrics and its loss of a model on a device, as `allfuse evaluate` finds them.

    Raises:
        JobError: a metric gives what is none.
    """
    loader = open_loader(data, job)
    parts = _Parts(monitored(job), loader)
    try:
        figures, samples = measure(
            model,
            parts,  # type: ignore[arg-type]  # it has what is asked of a loader
            {**job.metrics, "loss": job.loss, job.monitor_name: parts.metric},
            forward=job.forward or default_forward,
            link=LoneLink(),
            device=device,
            autocast=Precision(job.precision, device).autocast,
        )
    finally:
        loader.close()
    units, found = _group(parts.found, "samples" if parts.by_sample else "batches")
    return Measured(figures, samples, units, found)


class _Parts:
    """Stands before a loader and a metric, and keeps what the metric gives of each batch."""

    def __init__(self, metric: MetricFunction | Metric, loader: Reads) -> None:
        self.by_sample = not isinstance(metric, Metric)
        self.found: list[Any] = []
        self._loader, self._rows = loader, 0
        self.metric = self._of_totals(metric) if isinstance(metric, Metric) else self._of(metric)

    def epoch(self, epoch: int) -> Iterator[Any]:
        """The portions of the loader."""
        for portion in self._loader.epoch(epoch):
            self._rows = portion.rows
            yield portion

    def _of(self, metric: MetricFunction) -> MetricFunction:
        def call(outputs: Any, batch: Any) -> Any:
            value, rows = metric(outputs, batch), self._rows
            if isinstance(value, Tensor) and value.dim() > 0 and value.numel() == rows:
                numbers = value.detach().double().flatten().tolist()
                self.found += [[number, 1.0] for number in numbers]
            else:
                total, factor, count = sum_and_count(value, rows, "the monitored metric")
                self.found.append([float(total) * factor, count])
                self.by_sample = False
            return value

        return call

    def _of_totals(self, metric: Metric) -> Metric:
        def update(outputs: Any, batch: Any) -> Any:
            total = torch.as_tensor(metric.update(outputs, batch))
            self.found.append(total.detach().double().tolist())
            return total

        return Metric(update=update, result=metric.result)


def _group(parts: list[Any], units: str) -> tuple[str, list[Any]]:
    """At most MOST_PARTS: the sums of neighbours where there are more."""
    each = -(-len(parts) // MOST_PARTS)
    if each <= 1:
        return units, parts
    sums = [np.sum(parts[at : at + each], axis=0) for at in range(0, len(parts), each)]
    return f"groups of {each} {units}", np.stack(sums).tolist()
