"""What a script hands over to a session."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from allfuse.base.errors import UserError
from allfuse.fusion.statistics import globalize_batch_norm
from allfuse.job import default_forward
from allfuse.split.recompute import recompute_blocks
from allfuse.split.request import Request
from allfuse.training.building import start_model
from allfuse.training.learner import Learner, needs_closure
from allfuse.training.parting import refuse_settings

if TYPE_CHECKING:
    from allfuse.training.session import Session


def take_model(
    s: Session,
    build: Callable[[], nn.Module] | nn.Module,
    name: str | None,
    forward: Callable[[nn.Module, Any], Any] | None,
    request: Request,
    weights: str | Path | None,
) -> nn.Module:
    """What `Session.model` does; see there."""
    number = len(s.models)
    module = start_model(s, build, number, weights)
    shared = s.place.sharers.size > 1 and s.settings.batch_statistics == "global"
    has_norms = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in module.modules())
    refuse_settings(s.place.plan, s.settings, has_norms)
    if s.apart is not None:
        s.apart.refuse_global_statistics(has_norms, s.settings.batch_statistics)
    if shared and has_norms:
        s.stepper.norms += globalize_batch_norm(module, s.place.statistics)
    if s.settings.recompute and not s.split.cuts:  # else once it is cut
        recompute_blocks(module)
    if s.settings.compile and not s.split.cuts:  # likewise
        module.compile()
    s.state.add_model(name or ("model" if number == 0 else f"model{number}"), module)
    s.forwards.append(forward or default_forward)
    s.requests.append(request)
    return module


def take_optimizer(s: Session, optimizer: torch.optim.Optimizer) -> None:
    """What `Session.optimizer` does; see there.

    Raises:
        UserError: it is none, or one that no plan can share out.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise UserError(
            f"the optimizer is a {type(optimizer).__name__}; allowed: a torch.optim.Optimizer"
        )
    if needs_closure(optimizer):
        raise UserError(
            f"{type(optimizer).__name__} evaluates the loss several times in a step, which no "
            "plan can share out; allowed: optimizers whose step() needs no closure"
        )
    learner = Learner(
        optimizer,
        s.state.names,
        split=s.split,
        fuser=s.place.data_fuser,
        precision=s.precision,
    )

    def before() -> None:
        s.stepper.before_step_of(learner)
        s.keeper.settle()  # the weights change next

    optimizer.register_step_pre_hook(lambda *_: before())
    optimizer.register_step_post_hook(lambda *_: s.stepper.after_step_of(learner))
    if s.apart is not None:
        s.apart.take_over(
            learner,
            before,
            lambda: s.stepper.after_step_of(learner),
        )
        s.stepper.outflow = s.apart.outflow
    s.state.add_learner(learner)
