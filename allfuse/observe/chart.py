"""Curves drawn with characters: one line of blocks, or several lines of braille dots."""

from __future__ import annotations

import math
from collections.abc import Sequence

from allfuse.observe.figures import figure

Point = tuple[float, float]

BLOCKS = "▁▂▃▄▅▆▇█"
BRAILLE = 0x2800
# The bit of each dot of a braille character, by its row and column.
DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))


class Curve:
    """A curve of any length in bounded memory: neighbours are averaged as it grows.

    Adding costs O(1) on average. Values that are not finite are left out.

    >>> curve = Curve(capacity=4)
    >>> for step in range(8):
    ...     curve.add(step, float(step))
    >>> curve.points()
    [(0.5, 0.5), (2.5, 2.5), (4.5, 4.5), (6.5, 6.5)]
    """

    def __init__(self, capacity: int = 256) -> None:
        self.capacity = capacity
        self._points: list[Point] = []
        self._stride = 1
        self._count = 0
        self._step_sum = self._value_sum = 0.0

    def add(self, step: float, value: float) -> None:
        if not math.isfinite(value):
            return
        self._count += 1
        self._step_sum += step
        self._value_sum += value
        if self._count == self._stride:
            self._points.append((self._step_sum / self._count, self._value_sum / self._count))
            self._count = 0
            self._step_sum = self._value_sum = 0.0
            if len(self._points) > self.capacity:
                self._halve()

    def points(self) -> list[Point]:
        """What was added, oldest first, the unfinished last average included."""
        if not self._count:
            return list(self._points)
        return [*self._points, (self._step_sum / self._count, self._value_sum / self._count)]

    def cut(self, step: float) -> None:
        """Forget what came after `step`."""
        self._points = [point for point in self.points() if point[0] <= step]
        self._count = 0
        self._step_sum = self._value_sum = 0.0

    def _halve(self) -> None:
        pairs = zip(self._points[::2], self._points[1::2], strict=False)
        left_over = self._points[-1] if len(self._points) % 2 else None
        self._points = [((a + c) / 2, (b + d) / 2) for (a, b), (c, d) in pairs]
        if left_over is not None:
            self._count = self._stride
            self._step_sum = left_over[0] * self._count
            self._value_sum = left_over[1] * self._count
        self._stride *= 2


def sample(points: Sequence[Point], width: int) -> list[float]:
    """The curve at `width` evenly spaced places from its first to its last step."""
    if not points:
        return []
    first, last = points[0][0], points[-1][0]
    values, at = [], 0
    for column in range(width):
        step = first + (last - first) * column / max(width - 1, 1)
        while at + 1 < len(points) and points[at + 1][0] < step:
            at += 1
        left, right = points[at], points[min(at + 1, len(points) - 1)]
        span = right[0] - left[0]
        part = min(max((step - left[0]) / span, 0.0), 1.0) if span else 0.0
        values.append(left[1] + (right[1] - left[1]) * part)
    return values


def sparkline(points: Sequence[Point], width: int = 24) -> str:
    """The curve in one line of blocks, "" when there are fewer than two points."""
    if len(points) < 2:
        return ""
    values = sample(points, width)
    low, high = min(values), max(values)
    scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(BLOCKS[round((value - low) * scale)] for value in values)


def braille_chart(points: Sequence[Point], width: int = 76, height: int = 6) -> list[str]:
    """The curve in `height` lines of braille dots with its range at the left and its steps below.

    No line is longer than `width`. Empty when there are fewer than two points, or no room.
    """
    values = [value for _, value in points]
    if len(points) < 2:
        return []
    labels = [figure(max(values)), *[""] * (height - 2), figure(min(values))]
    margin = max(len(label) for label in labels)
    columns = width - margin - 2
    first, last = f"step {points[0][0]:.0f}", f"step {points[-1][0]:.0f}"
    if columns <= len(first) + len(last):
        return []
    lines = [
        f"{label:>{margin}} │" + "".join(chr(BRAILLE + cell) for cell in cells)
        for label, cells in zip(labels, _dots(sample(points, 2 * columns), height), strict=True)
    ]
    axis = f"{'':>{margin}} └{'─' * columns}"
    return [*lines, axis, f"{'':>{margin}}  {first}{last:>{columns - len(first)}}"]


def _dots(values: Sequence[float], height: int) -> list[list[int]]:
    """The dots of a line through these values, two of them and four dots to a character."""
    low, high = min(values), max(values)
    span = high - low or 1.0
    rows = [round((high - value) / span * (4 * height - 1)) for value in values]
    cells = [[0] * ((len(values) + 1) // 2) for _ in range(height)]
    before = rows[0]
    for column, row in enumerate(rows):
        # Fill the gap to the column before, so that steep parts are lines and not dots.
        gap = range(before + 1, row) if before < row else range(row + 1, before)
        for dot in (row, *gap):
            cells[dot // 4][column // 2] |= DOTS[dot % 4][column % 2]
        before = row
    return cells
