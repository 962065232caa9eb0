"""Backward passes of loops that step their optimizers themselves."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from allfuse.base.errors import PeerLost, UserError

if TYPE_CHECKING:
    from allfuse.training.session import Session


def differentiate(
    s: Session,
    loss: Tensor,
    count: float | None,
    last: bool,
    optimizer: torch.optim.Optimizer | None,
) -> float:
    """What `Session.backward` does; see there."""
    refuse_loss(s, loss)
    learner = s.state.learner(optimizer)
    step = s.course.open_step_for(learner)
    if count is None:
        if not last or step.losses:
            raise UserError(
                "backward(last=False) needs count=, the number of things in the loss's mean, "
                "and so do the other parts of its batch"
            )
        count = 1.0 if step.portion is None else float(max(step.portion.rows, 1))
    if s.stepper.passes(learner):
        return math.nan
    try:
        s.stepper.differentiate(learner, loss.reshape(()), float(count), float(count), last=last)
        return s.stepper.finish(learner).loss if last else math.nan
    except PeerLost as error:
        s.survival.refuse_own_loops(error)
        raise


def refuse_loss(s: Session, loss: Tensor) -> None:
    """Refuse what is no mean loss, and backward passes that are not a loop's to make.

    Raises:
        UserError: says who can.
    """
    if s.precision.scaler is not None:
        raise UserError(
            "backward() with precision fp16: the loss scaler must step the optimizer; "
            "allowed: bf16 or fp32 here, or s.step(batch, loss)"
        )
    if s.split.pipeline is not None:
        raise UserError(
            f"backward() under {s.plan}: a loss of the script's own is one of the last "
            "stage alone, and stages go forth and back in microbatches; next: s.step(batch, "
            "loss), or a plan without pipe"
        )
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        shape = f" of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else ""
        raise UserError(
            f"backward(loss): received a {type(loss).__name__}{shape}; allowed: a tensor of "
            "one number, the mean loss"
        )
