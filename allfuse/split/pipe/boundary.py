"""Finds the places between which a model can be cut into stages.

A model can be cut before a module if, of all that was learned from parameters so far, one tensor is
all that anything later needs, and the module takes it, and nothing after the module. What comes
from the batch alone (masks, positions) each stage computes for itself.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from allfuse.base.errors import PlanError
from allfuse.split.record import Recording, Visit


@dataclass(frozen=True)
class Boundary:
    """A place where a model can be cut.

    Attributes:
        module: which begins there, in its pass number `visit`, counted from 0.
        call: index of the first call after it.
        value: number of the tensor that crosses. argument: which of the tensors that the module
            takes it is.
    """

    module: str
    visit: int
    call: int
    value: int
    argument: int


@dataclass(frozen=True)
class StagePlan:
    """One stage: the calls from `begin` to before `end`.

    Attributes:
        first, last: what bounds it; None at the model's own ends.
        parameters: names of the parameters that it uses.
    """

    first: Boundary | None
    last: Boundary | None
    parameters: frozenset[str]


def find_boundaries(recording: Recording) -> list[Boundary]:
    """All places where a model can be cut, in order, each call at most once."""
    learned, makers = recording.learned(), recording.makers
    last_use: dict[int, int] = {}
    for call in recording.calls:
        last_use |= dict.fromkeys(call.inputs, call.index)
    last_use |= dict.fromkeys(recording.outputs, len(recording.calls))
    made = {value: call.index for value, call in makers.items() if value in learned}
    found: dict[int, Boundary] = {}
    seen: dict[str, int] = defaultdict(int)
    for visit in sorted(recording.visits, key=lambda each: (each.begin, -each.end)):
        number = seen[visit.module]
        seen[visit.module] += 1
        if visit.begin == visit.end:
            continue
        begin = visit.begin
        crossing = [v for v, at in made.items() if at < begin <= last_use.get(v, -1)]
        if len(crossing) != 1:
            continue
        value = crossing[0]
        if value in visit.taken and last_use[value] < visit.end:  # nobody else holds it
            place = visit.taken.index(value)
            found[begin] = Boundary(visit.module, number, begin, value, place)
    return [found[call] for call in sorted(found)]


def cut_stages(recording: Recording, n: int, costs: Sequence[float]) -> list[StagePlan]:
    """n stages of costs as even as can be.

    Args:
        costs: of each call.

    Raises:
        PlanError: there are fewer places to cut than that takes; it names those there are.
    """
    boundaries = [each for each in find_boundaries(recording) if each.call]
    if len(boundaries) < n - 1:
        names = ", ".join(each.module for each in boundaries) or "none"
        raise PlanError(
            f"pipe({n})",
            f"{n} stages need {n - 1} places where one tensor is all that is passed on, and the "
            f"model has {len(boundaries)}: {names}",
            f"pipe({len(boundaries) + 1})" if boundaries else "data(n)",
        )
    chosen = _balance([each.call for each in boundaries], n, costs)
    cuts = [None, *(boundaries[at] for at in chosen), None]
    stages = []
    for first, last in pairwise(cuts):
        begin = 0 if first is None else first.call
        end = len(recording.calls) if last is None else last.call
        used = frozenset(recording.parameters_in(begin, end))
        stages.append(StagePlan(first, last, used))
    return stages


def _balance(places: Sequence[int], n: int, costs: Sequence[float]) -> list[int]:
    """Which n - 1 of the places to cut at, so that the dearest stage is as cheap as can be.

    Best[k][j]: the cost of the dearest of k stages that end at place j; n * places^2 steps.
    """
    total = [0.0]
    for cost in costs:
        total.append(total[-1] + cost)
    ends = [*places, len(costs)]
    best = [[total[end] for end in ends]]
    back: list[list[int]] = []
    for k in range(1, n):
        row, came = [], []
        for j, end in enumerate(ends):
            options = [(max(best[-1][i], total[end] - total[ends[i]]), i) for i in range(k - 1, j)]
            value, at = min(options) if options else (float("inf"), -1)
            row.append(value)
            came.append(at)
        best.append(row)
        back.append(came)
    chosen: list[int] = []
    at = len(ends) - 1
    for came in reversed(back):
        at = came[at]
        chosen.insert(0, at)
    return chosen


def passes_before(recording: Recording, call: int) -> list[tuple[int, Visit]]:
    """The outermost passes through modules that ended before a call and took parameters, each with
    its number among the passes through its module."""
    numbers: dict[str, int] = defaultdict(int)
    found = []
    order = sorted(recording.visits, key=lambda each: (each.begin, -each.end))
    inside = -1
    for visit in order:
        number = numbers[visit.module]
        numbers[visit.module] += 1
        if visit.end <= call and visit.begin >= inside and visit.module:
            inside = visit.end
            if recording.parameters_in(visit.begin, visit.end):
                found.append((number, visit))
    return found
