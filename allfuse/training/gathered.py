"""What a group of ranks that gossips holds in common with others: whole on its first rank, which
mixes it with that of other groups, and from there on the other ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from allfuse.split.assembly import Assembly
from allfuse.split.parted import Parted
from allfuse.training.holdings import held_tensors

if TYPE_CHECKING:
    from allfuse.roles.blueprint import Blueprint
    from allfuse.split.base import Split
    from allfuse.training.place import Place
    from allfuse.training.state import State


class Gathered:
    """Where each rank has the whole model, it trains with views of the tensors that are mixed.
    Where ranks share one, the first has those beside its pieces, and others have pieces alone.

    Attributes:
        whole: the tensors that are mixed, on ranks that have them, to be laid by `lay`.
        own: those that this rank trains with.
    """

    def __init__(self, place: Place, state: State, blueprint: Blueprint, split: Split) -> None:
        self._place, self._learner = place, state.learners[0]
        self.names = [held.name for held in blueprint.tensors]
        self.own = held_tensors(state, self._learner)
        self.whole: Mapping[str, Tensor] = {}
        is_of_first = place.rank < place.plan.replica_size
        self.is_cut = isinstance(split, Parted)
        self._assembly: Assembly | None = None  # of the replica that the first rank is in
        if isinstance(split, Parted) and is_of_first:
            self._assembly = split.assembly

    def first_values(self) -> Mapping[str, Tensor]:
        """The tensors as they are before training; where they are cut on the first rank alone. All
        ask."""
        return self._gathered() if self.is_cut else self.own

    def _gathered(self) -> dict[str, Tensor]:
        if self._assembly is None:
            return {}
        parts = self._assembly.gather(self.own, self.names)
        return {name: value for part in parts for name, value in part.items()}

    def lay(self, whole: Mapping[str, Tensor]) -> None:
        """These are mixed, and have the values of the model by now."""
        self.whole = whole
        if not self.is_cut:
            for name, tensor in self.own.items():
                tensor.data = whole[name]

    @torch.no_grad()
    def collect(self) -> None:
        """Bring to the first rank what ranks that share the model have made of it."""
        if self._assembly is None:
            return
        for part in self._assembly.gather(self.own, self.names):
            for name, value in part.items():
                self.whole[name].copy_(value)

    @torch.no_grad()
    def spread(self, flats: Sequence[Tensor], operation: str) -> None:
        """Give all ranks what the first one has.

        Args:
            flats: what the whole tensors are views of.
        """
        if not self.is_cut:
            self._broadcast(flats, operation)
            return
        if self._assembly is not None:
            self._assembly.scatter(self.whole, self.own, self.names)
        if self._place.data.size > 1:
            tensors = [tensor.detach() for tensor in self.own.values() if tensor.is_contiguous()]
            self._broadcast(tensors, operation)
        self._learner.note_weights()

    def _broadcast(self, tensors: Sequence[Tensor], operation: str) -> None:
        link = self._place.data if self.is_cut else self._place.replicas
        for tensor in tensors:
            if link.size > 1 and tensor.numel():
                link.broadcast(tensor, operation).wait()
