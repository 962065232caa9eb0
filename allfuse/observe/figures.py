"""Figures of a run as people read them. Unlike `base/units.py` it takes whatever a run may hand
over: None, NaN and infinities included.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from allfuse.base.units import format_bytes, format_count, format_seconds

UNKNOWN = "?"


def is_finite(value: object) -> bool:
    """Whether it is a number that can be drawn, averaged or divided by."""
    return isinstance(value, int | float) and math.isfinite(value)


def figure(value: object) -> str:
    """A loss or a metric: four decimals where these say something.

    >>> figure(0.43211), figure(12), figure(1.5e-7), figure(float("nan")), figure(None)
    ('0.4321', '12', '1.500e-07', 'nan', '?')
    """
    if value is None:
        return UNKNOWN
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int):
        return format_count(value)
    if not math.isfinite(value):
        return str(value)
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:.4f}"
    return f"{value:.3e}"


def short(value: float | None) -> str:
    """Three digits, for figures whose order of magnitude is what matters."""
    return UNKNOWN if value is None else f"{value:.3g}"


def rate(value: float | None, unit: str = "samples") -> str:
    """How much is done in a second.

    >>> rate(12345.6), rate(2.345, "rows")
    ('12,346 samples/s', '2.35 rows/s')
    """
    if value is None or not is_finite(value):
        return f"{UNKNOWN} {unit}/s"
    return f"{format_count(round(value))} {unit}/s" if value >= 100 else f"{value:.3g} {unit}/s"


def duration(seconds: float | None) -> str:
    """A duration, or "?" where it is not known."""
    if seconds is None or not is_finite(seconds):
        return UNKNOWN
    return format_seconds(max(seconds, 0.0))


def clock(seconds: float | None) -> str:
    """A duration in whole seconds, for figures that move.

    >>> clock(62.3), clock(0.4)
    ('1 min 02 s', 'less than 1 s')
    """
    if seconds is None or not is_finite(seconds):
        return UNKNOWN
    return format_seconds(round(seconds)) if seconds >= 1 else "less than 1 s"


def percent(part: float) -> str:
    """A part of one in percent.

    >>> percent(0.5)
    '50 %'
    """
    return f"{100 * part:.0f} %" if is_finite(part) else UNKNOWN


def size(count: float | None) -> str:
    """An amount of bytes, or "?" where it is not known."""
    return UNKNOWN if count is None or not is_finite(count) else format_bytes(count)


def metrics_text(metrics: Mapping[str, float]) -> str:
    """Metrics in the order they came: `accuracy 0.9612, loss 0.1234`."""
    return ", ".join(f"{name} {figure(value)}" for name, value in metrics.items())


def fractions(shares: Sequence[float]) -> list[float]:
    """What part of the whole each share is; all 0 for an empty whole."""
    whole = sum(shares)
    return [share / whole if whole else 0.0 for share in shares]


def shares_text(shares: Sequence[float]) -> str:
    """The workers' shares in percent; the range of them when there are many.

    >>> shares_text([32, 32]), shares_text([7, 9] * 20)
    ('50/50 %', '2.19 to 2.81 % each of 40 workers')
    """
    parts = [100 * part for part in fractions(shares)]
    if len(parts) <= 8:
        return "/".join(f"{part:.0f}" for part in parts) + " %"
    each = " to ".join(dict.fromkeys(f"{part:.3g}" for part in (min(parts), max(parts))))
    return f"{each} % each of {len(parts)} workers"
