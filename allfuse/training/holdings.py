"""What of a session is held in common: by servers, or by groups that mix their weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from allfuse.plan import Site
from allfuse.roles.blueprint import Blueprint

if TYPE_CHECKING:
    from allfuse.plan import Data
    from allfuse.training.learner import Learner
    from allfuse.training.state import State


def held_tensors(state: State, learner: Learner) -> dict[str, Tensor]:
    """By name: trained parameters and floating-point buffers."""
    names = state.names()
    held: dict[str, Tensor] = {names[id(p)]: p for p in learner.parameters}
    return held | dict(floating_buffers(state))


def make_blueprint(
    outer: Data | Site, state: State, learner: Learner, *, in_step: bool
) -> Blueprint:
    """Of the tensors that are held, with the optimizer that steps them: that of gradients, or the
    outer one of a site's changes."""
    codec, share = str(outer.codec), 1.0 if in_step else 1.0 / outer.n
    names, buffers = state.names(), floating_buffers(state)
    parameters = [(names[id(p)], p) for p in learner.parameters]
    if isinstance(outer, Site):
        options, fragments = outer.outer.options(share), outer.fragments
        return Blueprint.of_changes(
            parameters, buffers, options=options, codec=codec, share=share, fragments=fragments
        )
    return Blueprint.of_gradients(learner.optimizer, parameters, buffers, codec=codec, share=share)


def floating_buffers(state: State) -> list[tuple[str, Tensor]]:
    """Buffers that are averaged, by name: statistics of batches."""
    several = len(state.models) > 1
    return [
        (f"{prefix}.{name}" if several else name, buffer)
        for prefix, module in state.models.items()
        for name, buffer in module.named_buffers()
        if buffer.is_floating_point()
    ]
