"""Cuts a session's model where its plan says so."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from allfuse.base.errors import PlanError, UserError
from allfuse.plan import Plan
from allfuse.split.base import Run, Split
from allfuse.split.data import Source, Stream
from allfuse.split.whole import Whole
from allfuse.training.measure import to_device

if TYPE_CHECKING:
    from allfuse.training.place import Place
    from allfuse.training.session import Session

ROWS = (2, 3)
"""Of the two batches on which a forward pass is followed, to tell what depends on the rows."""


def make_split(place: Place) -> Split:
    """What cuts models under a plan."""
    if place.mates.size == 1:
        return Whole()
    from allfuse.split.parted import Parted

    return Parted(place.plan, place.rank, place.mates, place.tensor, place.device)


def cut_model(s: Session, source: Source | Stream) -> None:
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
    s.choices |= s.split.cut(model, runs_on(s.plan, source, forward, s.device), request)
    for learner in s.learners:
        learner.take_cut()


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

    def run(rows: int) -> tuple[int, Run]:
        batch = to_device(source.fetch(np.arange(rows)), device)
        return rows, lambda made: forward(made, batch)

    return [run(rows) for rows in ROWS]
