"""Cuts a session's model where its plan says so."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from allfuse.base.errors import PlanError, UserError
from allfuse.split.base import Split
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
    (model,), (forward,) = s.models.values(), s.forwards
    s.choices |= s.split.cut(model, [_run(s, source, forward, rows) for rows in ROWS])
    for learner in s.learners:
        learner.take_cut()


def _run(
    s: Session, source: Source | Stream, forward: Callable[[nn.Module, Any], Any], rows: int
) -> tuple[int, Callable[[nn.Module], Any]]:
    if not isinstance(source, Source) or source.size < max(ROWS):
        raise UserError(
            f"{s.plan}: where a model is cut is found out on its first {max(ROWS)} samples; "
            "allowed: a data set with a length; next: a plan that leaves the model whole, such as "
            f"data({s.plan.workers})"
        )
    batch = to_device(source.fetch(np.arange(rows)), s.device)
    return rows, lambda made: forward(made, batch)
