"""How sure a figure is: what it would be over other samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

RESAMPLES = 1000
PERCENT = (2.5, 97.5)
FEWEST = 10
"""Of fewer parts an interval would say little."""

Figure = Callable[[Any], float]


def interval(
    parts: Sequence[Any], figure: Figure, other: Sequence[Any] | None = None
) -> tuple[float, float] | None:
    """The interval in which a figure lies in 95 % of resamples of its parts, drawn with
    replacement (the percentile bootstrap: Efron and Tibshirani 1993, chapter 13).

    Args:
        parts: of which the sum gives the figure.
        other: the parts of another model on the same samples; then it is the interval of the
            difference, both drawn alike.

    Returns:
        None where there are too few parts to tell, or a figure is no number.
    """
    own = np.asarray(parts, dtype=np.float64)
    against = None if other is None else np.asarray(other, dtype=np.float64)
    count = len(own)
    if count < FEWEST or (against is not None and against.shape != own.shape):
        return None
    chance = np.random.default_rng(0)
    found = []
    for _ in range(RESAMPLES):
        drawn = np.bincount(chance.integers(count, size=count), minlength=count).astype(float)
        value = figure(np.tensordot(drawn, own, 1))
        if against is not None:
            value -= figure(np.tensordot(drawn, against, 1))
        found.append(value)
    if not np.isfinite(found).all():
        return None
    low, high = np.percentile(found, PERCENT)
    return float(low), float(high)
