"""What a parameter of a rule is, where it differs by model, by name of the tensor and by layer."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

Value = bool | int | float | str
WEIGHT = "weight"
LEAST, MOST = 2.0**-126, (2 - 2.0**-23) * 2.0**127
SIZES = "1.2e-38 to 3.4e+38 in size, as float32 holds them"


def is_held(value: float) -> bool:
    """Whether float32, which all arithmetic is in, holds a number with all its digits.

    >>> [is_held(value) for value in (0, -0.5, 1e39, 1e-40, float("nan"))]
    [True, True, False, False, False]
    """
    return value == 0 or LEAST <= abs(value) <= MOST


@dataclass(frozen=True)
class Setting:
    """The value of one parameter for every tensor.

    Attributes:
        cases: what a tensor's name must contain (None: nothing), and values along the layers: a
            single one for all, or several between which lines are drawn, the first at the first
            layer and the last at the last. The first case that fits counts.
        where: in which file it stands under which key, for messages; "": in none.
    """

    cases: tuple[tuple[str | None, tuple[Value, ...]], ...]
    where: str = ""

    def at(self, tensor: str, place: float) -> Value | None:
        """Of a tensor in a layer, `place` going from 0 at the first layer to 1 at the last; None:
        no case fits."""
        for part, values in self.cases:
            if part is None or part in tensor:
                return _between(values, place)
        return None

    def idle_filters(self, tensors: Collection[str]) -> list[str]:
        """What cases ask of names and none of these has."""
        parts = [part for part, _ in self.cases if part is not None]
        return [part for part in parts if not any(part in tensor for tensor in tensors)]


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
    found = _find(levels, name, tensor, place)
    return None if found is None else found[1]


def tell_values(
    levels: Sequence[Settings], names: Iterable[str], tensor: str, place: float
) -> list[str]:
    """Where in a file those of these parameters stand that do, and what they are."""
    found = [_find(levels, name, tensor, place) for name in names]
    return [f"{each[0].where} is {each[1]}" for each in found if each is not None and each[0].where]


def _find(
    levels: Sequence[Settings], name: str, tensor: str, place: float
) -> tuple[Setting, Value] | None:
    for settings in levels:
        value = settings[name].at(tensor, place) if name in settings else None
        if value is not None:
            return settings[name], value
    return None
