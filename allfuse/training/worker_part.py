"""A worker's part in the checkpoints of a run over servers: what it hands in, what it takes back.

It hands in the whole state of its session but for the tensors that servers hold. Schedulers that
follow steps or epochs, and the options of the optimizer that they change, are handed in as they
were at step 0, since a checkpoint may be of an earlier step than this worker's: whoever goes on
takes them to its step again.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
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
    from allfuse.link import Link


class WorkerPart:
    """Hands in and takes back what servers do not hold.

    Where ranks share a model each hands in what it has, by the first one, which hands on what comes
    from the others piece by piece.

    Args:
        held: the names of the tensors that servers hold.
        inner: the optimizer's state is this worker's own.
    """

    def __init__(self, state: State, learner: Learner, held: Collection[str], inner: bool) -> None:
        self.state, self.learner, self.inner = state, learner, inner
        self._held = set(held)
        self._follows = all(each.every != "evaluation" for each in state.schedulers)
        self._options = _options(learner)

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
        held = self._held_names()
        state["models"] = {
            prefix: {name: v for name, v in values.items() if held[prefix][name] is None}
            for prefix, values in state["models"].items()
        }
        skeleton, tensors = pack(state)
        content = {"state": skeleton, "held": held}
        return wrap(content, tensors, sequence=sequence, done=done, score=score)

    def _held_names(self) -> dict[str, dict[str, str | None]]:
        """Of all that the state dict of each model names, by which name servers hold it."""
        known, several = self.state.names(), len(self.state.models) > 1
        found: dict[str, dict[str, str | None]] = {}
        for prefix, module in self.state.models.items():
            parameters = dict(module.named_parameters(remove_duplicate=False))
            names = found[prefix] = {}
            for name in module.state_dict():
                own = f"{prefix}.{name}" if several else name
                first = known[id(parameters[name])] if name in parameters else own
                names[name] = first if first in self._held else None
        return found


def hand_on(messages: Sequence[Save], mates: Link, device: torch.device) -> Iterator[Save]:
    """What all ranks that share a model hand in, on the first of them, some megabytes at a time;
    elsewhere nothing. All ask."""
    if mates.size == 1:
        yield from messages
        return
    operation = "hand in a checkpoint"
    counts = torch.zeros(mates.size, dtype=torch.int64, device=device)
    counts[mates.rank] = len(messages)
    mates.all_reduce(counts, operation).wait()
    if mates.rank:
        text = torch.frombuffer(bytearray(messages[0].content.encode()), dtype=torch.uint8)
        parts = [text, *(message.tensors[0] for message in messages)]
        lengths = torch.tensor([part.numel() for part in parts])
        for part in (lengths, *parts):
            if part.numel():
                mates.send(part.to(device), 0, operation).wait()
        return

    def receive(rank: int, size: int, dtype: torch.dtype = torch.uint8) -> Tensor:
        part = torch.empty(size, dtype=dtype, device=device)
        if size:
            mates.receive(part, rank, operation).wait()
        return part.cpu()

    total, numbers = int(counts.sum()), itertools.count()
    for message in messages:
        yield replace(message, piece=next(numbers), pieces=total)
    for rank in range(1, mates.size):
        length, *sizes = receive(rank, int(counts[rank]) + 1, torch.int64).tolist()
        content = receive(rank, length).numpy().tobytes().decode()
        for number, size in enumerate(sizes):
            yield replace(
                messages[0],
                piece=next(numbers),
                pieces=total,
                content="" if number else content,
                tensors=(receive(rank, size),),
            )


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


def unsaved_buffers(state: State, held: Iterable[str]) -> list[str]:
    """The names of those that servers hold and no checkpoint does."""
    several = len(state.models) > 1
    saved = {
        f"{prefix}.{name}" if several else name
        for prefix, module in state.models.items()
        for name in module.state_dict()
    }
    return [name for name in held if name not in saved]


def _options(learner: Learner) -> list[dict[str, Any]]:
    """What the groups of the optimizer say, but for their parameters."""
    return [
        copy.deepcopy({name: value for name, value in group.items() if name != "params"})
        for group in learner.optimizer.param_groups
    ]
