"""Cuts a session's model where its plan says so."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from allfuse.base.errors import PlanError, UserError
from allfuse.base.tensors import cut_rows
from allfuse.plan import Pipe, Plan, Shard
from allfuse.split.base import Run, Split
from allfuse.split.data import Source, Stream
from allfuse.split.whole import Whole
from allfuse.training.measure import sum_and_count, to_device

if TYPE_CHECKING:
    from allfuse.split.pipe.choice import Trial
    from allfuse.training.place import Place
    from allfuse.training.session import Session
    from allfuse.training.settings import Settings

ROWS = (2, 3)
"""Of the two batches on which a forward pass is followed, to tell what depends on the rows."""


def make_split(place: Place) -> Split:
    """What cuts models under a plan."""
    shard = place.plan.axis("shard")
    offloads = isinstance(shard, Shard) and shard.offload
    if place.mates.size == 1 and not offloads:
        return Whole()
    from allfuse.split.parted import Parted

    return Parted(
        place.plan,
        place.rank,
        place.mates,
        tensor=place.tensor,
        pipe=place.pipe,
        shard=place.shard,
        device=place.device,
    )


def refuse_settings(plan: Plan, settings: Settings, has_norms: bool) -> None:
    """Refuse what a model that is cut cannot keep to.

    Raises:
        PlanError: says which setting can be.
    """
    axis, nearest = plan.axis("pipe"), f"data({plan.workers})"
    if not isinstance(axis, Pipe) or axis.n == 1:
        return
    if has_norms and settings.batch_statistics == "global":
        why = (
            "BatchNorm over the whole batch would need the rows of all microbatches at once; "
            'allowed: batch_statistics="local", which is over those of each microbatch'
        )
    elif settings.precision == "fp16":
        why = "the loss scaler of fp16 knows one stage alone; allowed: precision bf16 or fp32"
    elif (settings.recompute or settings.compile) and axis.schedule.in_two:
        name = "recompute" if settings.recompute else "compile"
        why = (
            f"{name}=True has a block find its whole gradient at once, which this schedule finds "
            "in two turns; allowed: schedule=1f1b, gpipe or interleaved"
        )
    else:
        return
    raise PlanError(str(axis), why, nearest)


def cut_model(s: Session, source: Source | Stream, batch_size: int | None) -> None:
    """Cut the model, once it is known what it is trained on and before anything is restored.

    Raises:
        PlanError, UserError: it cannot be cut.
    """
    if not s.split.cuts:
        return
    if len(s.models) != 1:
        raise PlanError(
            str(s.plan),
            f"it cuts a model, and the session has {len(s.models)}",
            f"data({s.plan.workers})",
        )
    (model,), (forward,), (request,) = s.models.values(), s.forwards, s.requests
    runs = runs_on(s.plan, source, forward, s.device)
    settings = s.settings
    request = replace(request, recompute=settings.recompute, compile=settings.compile)
    if s.pending is not None:
        s.pending.stop_guarding()
    trial = make_trial(s, source, forward, batch_size, request.loss)
    s.choices |= s.split.cut(model, runs, request, s.precision.autocast, trial)
    if s.pending is not None:
        s.pending.fill(s.split.pieces())
    elsewhere = frozenset(name for name, piece in s.split.pieces().items() if piece is None)
    s.state.elsewhere = s.rounds.elsewhere = elsewhere
    s.rounds.level = lambda: s.survival.level(model)
    if batch_size is not None:
        refuse_few(s.plan, batch_size, s.settings.accumulate)
    for learner in s.learners:
        learner.take_cut()


def make_trial(
    s: Session,
    source: Source | Stream,
    forward: Callable[[nn.Module, Any], Any],
    batch_size: int | None,
    loss: Callable[[Any, Any], Any] | None,
) -> Trial | None:
    """How parts of the model are timed, where it is to be cut into stages.

    None where nobody knows how many samples go through at once, and where a scheduler keeps the
    run: then it would not be known afterwards what was measured.
    """
    place, axis = s.place, s.plan.axis("pipe")
    if not isinstance(axis, Pipe) or axis.n == 1 or batch_size is None or s.apart is not None:
        return None
    from allfuse.split.pipe.choice import Trial
    from allfuse.training.device import room_bytes

    hosts = place.world.hosts()

    def agree(count: int, find: Callable[[], list[int]]) -> list[int]:
        def work() -> list[int]:
            found = torch.zeros(count, dtype=torch.int64)
            if place.rank == 0:
                found = torch.tensor(find(), dtype=torch.int64)
            found = found.to(s.device)
            place.everyone.broadcast(found, "agree on where stages begin").wait()
            numbers: list[int] = found.tolist()
            return numbers

        return s.survival.together("all", work)

    return Trial(
        rows=max(1, batch_size // s.plan.replicas // s.settings.accumulate),
        run=lambda rows: run_on(source, forward, s.device, rows),
        device=s.device,
        room_bytes=room_bytes(s.device, hosts.count(hosts[place.rank])),
        kept=s.keeper.recorded("stages").get(stages_key(s.plan)),
        lose=None if loss is None else functools.partial(lose_on, source, loss, s.device),
        agree=agree,
    )


def stages_key(plan: Plan) -> str:
    """Of plans that have a model cut in one way."""
    return " * ".join(str(axis) for axis in plan.axes if axis.name in ("tensor", "pipe", "shard"))


def run_on(
    source: Source | Stream,
    forward: Callable[[nn.Module, Any], Any],
    device: torch.device,
    rows: int,
) -> Run:
    """A forward pass over so many of the first samples, or all there are."""
    assert isinstance(source, Source)
    batch = to_device(source.fetch(np.arange(min(rows, source.size))), device)
    return lambda made: forward(made, batch)


def lose_on(
    source: Source | Stream,
    loss: Callable[[Any, Any], Any],
    device: torch.device,
    rows: int,
) -> Callable[[Any], torch.Tensor]:
    """The loss of what a model makes of the batch of `run_on`."""
    assert isinstance(source, Source)
    rows = min(rows, source.size)
    batch = to_device(source.fetch(np.arange(rows)), device)
    return lambda outputs: sum_and_count(loss(outputs, batch), rows, "the loss")[0]


def refuse_few(plan: Plan, batch_size: int, accumulate: int) -> None:
    """Refuse more microbatches than a replica's share of a batch has samples. Raises UserError."""
    axis, parts = plan.axis("pipe"), plan.replicas
    rows = batch_size // parts // accumulate
    if not isinstance(axis, Pipe) or axis.n == 1 or axis.microbatches is None:
        return
    if rows >= axis.microbatches:
        return
    by = f" by {parts} replicas" if parts > 1 else ""
    by += f" and accumulate={accumulate}" if accumulate > 1 else ""
    raise UserError(
        f"microbatches={axis.microbatches} of {plan}: batch_size={batch_size} divided{by} gives "
        f"{rows} samples; allowed: from 1 to {rows} microbatches; next: pipe({axis.n}), which "
        f"derives them, or a batch_size of at least {axis.microbatches * parts * accumulate}"
    )


def runs_on(
    plan: Plan,
    source: Source | Stream,
    forward: Callable[[nn.Module, Any], Any],
    device: torch.device,
) -> list[tuple[int, Run]]:
    """Forward passes over the first samples, on which it is found out where to cut.

    Raises:
        UserError: there are no such samples.
    """
    if not isinstance(source, Source) or source.size < max(ROWS):
        raise UserError(
            f"{plan}: where a model is cut is found out on its first {max(ROWS)} samples; "
            "allowed: a data set with a length; next: a plan that leaves the model whole, such as "
            f"data({plan.workers})"
        )

    whole = to_device(source.fetch(np.arange(max(ROWS))), device)

    def run(rows: int) -> tuple[int, Run]:
        try:
            batch = cut_rows(whole, 0, rows)  # of one length, whatever samples are filled up to
        except ValueError:  # nothing in it counts samples
            batch = to_device(source.fetch(np.arange(rows)), device)
        return rows, lambda made: forward(made, batch)

    return [run(rows) for rows in ROWS]
