"""What of a session is held in common: by servers, or by groups that mix their weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from allfuse.base.torch_private import foreach_copy
from allfuse.plan import Site
from allfuse.roles.blueprint import Blueprint
from allfuse.roles.cutting import view_all
from allfuse.roles.rotation import ALL
from allfuse.split.parted import Parted
from allfuse.training.assembly import Assembly

if TYPE_CHECKING:
    from allfuse.plan import Data
    from allfuse.roles.blueprint import Pushed
    from allfuse.roles.replica import Replica
    from allfuse.split.base import Split
    from allfuse.training.learner import Learner
    from allfuse.training.place import Place
    from allfuse.training.state import State
    from allfuse.training.worker_part import WorkerPart


class Holdings:
    """What a group of ranks holds in common with others, and how rank 0 of it, which talks to them,
    has that from the other ranks and gives it to them.

    Where each rank has the whole model, it trains with views of the tensors that travel. Where
    ranks share one, rank 0 has those beside its pieces, and others have their pieces alone.

    Attributes:
        blueprint: of whole tensors. whole: these, on ranks that have them, to be laid by `lay`.
        own: those that this rank trains with.
    """

    def __init__(self, place: Place, state: State, blueprint: Blueprint, split: Split) -> None:
        self.blueprint, self._learner, self._link = blueprint, state.learners[0], place.replicas
        self.names = [held.name for held in blueprint.tensors]
        self.own = held_tensors(state, self._learner)
        self.whole: Mapping[str, Tensor] = {}
        self._assembly = Assembly(place, split.held) if isinstance(split, Parted) else None

    @property
    def is_cut(self) -> bool:
        return self._assembly is not None

    def first_values(self) -> Mapping[str, Tensor]:
        """The tensors as they are before training; where they are cut on rank 0 alone. All ask."""
        if self._assembly is None:
            return self.own
        parts = self._assembly.gather(self.own, self.names)
        return {name: value for part in parts for name, value in part.items()}

    def lay(self, whole: Mapping[str, Tensor]) -> None:
        """These travel, and have the values of the model by now."""
        self.whole = whole
        if self._assembly is None:
            for name, tensor in self.own.items():
                tensor.data = whole[name]

    # To rank 0.

    @torch.no_grad()
    def collect(self, fragment: int = ALL) -> None:
        """Bring to rank 0 what ranks that share the model have made of that of which changes are
        pushed: of a fragment, or of all."""
        if self._assembly is None:
            return
        for part in self._assembly.gather(self.own, self._names_of("change", fragment)):
            for name, value in part.items():
                self.whole[name].copy_(value)

    def gradients(self) -> Iterator[dict[str, Tensor]]:
        """Gradients of a model that ranks share, some at a time, the last first: whole on rank 0,
        nothing elsewhere. All ask."""
        assert self._assembly is not None
        found = {name: parameter.grad for name, parameter in self._learner.named().items()}
        yield from self._assembly.gather(found, reversed(self._names_of("gradient")))

    def _names_of(self, pushed: Pushed, fragment: int = ALL) -> list[str]:
        groups, blocks = self.blueprint.groups, self.blueprint.blocks
        found = [b for b in blocks if groups[b.group].pushed == pushed]
        return [n for b in found if fragment in (ALL, b.fragment) for n in b.names]

    def state(self, part: WorkerPart, captured: dict[str, Any]) -> dict[str, Any]:
        """A captured state; of ranks that share a model on rank 0 that of all. All ask."""
        if self._assembly is None:
            return captured
        return part.join(self._assembly, captured, set(self.names), self.whole)

    # From there.

    def spread(self, flats: Sequence[Tensor], operation: str) -> None:
        """Give all ranks what rank 0 has to train with.

        Args:
            flats: what the whole tensors are views of.
        """
        if self._assembly is not None:
            self._scatter(self.whole)
            return
        for flat in flats:
            if self._link.size > 1 and flat.numel():
                self._link.broadcast(flat, operation).wait()

    def _scatter(self, whole: Mapping[str, Tensor]) -> None:
        assert self._assembly is not None
        self._assembly.scatter(whole, self.own, self.names)
        self._learner.note_weights()

    @contextlib.contextmanager
    def shown(self, replica: Replica | None) -> Iterator[None]:
        """For a moment, all ranks have the weights as they were sent to rank 0 last."""
        own = [tensor.detach() for tensor in self.own.values()]
        kept = [tensor.clone() for tensor in own]
        if self._assembly is not None:
            self._scatter({} if replica is None else view_all(self.blueprint.blocks, replica.sent))
        elif replica is not None:
            replica.show()
            self.spread(replica.live, "spread the weights as they were sent")
        try:
            yield
        finally:
            foreach_copy(own, kept)
            self._learner.note_weights()


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
