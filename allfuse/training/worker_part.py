"""A worker's part in the checkpoints of a run over servers: what it hands in, what it takes back.

It hands in the whole state of its session but for the tensors that servers hold. Schedulers that
follow steps or epochs, and the options of the optimizer that they change, are handed in as they
were at step 0, since a checkpoint may be of an earlier step than this worker's: whoever goes on
takes them to its step again.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from allfuse.roles.messages import Save
from allfuse.roles.wrapping import wrap
from allfuse.split.piece import Piece
from allfuse.store.checkpoint import Checkpoints
from allfuse.store.tree import pack
from allfuse.training.keeper import trouble_with
from allfuse.training.learner import Learner
from allfuse.training.served import read_state
from allfuse.training.state import State

if TYPE_CHECKING:
    from allfuse.training.assembly import Assembly


class WorkerPart:
    """Hands in and takes back what servers do not hold.

    Args:
        held: the tensors that servers hold, by name.
        inner: the optimizer's state is this worker's own.
    """

    def __init__(self, state: State, learner: Learner, held: Mapping[str, Tensor], inner: bool):
        self.state, self.learner, self.inner = state, learner, inner
        self._held = {(t.data_ptr(), t.numel()): name for name, t in held.items() if t.numel()}
        self._follows = all(each.every != "evaluation" for each in state.schedulers)
        self._options = _options(learner)

    def join(
        self,
        assembly: Assembly,
        captured: Mapping[str, Any],
        names: Collection[str],
        common: Mapping[str, Tensor],
    ) -> dict[str, Any]:
        """On the first rank the state of all that share its model, elsewhere nothing. All ask.

        Args:
            names: of tensors that are held in common: not what ranks captured of them is in it,
                but those of `common`, which the first rank has.
        """
        ((prefix, module),) = self.state.models.items()
        tensors = dict(module.named_parameters(remove_duplicate=False))
        known = self.state.names()
        first = {name: known[id(parameter)] for name, parameter in tensors.items()}
        values = captured["models"][prefix]
        rest = {name: v for name, v in values.items() if first.get(name, name) not in names}
        whole = assembly.join({**captured, "models": {prefix: rest}})
        if whole:
            found = whole["models"][prefix]
            for name in module.state_dict():
                if first.get(name, name) in names:
                    found[name] = common[first.get(name, name)]
        return whole

    def hand_in(
        self, captured: Mapping[str, Any], *, sequence: int, done: int, score: float | None
    ) -> list[Save]:
        """The messages that bring a captured state to the scheduler.

        Raises:
            CheckpointError: something in it cannot be saved.
        """
        state = dict(captured)
        kept = state["optimizers"][0]
        options = self._options if self._follows else _options(self.learner)
        groups = [
            {**options, "params": group["params"]}
            for options, group in zip(options, kept["param_groups"], strict=True)
        ]
        state["optimizers"] = [
            {"state": kept["state"] if self.inner else {}, "param_groups": groups}
        ]
        if self._follows:
            state["schedulers"] = [None for _ in state["schedulers"]]
        skeleton, tensors = pack(state)
        held = {
            place: self._held[tensor.data_ptr(), tensor.numel()]
            for place, tensor in tensors.items()
            if (tensor.data_ptr(), tensor.numel()) in self._held and place.startswith("models/")
        }
        own = {place: tensor for place, tensor in tensors.items() if place not in held}
        content = {"state": skeleton, "held": held}
        return wrap(content, own, sequence=sequence, done=done, score=score)


def restore(
    state: State,
    learner: Learner,
    out: Path,
    inner: bool,
    pieces: Mapping[str, Piece | None],
) -> None:
    """Take back from a run's newest checkpoint what servers do not hold; nothing where there is
    none.

    Args:
        inner: the optimizer's state is this worker's own.
        pieces: what this rank has of tensors that it has not whole.

    Raises:
        CheckpointError: it is of other models, optimizers, schedulers or parts.
    """
    checkpoints = Checkpoints(out / "checkpoints")
    step = next((s for s in checkpoints.steps() if trouble_with(checkpoints, s) is None), None)
    if step is None:
        return
    found, _ = read_state(checkpoints, step, pieces)
    options = _options(learner)
    only = {**found, "schedulers": [], "fusions": [], "scaler": None}
    if not inner:
        only["optimizers"] = []
    for each, kept in zip(state.schedulers, found["schedulers"], strict=False):
        if each.every == "evaluation" and kept is not None:
            each.scheduler.load_state_dict(kept)
            options = [
                {name: value for name, value in group.items() if name != "params"}
                for group in found["optimizers"][0]["param_groups"]
            ]
    state.restore(only, complete=False)
    for group, own in zip(learner.optimizer.param_groups, options, strict=True):
        group.update(own)


def names_of(learner: Learner, names: Mapping[int, str]) -> list[str | None]:
    """The names of the optimizer's parameters in the order of its state; None of frozen ones."""
    held = [p for group in learner.optimizer.param_groups for p in group["params"]]
    return [names[id(p)] if p.requires_grad else None for p in held]


def unsaved_buffers(state: State, held: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those that servers hold and no checkpoint does."""
    several = len(state.models) > 1
    saved = {
        f"{prefix}.{name}" if several else name
        for prefix, module in state.models.items()
        for name in module.state_dict()
    }
    return {name: tensor for name, tensor in held.items() if name not in saved}


def _options(learner: Learner) -> list[dict[str, Any]]:
    """What the groups of the optimizer say, but for their parameters."""
    return [
        copy.deepcopy({name: value for name, value in group.items() if name != "params"})
        for group in learner.optimizer.param_groups
    ]
