"""Finds the places between which a model can be cut into stages.

A model can be cut before a module if, of all that was learned from parameters so far, one tensor is
all that anything later needs, and the module takes it, and nothing after the module. What comes
from the batch alone (masks, positions) each stage computes for itself.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TypeVar

from allfuse.base.errors import PlanError
from allfuse.base.tensors import leaves
from allfuse.split.record import Recording, Ref, Visit


@dataclass(frozen=True)
class Boundary:
    """A place where a model can be cut.

    Attributes:
        module: which begins there, in its pass number `visit`, counted from 0. began: how many
            passes through modules begin before that.
        call: index of the first call after it.
        value: number of the tensor that crosses. argument: which of the tensors that the module
            takes it is.
    """

    module: str
    visit: int
    began: int
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


def find_boundaries(recording: Recording, inside: Collection[int] = ()) -> list[Boundary]:
    """All places where a model can be cut, in order, each call at most once.

    Args:
        inside: values of which each rank has only a piece, which cannot cross.
    """
    learned, makers = recording.learned(), recording.makers
    last_use = find_last_uses(recording)
    made = {value: call.index for value, call in makers.items() if value in learned}
    found: dict[int, Boundary] = {}
    seen: dict[str, int] = defaultdict(int)
    for visit in sorted(recording.visits, key=lambda each: each.began):
        number = seen[visit.module]
        seen[visit.module] += 1
        if visit.begin == visit.end:
            continue
        begin = visit.begin
        crossing = [v for v, at in made.items() if at < begin <= last_use.get(v, -1)]
        if len(crossing) != 1:
            continue
        value = crossing[0]
        alone = value in visit.taken and last_use[value] < visit.end  # nobody else holds it
        if alone and value not in inside:
            place = visit.taken.index(value)
            found[begin] = Boundary(visit.module, number, visit.began, begin, value, place)
    return [found[call] for call in sorted(found)]


def find_last_uses(recording: Recording) -> dict[int, int]:
    """The last call that takes each value; one more than the last of those that are returned."""
    last: dict[int, int] = {}
    for call in recording.calls:
        last |= dict.fromkeys(call.inputs, call.index)
    return last | dict.fromkeys(recording.outputs, len(recording.calls))


def cut_stages(
    recording: Recording,
    n: int,
    costs: Sequence[float],
    *,
    each: int = 1,
    inside: Collection[int] = (),
) -> list[StagePlan]:
    """Stages of costs as even as can be, so many for each of n ranks.

    Args:
        costs: of each call.
        inside: values that cannot cross, as slices of the model hold them in pieces.

    Raises:
        PlanError: there are fewer places to cut than that takes; it names those there are.
    """
    places = find_places(recording, n, each, inside)
    total = [0.0, *accumulate(costs)]
    sums = [0.0, *(total[place.call] for place in places), total[-1]]
    begins = balance(len(places) + 1, n * each, lambda _, i, j: sums[j] - sums[i])
    return split_at(recording, [places[begin - 1] for begin in begins])


def find_places(
    recording: Recording, n: int, each: int = 1, inside: Collection[int] = ()
) -> list[Boundary]:
    """Where a model may be cut into so many stages for each of n ranks, as for `cut_stages`."""
    places = [place for place in find_boundaries(recording, inside) if place.call]
    wanted = n * each
    if len(places) < wanted - 1:
        names = ", ".join(place.module for place in places) or "none"
        able = len(places) + 1
        raise PlanError(
            f"pipe({n})",
            f"{wanted} stages need {wanted - 1} places where one tensor is all that is passed on"
            + (", outside of what tensor(n) cuts" if inside else "")
            + f", and the model has {len(places)}: {names}",
            f"pipe({min(able, n)})" if able > 1 else f"data({n})",
        )
    return places


def split_at(recording: Recording, places: Sequence[Boundary]) -> list[StagePlan]:
    """The stages that begin at the model's start and at some places."""
    stages = []
    for first, last in pairwise([None, *places, None]):
        begin = 0 if first is None else first.call
        end = len(recording.calls) if last is None else last.call
        used = frozenset(recording.parameters_in(begin, end))
        stages.append(StagePlan(first, last, used))
    return stages


C = TypeVar("C", float, tuple[float, float])


def balance(parts: int, n: int, cost: Callable[[int, int, int], C]) -> list[int]:
    """Cuts a row of parts into n runs, so that the dearest is as cheap as can be: the parts at
    which runs begin, but the first's. Of cuts that are as good, runs end early. n * parts^2 steps.

    Args:
        cost: of run k of the parts from i to before j, in this order.
    """
    best = [cost(0, 0, end) for end in range(1, parts + 1)]  # of the runs so far that end there
    back: list[list[int]] = []
    for k in range(1, n):
        row, came = list(best), [0] * parts
        for j in range(k, parts):
            row[j], came[j] = min((max(best[i], cost(k, i + 1, j + 1)), i) for i in range(k - 1, j))
        best = row
        back.append(came)
    chosen: list[int] = []
    at = parts - 1
    for came in reversed(back):
        at = came[at]
        chosen.insert(0, at + 1)
    return chosen


@dataclass(frozen=True)
class Skip:
    """A pass through a module that an earlier stage has computed: it is pass number `number` of
    that module. within: how often it passes through other modules."""

    visit: Visit
    number: int
    within: Counter[str]


def passes_before(recording: Recording, place: Boundary) -> Iterator[Skip]:
    """The outermost passes through modules that ended before a place and whose results were
    learned, or who took parameters.

    One that gives something beside it that a later stage needs and that was not learned, such as a
    mask, is gone into: only what is within is skipped.
    """
    learned, last_use = recording.learned(), find_last_uses(recording)
    ended = {visit.began: at for at, visit in enumerate(recording.visits)}
    numbers: Counter[str] = Counter()
    order = sorted(recording.visits, key=lambda each: each.began)
    outer: Visit | None = None
    for visit in order[: place.began]:
        number = numbers[visit.module]
        numbers[visit.module] += 1
        within = outer is not None and ended[visit.began] < ended[outer.began]
        if within or visit.end > place.call or not visit.module:
            continue
        given = {leaf.number for leaf in leaves(visit.result) if isinstance(leaf, Ref)}
        if not (given & learned or recording.parameters_in(visit.begin, visit.end)):
            continue
        if any(last_use.get(value, -1) >= place.call for value in given - learned):
            continue
        outer = visit
        later = (each for each in order[visit.began + 1 :])
        inner = (each.module for each in later if ended[each.began] < ended[visit.began])
        yield Skip(visit, number, Counter(inner))
