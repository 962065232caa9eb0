"""Chooses the places at which a model is cut into stages."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import TypeAlias

import torch
from torch import nn

from allfuse.base.units import format_bytes
from allfuse.plan import Pipe
from allfuse.plan.schedule import count_held, count_microbatches
from allfuse.split.base import Run
from allfuse.split.pipe.boundary import (
    Boundary,
    StagePlan,
    balance,
    cut_stages,
    find_boundaries,
    find_places,
    split_at,
)
from allfuse.split.pipe.cost import weigh_calls
from allfuse.split.pipe.timing import Autocast, Cost, Lose, time_parts
from allfuse.split.record import Recording, record

SMALL_S = 4e-3
"""A pass that takes less, of a microbatch through the whole model, is cut by its shapes: what the
clock would find are the costs of Python, and other stages in each run."""

WORTH = 0.97
"""Stages by time take at most this part of the time of those by shapes; else shapes decide."""

Begins: TypeAlias = Sequence[tuple[str, int]]
"""The modules before which stages begin, but the first, and in which of their passes."""


@dataclass(frozen=True)
class Trial:
    """How it is found out what parts of a model cost.

    Attributes:
        rows: of a replica's share of a batch that go through the stages at once.
        run: gives a forward pass over so many of the first samples. lose: the loss of those, None
            where nobody knows it.
        device: that computes.
        room_bytes: what a rank may take for its stages. None: nobody knows.
        kept: where stages began when the run was begun, if it is gone on with.
        agree: gives all ranks the numbers (so many) that a function finds on the first.
    """

    rows: int
    run: Callable[[int], Run]
    device: torch.device
    room_bytes: int | None = None
    kept: Begins | None = None
    lose: Callable[[int], Lose] | None = None
    agree: Callable[[int, Callable[[], list[int]]], list[int]] = lambda count, find: find()


@dataclass(frozen=True)
class Choice:
    """The stages of a model.

    Attributes:
        how: they were found, in words; "" where by their shapes, as ever.
        seconds, bytes: what each takes for a microbatch, and for its part of the model with the
            activations that its schedule keeps; empty where nothing was timed, and on ranks that
            were told.
    """

    stages: list[StagePlan]
    how: str = ""
    seconds: list[float] = field(default_factory=list)
    bytes: list[int] = field(default_factory=list)

    @property
    def begins(self) -> list[tuple[str, int]]:
        return [_name(stage.first) for stage in self.stages if stage.first is not None]


def _name(place: Boundary) -> tuple[str, int]:
    return place.module, place.visit


def least_rows(model: nn.Module) -> int:
    """Of a microbatch whose number is derived: of one row there are no statistics."""
    has_norms = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    return 2 if has_norms else 1


def choose_stages(
    axis: Pipe,
    model: nn.Module,
    recording: Recording,
    *,
    inside: Collection[int] = (),
    trial: Trial | None = None,
    autocast: Autocast = contextlib.nullcontext,
    recompute: bool = False,
) -> Choice:
    """Where to cut: by the time that parts take and the memory that they need, on the first rank;
    by their shapes alone where nothing can be timed, or where it makes no difference.

    Args:
        recording: of a forward pass over some samples.
        inside: values that cannot cross.
        trial: None times nothing.

    Raises:
        PlanError: there are too few places; names them.
    """
    n, each = axis.n, axis.schedule.each
    usual = cut_stages(recording, n, weigh_calls(recording), each=each, inside=inside)
    if trial is None:
        return Choice(usual)
    places = find_places(recording, n, each, inside)
    names = {_name(place): at for at, place in enumerate(places)}
    begins = [names[name] for name in Choice(usual).begins]
    found: list[_Weighed] = []

    def find() -> list[int]:
        assert trial is not None
        kept = [names[name] for name in map(tuple, trial.kept or ()) if name in names]
        if len(kept) == len(begins):
            found.append(_Weighed(kept, ", where they began before"))
        else:
            found.append(_weigh(axis, model, list(names), begins, trial, autocast, recompute))
        return found[0].begins

    begins = trial.agree(len(begins), find)
    stages = split_at(recording, [places[at] for at in begins])
    if not found:
        return Choice(stages)
    return Choice(stages, found[0].how, found[0].seconds, found[0].bytes)


@dataclass(frozen=True)
class _Weighed:
    """Which of the places were chosen, and what the stages cost."""

    begins: list[int]
    how: str = ""
    seconds: list[float] = field(default_factory=list)
    bytes: list[int] = field(default_factory=list)


def _weigh(
    axis: Pipe,
    model: nn.Module,
    names: Begins,
    usual: list[int],
    trial: Trial,
    autocast: Autocast,
    recompute: bool,
) -> _Weighed:
    """Time the parts between the places of these names, and choose; the usual ones where that is
    no better."""
    m = count_microbatches(trial.rows, axis.n, axis.schedule, axis.microbatches, least_rows(model))
    try:
        rows = -(-trial.rows // m)
        lose = None if trial.lose is None else trial.lose(rows)
        parts = _time(model, trial.run(rows), names, trial.device, autocast, recompute, lose)
    except Exception as error:  # the model's own code, on numbers that it may refuse
        told = str(error).splitlines()[0] if str(error) else ""
        return _Weighed(usual, f", by their shapes, since none could be timed: "
                               f"{type(error).__name__}: {told}")  # fmt: skip
    table = _Table(axis, m, parts, trial.room_bytes)
    by_time = [begin - 1 for begin in balance(len(parts), table.count, table.cost)]
    chosen = by_time if table.worst(by_time) < table.worst(usual, WORTH) else usual
    if sum(part.pass_s for part in parts) < SMALL_S:
        chosen = usual
    return table.told(chosen)


def _time(
    model: nn.Module,
    run: Run,
    names: Begins,
    device: torch.device,
    autocast: Autocast,
    recompute: bool,
    lose: Lose | None,
) -> list[Cost]:
    def under(made: nn.Module) -> object:
        with autocast():
            return run(made)

    recording = record(model, under)
    places = {_name(place): place for place in find_boundaries(recording)}
    parts = split_at(recording, [places[name] for name in names])
    return time_parts(
        model,
        run,
        recording,
        parts,
        device=device,
        autocast=autocast,
        recompute=recompute,
        lose=lose,
    )


class _Table:
    """What stages cost that are runs of parts."""

    def __init__(self, axis: Pipe, m: int, parts: Sequence[Cost], room_bytes: int | None) -> None:
        each = axis.schedule.each
        self.count, self.m, self.parts = axis.n * each, m, len(parts)
        self.room = None if room_bytes is None else room_bytes / each
        self.held: Mapping[int, int] = count_held(axis.schedule.orders(axis.n, m))
        self.passes = _sums([part.pass_s for part in parts])
        self.updates = _sums([part.update_s for part in parts])
        self.states = _sums([part.state_bytes for part in parts])
        self.kept = _sums([part.kept_bytes for part in parts])

    def bytes(self, stage: int, begin: int, end: int) -> float:
        kept = self.kept[end] - self.kept[begin]
        return self.states[end] - self.states[begin] + self.held[stage] * kept

    def cost(self, stage: int, begin: int, end: int) -> tuple[float, float]:
        """Bytes too many, and seconds of a step."""
        over = 0.0
        if self.room is not None:
            over = max(0.0, self.bytes(stage, begin, end) - self.room)
        passes = self.passes[end] - self.passes[begin]
        return over, self.m * passes + self.updates[end] - self.updates[begin]

    def runs(self, begins: Sequence[int]) -> list[tuple[int, int, int]]:
        """The stages that begin at these places."""
        ends = pairwise([0, *(at + 1 for at in begins), self.parts])
        return [(stage, begin, end) for stage, (begin, end) in enumerate(ends)]

    def worst(self, begins: Sequence[int], part: float = 1.0) -> tuple[float, float]:
        """Of the stages, the most bytes too many, and of the most seconds a part."""
        over, seconds = max(self.cost(*run) for run in self.runs(begins))
        return over, seconds * part

    def told(self, begins: list[int]) -> _Weighed:
        runs = self.runs(begins)
        seconds = [self.passes[end] - self.passes[begin] for _, begin, end in runs]
        sizes = [round(self.bytes(*run)) for run in runs]
        how = f" of {tell_times(seconds)} for a microbatch, as timed"
        if self.room is not None and max(sizes) > self.room:
            how += f"; the largest needs {format_bytes(max(sizes))} of memory, more than is free"
        return _Weighed(begins, how, seconds, sizes)


def _sums(numbers: Sequence[float]) -> list[float]:
    """Of the first so many, from none on."""
    return [0.0, *accumulate(numbers)]


def tell_times(seconds: Sequence[float]) -> str:
    """Of stages, in words.

    >>> tell_times([0.0123, 0.0119])
    '12.3 and 11.9 ms'
    """
    told = [f"{1e3 * each:.3g}" for each in seconds]
    return f"{', '.join(told[:-1])} and {told[-1]} ms" if len(told) > 1 else f"{told[0]} ms"
