"""Measuring by all ranks of a session, each its share of every batch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from allfuse.job import Metric, MetricFunction
from allfuse.split.data import Source, Stream
from allfuse.training.loading import make_loader, order_of_all
from allfuse.training.measure import measure
from allfuse.training.recovery import Handed

if TYPE_CHECKING:
    from allfuse.training.session import Session


def measure_together(
    s: Session,
    model: nn.Module,
    source: Source | Stream,
    metrics: Mapping[str, MetricFunction | Metric],
    batch_size: int | None,
    forward: Callable[[nn.Module, Any], Any],
) -> tuple[dict[str, float], int]:
    """The figures, equal on all ranks, and the number of samples they are over.

    Sites measure the mean of their weights. After a loss it is done again by those that are left.
    """
    is_average = s.averages is not None and s.averages.is_shown  # which sites have in common
    measured = contextlib.nullcontext if is_average else s.course.measured

    def attempt() -> tuple[dict[str, float], int]:
        loader = make_loader(source, order_of_all(source, batch_size, s.place), s.place)
        with contextlib.closing(loader), measured():
            return measure(
                model,
                loader,
                metrics,
                forward=forward,
                link=s.place.replicas,
                device=s.device,
                autocast=s.precision.autocast,
                pipeline=s.split.pipeline,
            )

    def hear(handed: Handed) -> tuple[dict[str, float], int]:
        figures, samples = handed.result
        return dict(figures), int(samples)

    if not metrics:  # then nothing is added up over the ranks
        return attempt()
    return s.survival.together("all", attempt, hear=hear)
