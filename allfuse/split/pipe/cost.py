"""What each call of a forward pass costs, by its shapes alone."""

from __future__ import annotations

import math

from allfuse.split.record import Recording
from allfuse.split.tensor.maps import find_map


def count_operations(recording: Recording) -> list[float]:
    """Multiplications of each call, by the shapes: what maps take, and one for each number that
    comes out of others."""
    costs = []
    for call in recording.calls:
        numbers = sum(math.prod(recording.shapes[number]) for number in call.outputs)
        found = find_map(recording, call)
        if found is not None and found.kind != "embedding":
            shape = next(
                recording.shapes[i]
                for i, name in recording.parameters.items()
                if name == found.weight
            )
            numbers *= math.prod(shape) // max(shape[found.out_of], 1) // found.packs
        elif "attention" in call.name:
            q, k = (recording.shapes[number] for number in call.inputs[:2])
            numbers = 2 * math.prod(q) * k[-2]
        costs.append(float(numbers))
    return costs


def weigh_calls(recording: Recording) -> list[float]:
    """What stages are balanced by: the mean of a call's share of all multiplications, which is
    time, and of its share of all parameters, which are memory and the optimizer's time. A parameter
    counts where it is first used."""
    operations = count_operations(recording)
    held = [0.0] * len(operations)
    seen: set[int] = set()
    for call in recording.calls:
        for number in call.inputs:
            if number in recording.parameters and number not in seen:
                seen.add(number)
                held[call.index] += math.prod(recording.shapes[number])
    all_operations, all_held = sum(operations) or 1.0, sum(held) or 1.0
    pairs = zip(operations, held, strict=True)
    return [(o / all_operations + h / all_held) / 2 for o, h in pairs]
