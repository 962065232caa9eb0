"""Sites of a plan, serially: models that become one now and then, or mix, written out.

Shared with the code under test is what is pure: see replay.py, how tensors are cut into fragments,
and which step of torch's SGD an outer optimizer is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from allfuse.codec import Identity
from allfuse.fusion.gradients import BUCKET_BYTES
from allfuse.fusion.weights import cut_fragments
from allfuse.plan import Site
from allfuse.rule import Mean
from allfuse.sync.outer import Average
from allfuse.topology import Layout, Schedule
from allfuse.verify.replay import Replay, positions_of

OWN_SHARE = 0.5  # of what a site came to meanwhile, where a fusion lands some steps late


class Learner(Protocol):
    """What is asked of a site: its model, and on how many samples it has learned so far."""

    model: nn.Module
    samples: int


@dataclass
class Departure:
    """What was fused of a fragment: a value for each tensor, by its place, and when it lands.

    unsent: by the name of a block, what its peers had not sent before.
    """

    fragment: int
    due: int
    fused: dict[int, Tensor]
    unsent: dict[str, list[Tensor]]


class Sites:
    """The rounds of a site axis over the models of all sites.

    anchors: what all agreed on in the last round, which under an outer optimizer are its
    parameters. bundles: of each fragment, the names of its blocks and the places of their tensors.
    seen: how many samples each site had learned from at the last round of each fragment.
    """

    def __init__(self, axis: Site, seed: int, learners: Sequence[Learner]) -> None:
        self.axis, self.seed, self.learners = axis, seed, learners
        self.replay = Replay(axis, seed)
        self.exact = Replay(replace(axis, codec=Identity(), topology=None), seed)
        mixing = axis.topology is not None and not axis.topology.exact
        self.mixing = axis.topology if mixing else None
        held = floating(learners[0])
        self.anchors = [tensor.clone() for tensor in held]
        floats = [p for p in learners[0].model.parameters() if p.is_floating_point()]
        self.parameters = set(range(len(floats)))
        self.stepped = set() if isinstance(axis.outer, Average) else self.parameters
        alone = axis.rule.of_tensors or axis.rule.of_changes
        most = 1 if alone else BUCKET_BYTES
        self.bundles: list[list[tuple[str, list[int]]]] = []
        self.optimizers: list[torch.optim.SGD | None] = []
        number = 0
        for places in cut_fragments([tensor.nbytes for tensor in held], axis.fragments):
            self.bundles.append([])
            for found in positions_of([held[p] for p in places], most, most):
                name = f"fuse weights, bucket {number}"
                self.bundles[-1].append((name, [places[place] for place in found]))
                number += 1
            anchors = [self.anchors[place] for place in places if place in self.stepped]
            options = axis.outer.options()
            self.optimizers.append(torch.optim.SGD(anchors, **options) if anchors else None)
        self.seen = [[0] * len(learners) for _ in range(axis.fragments)]
        self.departed: list[Departure] = []
        self.equal = True

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Start the rounds that start after this step, and land those that are due."""
        every, fragments = self.axis.every, self.axis.fragments
        self.equal = False
        if every == "end":
            return
        for fragment in range(fragments):
            first = every * (fragment + 1) // fragments
            if step < first or (step - first) % every:
                continue
            number = (step - first) // every
            if self.mixing is not None:
                mix(self.learners, self.mixing.schedule(Layout.of(self.axis.n), number, self.seed))
                continue
            weights = self.weights(fragment)
            self.seen[fragment] = [learner.samples for learner in self.learners]
            encodes = self.replay.encodes(number)
            unsent = {name: self.replay.unsent(name) for name, _ in self.bundles[fragment]}
            fused = self.fuse(self.replay, fragment, weights, number, encodes)
            self.departed.append(Departure(fragment, step + self.axis.delay, fused, unsent))
        while self.departed and self.departed[0].due <= step:
            self.land(self.departed.pop(0), OWN_SHARE if self.axis.delay else 0.0)
            self.equal = self.axis.delay == 0 and fragments == 1

    @torch.no_grad()
    def finish(self) -> None:
        """What is under way lands; then the mean, or what the rule makes of it, ends it all."""
        if self.equal:
            return
        while self.departed:
            self.land(self.departed.pop(0), OWN_SHARE)
        weights = self.weights(*range(self.axis.fragments))
        for fragment in range(self.axis.fragments):
            fused = self.fuse(self.exact, fragment, weights, 0, False)
            if self.axis.every == "end":
                self.land(Departure(fragment, 0, fused, {}), 0.0)
            else:
                self.write(fused, 0.0)

    def weights(self, *fragments: int) -> list[float]:
        """Each site's share of the samples since the last round: of the fragment that had the
        longest ago, by which all count alike."""
        n = len(self.learners)
        learned = [
            max(learner.samples - self.seen[fragment][site] for fragment in fragments)
            for site, learner in enumerate(self.learners)
        ]
        total = sum(learned)
        alike = self.mixing is not None or not total
        return [1 / n] * n if alike else [own / total for own in learned]

    def fuse(
        self, replay: Replay, fragment: int, weights: list[float], number: int, encodes: bool
    ) -> dict[int, Tensor]:
        """What comes out for each tensor of a fragment. What is encoded are changes, and what rules
        of changes fuse; such a rule is for parameters, and buffers are averaged."""
        found: dict[int, Tensor] = {}
        held = [floating(learner) for learner in self.learners]
        for name, places in self.bundles[fragment]:
            blocks = [torch.cat([own[place].reshape(-1) for place in places]) for own in held]
            anchor = torch.cat([self.anchors[place].reshape(-1) for place in places])
            rule = replay.rule
            if rule.of_changes and places[0] not in self.parameters:
                rule = Mean()
            if encodes or rule.of_changes:
                blocks = [block - anchor for block in blocks]
            shapes = [tuple(held[0][place].shape) for place in places]
            fused = replay.fuse(blocks, weights, shapes, name, number, rule)
            if encodes or rule.of_changes:
                fused = fused + anchor
            pieces = fused.split([held[0][place].numel() for place in places])
            for place, piece in zip(places, pieces, strict=True):
                found[place] = piece.view_as(held[0][place])
        return found

    def land(self, departure: Departure, own: float) -> None:
        """The outer optimizer's step from the anchors along what they are ahead of the fused
        weights; all others become what was fused."""
        for place, fused in departure.fused.items():
            anchor = self.anchors[place]
            if place in self.stepped:
                anchor.grad = anchor - fused
            else:
                anchor.copy_(fused)
        optimizer = self.optimizers[departure.fragment]
        if optimizer is not None:
            optimizer.step()
        for name, unsent in departure.unsent.items():
            self.replay.undo(name, unsent, own)
        self.write({place: self.anchors[place] for place in departure.fused}, own)

    def write(self, values: dict[int, Tensor], own: float) -> None:
        for learner in self.learners:
            held = floating(learner)
            for place, value in values.items():
                held[place].copy_(held[place] * own + value * (1 - own))


def floating(learner: Learner) -> list[Tensor]:
    """All weights and buffers that are not counters."""
    held = (*learner.model.parameters(), *learner.model.buffers())
    return [tensor.detach() for tensor in held if tensor.is_floating_point()]


def mix(learners: Sequence[Learner], schedule: Schedule) -> None:
    """A round of gossip: each value becomes its own share of itself and that of what it hears."""
    held = [floating(learner) for learner in learners]
    for phase in schedule.phases:
        for tensors in zip(*held, strict=True):
            before = [tensor.clone() for tensor in tensors]
            for site, tensor in enumerate(tensors):
                heard = [(before[t.src], t.weight) for t in phase if t.dst == site]
                own = 1 - sum(weight for _, weight in heard)
                tensor.copy_(before[site] * own + sum(value * weight for value, weight in heard))
