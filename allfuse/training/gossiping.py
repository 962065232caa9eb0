"""A group of ranks that mixes its weights with other groups, each when it is ready.

Rank 0 of the group talks to the scheduler and to the first ranks of other groups; the other ranks
hear from it, so that all follow one decision.

The course of a lease, for weights of B bytes and a group of m ranks:
  1. the group works through the lease's steps, each with its own optimizer;
  2. after each step it answers those who have asked (B received and sent by rank 0), and takes in
     what it was answered itself (B received); where that changed its weights, B are broadcast
     inside the group;
  3. after the last one it asks somebody for the mean of both (B sent by rank 0), and for the next
     lease. It waits for neither.

A checkpoint is the state of the group that it fell to, with weights of its own; at the end, and
where a run is interrupted, with the mean of all. A run that goes on begins everywhere with that.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from allfuse.base.torch_private import foreach_copy
from allfuse.launcher.crewmate import Crewmate
from allfuse.roles.agent import Agent
from allfuse.roles.cutting import view_all
from allfuse.roles.gossip_agent import GossipAgent
from allfuse.roles.messages import Join
from allfuse.roles.parcels import Flats
from allfuse.roles.rotation import ALL
from allfuse.store.run import is_run
from allfuse.topology.gossip import Gossip
from allfuse.training.apart import Apart
from allfuse.training.gathered import Gathered
from allfuse.training.keeper import decide_resume
from allfuse.training.worker_part import WorkerPart, restore

if TYPE_CHECKING:
    import threading

    from allfuse.base.events import Bus
    from allfuse.split.base import Split
    from allfuse.training.place import Place
    from allfuse.training.state import State
    from allfuse.training.step import Step


class Gossiping(Apart):
    """A group's side of the scheduler and of the other groups.

    Attributes:
        flats: its weights, a flat tensor for each block of the blueprint.
    """

    link: ClassVar[str] = "gossip"
    steps_one: ClassVar[str] = "groups that gossip mix what one optimizer steps"
    _changes = 0

    def _make_agent(
        self, crew: Crewmate, name: str, timeout_s: float, asked: threading.Event
    ) -> Agent:
        return GossipAgent(crew, name, timeout_s, asked)

    def __init__(self, place: Place, bus: Bus) -> None:
        super().__init__(place, bus)
        self.flats: Flats = []
        self.tensors: dict[str, Tensor] = {}

    @property
    def _gossip_agent(self) -> GossipAgent | None:
        assert self._agent is None or isinstance(self._agent, GossipAgent)
        return self._agent

    def begin(
        self, state: State, split: Split, *, steps_per_epoch: int, steps: int | None,
        epochs: int | None, fingerprints: Mapping[str, str],
    ) -> None:  # fmt: skip
        """Join, and wait for the first weights and the first lease; arguments as of `Apart`."""
        learner, blueprint = state.learners[0], self._blueprint
        self._steps_per_epoch = steps_per_epoch
        out = self.facts.get("out")
        resumes = decide_resume(self.facts.get("resume", False), out)
        if out is not None and resumes and is_run(out):
            restore(state, learner, Path(out), True, split.pieces())
        self.gathered = Gathered(self.place, state, blueprint, split)
        self._lay(self.gathered.first_values())
        self._part = WorkerPart(state, learner, (), inner=True)
        agent = self._gossip_agent
        if agent is not None:
            digest = hashlib.sha256(repr(sorted(fingerprints.items())).encode()).hexdigest()[:16]
            join = Join(
                name=agent.name,
                host=self.place.world.host_identity(),
                fingerprint=f"{digest}-{blueprint.digest}",
                steps_per_epoch=steps_per_epoch,
                steps=steps,
                epochs=epochs,
                blueprint=blueprint.plain(),
                facts=self.facts,
                place=agent.place,
            )
            topology = self.outer.topology
            assert isinstance(topology, Gossip)
            agent.gossip(
                join,
                blueprint,
                self.flats,
                lambda place, n, round: topology.partner(place, n, round, seed=0),
            )
        self._next()

    @torch.no_grad()
    def _lay(self, held: Mapping[str, Tensor]) -> None:
        """Make the flat tensors, of which the model's are views where it is whole."""
        if not held:  # ranks share the model, and rank 0 has them
            return
        blocks, device = self._blueprint.blocks, self.place.device
        self.flats = [torch.empty(b.elements, dtype=b.dtype, device=device) for b in blocks]
        self.tensors = view_all(blocks, self.flats)
        foreach_copy(list(self.tensors.values()), [held[name] for name in self.tensors])
        self.gathered.lay(self.tensors)

    # From step to step.

    def count(self, step: Step) -> None:
        super().count(step)
        agent, changes = self._gossip_agent, self._changes
        meets = agent is not None and agent.look()
        if self.gathered.is_cut:
            meets = bool(self._following.tell(int(meets), "tell whether the group is to mix"))
            if meets:
                self.gathered.collect()
        if agent is not None and meets:
            changes = agent.meet()
        if meets or not self.gathered.is_cut:
            changes = self._following.tell(changes, "tell whether the group has mixed")
        if changes != self._changes:
            self._changes = changes
            self._spread()

    def _next(self) -> None:
        """The next lease, on all ranks of the group, and the weights as they are by then."""
        before = self.lease
        if self._agent is not None:
            self._agent.step = 0 if self.lease is None else self.lease.done
        self.lease = self._following.next_lease()
        self._begin_lease(before)
        self._spread()
        if self.is_over and self._gossip_agent is not None:
            self._gossip_agent.tell("exchanged", self._gossip_agent.exchanged)

    def _collect(self, fragment: int = ALL) -> None:
        self.gathered.collect()

    def _spread(self) -> None:
        """What rank 0 of the group has, on all of its ranks."""
        self.gathered.spread(self.flats, "spread the weights of a group")

    def how_to_go_on(self) -> str:
        return super().how_to_go_on().replace("what the servers held", "the mean of all weights")
