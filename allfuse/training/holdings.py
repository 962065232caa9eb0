"""What of a session is held in common: by servers, or by groups that mix their weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from allfuse.base.torch_private import foreach_copy
from allfuse.plan import Site
from allfuse.roles.blueprint import Blueprint
from allfuse.roles.rotation import ALL
from allfuse.split.parted import Parted

if TYPE_CHECKING:
    from allfuse.plan import Data
    from allfuse.roles.blueprint import Pushed
    from allfuse.roles.replica import Replica
    from allfuse.split.base import Split
    from allfuse.training.learner import Learner
    from allfuse.training.place import Place
    from allfuse.training.state import State


class Holdings:
    """What a rank holds in common with servers: the whole model, or what it has of one that ranks
    share, which no rank ever has whole.

    It trains with views of the tensors that travel; where they are rows that are brought together
    block by block (`shard`), with copies of them.

    Args:
        blueprint: of whole tensors.

    Attributes:
        blueprint: of what ranks have. own: the model's tensors by its names.
        pushes: of those that this rank pushes, the name in the blueprint by that in the model.
    """

    def __init__(self, place: Place, state: State, blueprint: Blueprint, split: Split) -> None:
        self._learner = state.learners[0]
        self._tensors = tensors = held_tensors(state, self._learner)
        rank = place.mates.rank
        self._assembly = split.assembly if isinstance(split, Parted) else None
        self._link, self._moves = place.replicas, place.shard.size == 1
        if isinstance(split, Parted):
            self._link = place.data
            blueprint = blueprint.parted({name: h.pieces for name, h in split.held.items()})
        self.blueprint = blueprint
        self.own: dict[str, Tensor] = {}
        self.pushes: dict[str, str] = {}
        for held in blueprint.tensors:
            name = held.part.of if held.part else held.name
            if rank in held.ranks:
                self.own[held.name] = tensors[name]
            if rank == held.ranks[0]:
                self.pushes[name] = held.name
        self._travelling: Mapping[str, Tensor] = {}

    def whole(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Some tensors of the model, where they are cut on the first rank alone. All ask."""
        tensors = self._tensors
        if self._assembly is None:
            return {name: tensors[name] for name in names}
        parts = self._assembly.gather(tensors, names)
        return {name: value for part in parts for name, value in part.items()}

    def lay(self, travelling: Mapping[str, Tensor]) -> None:
        """These travel, and have the values of the model by now."""
        self._travelling = travelling
        if self._moves:
            for name, tensor in self.own.items():
                tensor.data = travelling[name]

    @torch.no_grad()
    def collect(self, fragment: int = ALL) -> None:
        """What this rank has made of that of which changes are pushed is to travel: of a fragment,
        or all."""
        for name in () if self._moves else names_of(self.blueprint, "change", fragment):
            if name in self.own:
                self._travelling[name].copy_(self.own[name])

    @torch.no_grad()
    def spread(self, flats: Sequence[Tensor], operation: str) -> None:
        """Train with what has come, which the first replica of a group hands on to the others.

        Args:
            flats: what the tensors that travel are views of.
        """
        for flat in flats:
            if self._link.size > 1 and flat.numel():
                self._link.broadcast(flat, operation).wait()
        if not self._moves:
            for name, tensor in self.own.items():
                tensor.detach().copy_(self._travelling[name])
        self._learner.note_weights()

    @contextlib.contextmanager
    def shown(self, replica: Replica) -> Iterator[None]:
        """For a moment, the weights are those that were sent last."""
        own = [tensor.detach() for tensor in self.own.values()]
        kept = [tensor.clone() for tensor in own]
        live = [] if self._moves else [flat.clone() for flat in replica.live]
        replica.show()
        self.spread(replica.live, "spread the weights as they were sent")
        try:
            yield
        finally:
            foreach_copy(own, kept)
            if live:
                foreach_copy(replica.live, live)
            self._learner.note_weights()


def names_of(blueprint: Blueprint, pushed: Pushed, fragment: int = ALL) -> Iterable[str]:
    """The tensors of which gradients, or changes, are pushed: of a fragment, or all."""
    for block in blueprint.blocks:
        if blueprint.groups[block.group].pushed == pushed and fragment in (ALL, block.fragment):
            yield from block.names


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
