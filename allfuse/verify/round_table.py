"""A run of workers that gossiped, executed serially in one process, by plain PyTorch.

Each worker's model steps and meets others in the order of the logs (meetings.py). There are no
messages and no pieces here: whole tensors, by name, and one deed after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

import torch

from allfuse.base.errors import AllfuseError
from allfuse.job import Job
from allfuse.plan import Plan
from allfuse.roles.diary import (
    ANSWERED,
    APPLIED,
    COPIED,
    GATHERED,
    GAVE,
    LENT,
    OFFERED,
    Entry,
)
from allfuse.roles.mixing import mean_of
from allfuse.roles.terms import terms_of
from allfuse.training.building import build_first
from allfuse.verify.central import Named
from allfuse.verify.history import Gossip, History
from allfuse.verify.meetings import AFTER, Learned, in_order
from allfuse.verify.pairs import Pairs
from allfuse.verify.pupil import Lesson, Pupil, Samples
from allfuse.verify.serial import make_blueprint

KEPT = (LENT, GAVE)
"""Deeds after which somebody may need the weights as they were."""

Key: TypeAlias = tuple[str, str, int]
"""Of what somebody needs later: the deed, the visitor, the number of its question."""


class RoundTable:
    """All workers of a run.

    Attributes:
        pupils: by the worker's name. parameters: names of the weights that are no buffers.
    """

    def __init__(self, job: Job, plan: Plan, history: History, device: torch.device) -> None:
        outer, terms = plan.outer, terms_of(plan, timeout_s=0.0)  # nothing is waited for
        assert outer is not None
        assert history.gossip is not None, "servers held the weights"
        self.gossip: Gossip = history.gossip
        self._counted = {update.lease for update in history.updates}
        model = build_first(job).to(device)
        blueprint = make_blueprint(job, model, outer, terms)
        self._pairs = Pairs(blueprint)
        samples = Samples(job, terms.parts, plan.inner.replicas)
        self.parameters = {name for name, _ in model.named_parameters()}
        self.pupils = {
            worker: Pupil(job, model, blueprint, samples, job.clip) for worker in self.gossip.logs
        }
        self._wanted = {
            key for worker, log in self.gossip.logs.items() for key in _needed(worker, log)
        }
        self._kept: dict[Key, Named] = {}
        self._bases: dict[tuple[str, int], int] = {}  # of offers
        self._gathered: list[Named] = []

    def weights_of(self, worker: str) -> Named:
        return {name: t.detach().clone() for name, t in self.pupils[worker].held.items()}

    def play(self, learned: Callable[[str, int, Lesson], None]) -> Named:
        """Do all again; the weights at the end, the mean of those of all.

        Args:
            learned: told of each lease that was done to its end.

        Raises:
            AllfuseError: the logs cannot be right.
        """
        lessons: dict[int, Lesson] = {}
        shares = self.gossip.shares
        order = in_order(
            self.gossip.logs, lambda lease: shares[lease].steps, self._counted.__contains__
        )
        for deed in order:
            if not isinstance(deed, Learned):
                self._meet(deed.worker, deed.entry)
                continue
            share, lesson = shares[deed.lease], lessons.setdefault(deed.lease, Lesson())
            for step in range(share.first_step + deed.first, share.first_step + deed.last):
                self.pupils[deed.worker].step(step, share.part, lesson)
            if deed.last == share.steps:
                learned(deed.worker, deed.lease, lessons.pop(deed.lease))
        if not self._gathered:
            raise AllfuseError("the logs do not say who averaged the weights at the end")
        return {
            name: mean_of([each[name] for each in self._gathered]) for name in self._gathered[0]
        }

    def _keep(self, key: Key, values: Named) -> None:
        if key in self._wanted:
            self._kept[key] = {name: value.detach().clone() for name, value in values.items()}

    @torch.no_grad()
    def _meet(self, worker: str, entry: Entry) -> None:
        own, deed = self.pupils[worker].held, entry.deed
        if deed == OFFERED:
            self._keep((deed, worker, entry.number), self._pairs.offer(worker, entry, own))
            self._bases[worker, entry.number] = entry.base
        elif deed in KEPT:
            self._keep((deed, entry.peer if deed == LENT else worker, entry.number), own)
        elif deed == ANSWERED:
            offer = entry.peer, entry.number
            said, base = self._kept.pop((OFFERED, *offer)), self._bases[offer]
            differences = self._pairs.answer(worker, entry, base, said, own)
            for name, value in own.items():
                value.add_(differences[name])
            self._keep((ANSWERED, entry.peer, entry.number), differences)
        elif deed == APPLIED:
            differences = self._kept.pop((ANSWERED, worker, entry.number))
            for name, value in own.items():
                value.sub_(differences[name])
        elif deed == COPIED and entry.peer:
            for name, value in self._kept.pop((LENT, worker, entry.number)).items():
                own[name].copy_(value)
        elif deed == GATHERED and worker == self.gossip.collector:
            is_own = entry.peer == worker
            self._gathered.append(
                self.weights_of(worker) if is_own else self._kept[GAVE, entry.peer, entry.number]
            )


def _needed(worker: str, log: Sequence[Entry]) -> Iterator[Key]:
    """What a worker's deeds are made of."""
    for entry in log:
        visitor = worker if entry.deed in (APPLIED, COPIED) else entry.peer
        if entry.deed in AFTER:
            yield AFTER[entry.deed], visitor, entry.number
