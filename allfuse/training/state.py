"""All that a session needs to go on: what a checkpoint holds, and how it is taken back.

Randomness has no state to keep: generators are seeded in each step from (seed, step, rank).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from allfuse.base.errors import CheckpointError
from allfuse.training.keeper import Cursor

if TYPE_CHECKING:
    from allfuse.training.session import Session


def capture(session: Session) -> dict[str, Any]:
    """The state, with live tensors."""
    scaler, cursor = session.precision.scaler, session.cursor
    return {
        "models": {name: module.state_dict() for name, module in session.models.items()},
        "optimizers": [learner.optimizer.state_dict() for learner in session.learners],
        "schedulers": [scheduler.state_dict() for scheduler, _ in session.schedulers],
        "scaler": None if scaler is None else scaler.state_dict(),
        "cursor": [cursor.steps, cursor.epoch, cursor.step_in_epoch, cursor.epoch_of_last],
        "rounds": {"samples": session.rounds.samples, "steps_since": session.rounds.steps_since},
        "parts": {name: part.state_dict() for name, part in session.parts.items()},
    }


def restore(session: Session, state: Mapping[str, Any]) -> None:
    """Take a state back, in place.

    Raises:
        CheckpointError: it is of other models, optimizers or schedulers.
    """
    try:
        for name, module in session.models.items():
            module.load_state_dict(state["models"][name])
        for learner, held in zip(session.learners, state["optimizers"], strict=True):
            learner.optimizer.load_state_dict(held)
        for (scheduler, _), held in zip(session.schedulers, state["schedulers"], strict=True):
            scheduler.load_state_dict(held)
        if session.precision.scaler is not None and state["scaler"] is not None:
            session.precision.scaler.load_state_dict(state["scaler"])
        for name, part in session.parts.items():
            part.load_state_dict(state["parts"][name])
    except (KeyError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"the checkpoint does not fit the job: {error}; allowed: the models, optimizers and "
            "schedulers that the run was started with"
        ) from None
    session.cursor = Cursor(*state["cursor"])
    session.rounds.samples = state["rounds"]["samples"]
    session.rounds.steps_since = state["rounds"]["steps_since"]


def model_fingerprint(models: Mapping[str, nn.Module]) -> str:
    """A hash of the names and shapes of all weights."""
    shapes = [
        f"{name}.{key}{tuple(value.shape)}"
        for name, module in models.items()
        for key, value in module.state_dict().items()
        if isinstance(value, Tensor)
    ]
    return hashlib.sha256("\n".join(shapes).encode()).hexdigest()[:16]
