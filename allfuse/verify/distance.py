"""How far two sets of weights are from each other, in units that mean the same for every job."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor


class Yardstick:
    """Measures weights against expected ones, version after version of a run.

    The unit for a parameter is the way that all parameters together have come since the start:
    rounding of a gradient that is 0, which Adam blows up to a full step, is a small part of it, a
    missed step a large one, whatever the learning rate. For a buffer it is its own length.

    Args:
        parameters: names of those that are not buffers.
    """

    def __init__(self, parameters: Collection[str]) -> None:
        self.parameters = parameters
        self._before: dict[str, Tensor] = {}
        self._way = self._scale = self._typical = 0.0

    def advance(self, expected: Mapping[str, Tensor]) -> None:
        """The next version of the expected weights."""
        names = [name for name in expected if name in self.parameters]
        before = self._before or expected
        self._way += length(expected[name] - before[name] for name in names)
        self._before = dict(expected)
        whole = length(expected[name] for name in names)
        self._typical = whole / math.sqrt(sum(expected[name].numel() for name in names))
        epsilon = torch.finfo(next(iter(expected.values())).dtype).eps
        self._scale = max(self._way, math.sqrt(epsilon) * whole)

    def differences(
        self, own: Mapping[str, Tensor], expected: Mapping[str, Tensor]
    ) -> dict[str, float]:
        """How far each tensor that both have is off: the length of its difference, in its unit."""
        found = {}
        for name, value in expected.items():
            if name not in own:
                continue
            off = length([own[name].cpu().double() - value.cpu().double()])
            least = self._typical * math.sqrt(value.numel())
            unit = self._scale if name in self.parameters else max(length([value]), least)
            found[name] = relative(off, unit)
        return found


def length(tensors: Iterable[Tensor]) -> float:
    """The root of the sum of all squares."""
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors))


def relative(difference: float, scale: float) -> float:
    """A difference in units of a scale; infinite where that has no meaning."""
    if difference == 0.0:
        return 0.0
    return difference / scale if scale > 0 and math.isfinite(difference) else math.inf


def relative_numbers(own: float | None, expected: float | None, floor: float) -> float:
    """How far two numbers are apart, in units of the expected one or a floor; infinite where one
    side has none."""
    if own == expected:
        return 0.0
    if own is None or expected is None:
        return math.inf
    return relative(abs(own - expected), max(abs(expected), floor))
