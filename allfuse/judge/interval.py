"""How sure a figure is: what it would be over other samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 1000
PERCENT = (2.5, 97.5)
FEWEST = 10
"""Of fewer parts an interval would say little."""

Figure = Callable[[Any], float]
Numbers = NDArray[Any]


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
    count = len(parts)
    if count < FEWEST or (other is not None and len(other) != count):
        return None
    chance = np.random.default_rng(0)
    drawn = [chance.integers(count, size=count) for _ in range(RESAMPLES)]
    found = _resampled(parts, drawn, figure)
    if other is not None:
        found -= _resampled(other, drawn, figure)
    if not np.isfinite(found).all():
        return None
    low, high = np.percentile(found, PERCENT)
    return float(low), float(high)


def _resampled(parts: Sequence[Any], drawn: Sequence[Numbers], figure: Figure) -> Numbers:
    """The figure of each resample."""
    values = np.asarray(parts, dtype=np.float64)
    flat, shape = values.reshape(len(values), -1), values.shape[1:]
    totals = (np.bincount(rows, minlength=len(flat)) @ flat for rows in drawn)
    return np.array([figure(total.reshape(shape)) for total in totals])
