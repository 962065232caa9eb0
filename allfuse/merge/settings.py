"""What a parameter of a rule is, where it differs by model, by name of the tensor and by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Value = bool | int | float | str
WEIGHT = "weight"


@dataclass(frozen=True)
class Setting:
    """The value of one parameter for every tensor.

    Attributes:
        cases: what a tensor's name must contain (None: nothing), and values along the layers: a
            single one for all, or several between which lines are drawn, the first at the first
            layer and the last at the last. The first case that fits counts.
    """

    cases: tuple[tuple[str | None, tuple[Value, ...]], ...]

    def at(self, tensor: str, place: float) -> Value | None:
        """Of a tensor in a layer, `place` going from 0 at the first layer to 1 at the last; None:
        no case fits."""
        for part, values in self.cases:
            if part is None or part in tensor:
                return _between(values, place)
        return None


Settings = Mapping[str, Setting]
"""By the name of the parameter."""


def _between(values: Sequence[Value], place: float) -> Value:
    if len(values) == 1:
        return values[0]
    numbers = [float(value) for value in values]
    scaled = place * (len(numbers) - 1)
    low = min(int(scaled), len(numbers) - 2)
    return numbers[low] + (scaled - low) * (numbers[low + 1] - numbers[low])


def find_value(levels: Sequence[Settings], name: str, tensor: str, place: float) -> Value | None:
    """Of the first level that says one for this tensor."""
    for settings in levels:
        value = settings[name].at(tensor, place) if name in settings else None
        if value is not None:
            return value
    return None
