"""A run's order of events executed serially, in one process, by plain PyTorch.

It shares with the code under test the job, the first weights, the order of samples, the rule that
cuts n rows into even shares, and how what servers hold is named (a blueprint). There are no servers
here, no workers at the same time, no pieces and no messages: whole tensors, one optimizer for each
group, one update after the other. What codecs do to updates and weights is in encoded.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from allfuse.base.errors import AllfuseError
from allfuse.job import Job
from allfuse.plan import Site
from allfuse.roles.blueprint import Blueprint
from allfuse.roles.rotation import ALL
from allfuse.roles.terms import Terms
from allfuse.training.building import build_first
from allfuse.verify.central import Central, Named
from allfuse.verify.encoded import Inward, Outward, names_of
from allfuse.verify.history import Event, History, Update
from allfuse.verify.layout import Layout
from allfuse.verify.pupil import Lesson, Pupil, Samples
from allfuse.verify.returns import Returns

OWN_SHARE = 0.5
"""What a site keeps of its own weights under a delay (Douillard et al. 2025, arXiv:2501.18512)."""


class Serial:
    """The run of a job under a plan with servers, executed from its history.

    Kept are the weights that later updates were made of, and no others.

    Args:
        terms: of the plan. outer: its axis that is out of step. ranks: workers of a group.
        history: what happened, and how servers held the weights.
    """

    def __init__(
        self,
        job: Job,
        outer: Any,
        terms: Terms,
        ranks: int,
        device: torch.device,
        history: History,
    ) -> None:
        self.job, self.outer, self.terms, self.history = job, outer, terms, history
        self.model = build_first(job).to(device)
        self.blueprint = make_blueprint(job, self.model, outer, terms)
        self.samples = Samples(job, terms.parts, ranks)
        whole = Layout(self.blueprint)
        self.layout = history.layout if history.layout.is_cut else whole
        is_set_back = any(not each.whole for each in history.rebirths)
        self.central = Central(
            self.layout if is_set_back else whole, self.model, terms.servers, by_shard=is_set_back
        )
        self.outward = Outward(self.layout, terms.servers)
        self.inward: dict[str, Inward] = {}
        self.pupils: dict[str, Pupil] = {}
        self._versions: dict[tuple[str, int], Named] = {}  # by reader and sequence
        self._brought: dict[str, int] = {}  # the fragment that each worker brought last
        self._read: dict[str, Named] = {}  # to which its updates are

    @property
    def _clips_sums(self) -> bool:
        """Whether it is the gradient of all workers together that is clipped."""
        return self.terms.in_step and not isinstance(self.outer, Site)

    @property
    def parameters(self) -> set[str]:
        return {name for name, _ in self.model.named_parameters()}

    def play(
        self,
        learned: Callable[[Update, Lesson], None],
        arrived: Callable[[Event, Named, Mapping[str, Named]], None],
    ) -> Named:
        """Execute all events; the weights at the end.

        Args:
            learned: told of each update. arrived: of each version of the weights, and of what each
                of its readers then has.
        """
        history = self.history
        returns = Returns(
            history.rebirths, history.restarts, self.central, self.inward, self.outward
        )
        due: dict[tuple[str, int], int] = {}
        for update in history.updates:
            due[update.worker, update.read] = due.get((update.worker, update.read), 0) + 1
        now = self.central.copy()
        for event in history.events:
            moved = returns.before(event.sequence)
            if event.updates:
                self._apply(event, due, learned)
            if event.updates or moved:
                now = self.central.copy()
            returns.after(event.sequence)
            held = {worker: self._send(worker, event, now) for worker in event.readers}
            for worker in held:
                if (worker, event.sequence) in due:
                    held[worker] = self._take_in(worker, held[worker])
                    self._versions[worker, event.sequence] = held[worker]
            arrived(event, now, held)
        return now

    def _send(self, worker: str, event: Event, now: Named) -> Named:
        return self.outward.send(worker, event.sequence, now, event.of.get(worker, ALL))

    def _take_in(self, worker: str, sent: Named) -> Named:
        """The weights to which the next update of a worker will be: newer ones of what it brought
        last."""
        names = names_of(self.blueprint, self._brought.get(worker, ALL))
        return {**self._read.get(worker, {}), **{name: sent[name] for name in names}}

    def _apply(
        self,
        event: Event,
        due: dict[tuple[str, int], int],
        learned: Callable[[Update, Lesson], None],
    ) -> None:
        made: dict[int, tuple[Lesson, Named]] = {}
        for update in sorted(event.updates, key=lambda update: update.lease):  # as a worker did
            lesson = self._learn(update)
            values = self.inward[update.worker].bring(update.lease, update.clock, lesson.values)
            made[update.lease] = lesson, values
            learned(update, lesson)
            self._brought[update.worker] = update.fragment
            place = update.worker, update.read
            self.outward.confirm(*place)
            due[place] -= 1
            if not due[place]:
                del self._versions[place]
        counting = [update for update in event.updates if update.weight]
        if counting:
            parts = [(u.weight, made[u.lease][1]) for u in counting]
            options = made[counting[0].lease][0].options
            averaged = self._averaged(counting[0])
            self.central.apply(parts, options, self._factor(event, parts), averaged)

    def _averaged(self, update: Update) -> dict[int, float]:
        """What is not due of an update that brings all, as no other will follow; at which rate."""
        fragments = self.terms.fragments
        if update.fragment != ALL or fragments == 1:
            return {}
        rate = 1.0 if self.terms.in_step else 1.0 / self.outer.n
        return {each: rate for each in range(fragments) if each != update.clock % fragments}

    def _factor(self, event: Event, parts: Sequence[tuple[float, Named]]) -> float:
        """What clips the sum of an order: as the servers had it, to whose last bits the norm may
        be rounded otherwise; another one is theirs alone, and shows in the weights."""
        largest, factor = self.job.clip, 1.0
        if largest is not None and self._clips_sums:
            norm = self.central.norm(parts)
            factor = min(1.0, largest / (norm + 1e-6))  # as torch's clip_grad_norm_
        return event.factor if abs(factor - event.factor) <= 1e-6 * factor else factor

    def _learn(self, update: Update) -> Lesson:
        read = self._versions.get((update.worker, update.read))
        if read is None:
            raise AllfuseError(f"version {update.read} was never sent to {update.worker}")
        if update.worker not in self.pupils:
            clip = None if self._clips_sums else self.job.clip
            self.pupils[update.worker] = Pupil(
                self.job, self.model, self.blueprint, self.samples, clip
            )
            self.inward[update.worker] = Inward(self.layout, self.terms.servers, update.worker)
        pupil, delay = self.pupils[update.worker], getattr(self.outer, "delay", 0)
        own = pupil.own_share(update, OWN_SHARE if delay else 0.0)
        if own:
            self.inward[update.worker].undo(own)
        limit = self.history.limit
        is_last = limit is not None and update.first_step + update.steps >= limit
        is_last |= update.fragment == ALL and self.terms.fragments > 1
        late = 0 if is_last else min(delay, update.steps - 1)
        takes = self._brought.get(update.worker, ALL)
        if self.terms.fragments > 1:
            self._read[update.worker] = read
        return pupil.learn(update, read, isinstance(self.outer, Site), own, late, takes)


def make_blueprint(job: Job, model: nn.Module, outer: Any, terms: Terms) -> Blueprint:
    """What servers hold under a plan: trained parameters, and buffers as means of what updates make
    of them."""
    codec, share_of = str(outer.codec), 1.0 if terms.in_step else 1.0 / outer.n
    optimizer = job.optimizer(model.parameters())
    named = {id(p): name for name, p in model.named_parameters()}
    buffers = list(model.named_buffers())
    if not isinstance(outer, Site):
        pairs = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        return Blueprint.of_gradients(optimizer, pairs, buffers, codec=codec, share=share_of)
    held = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    options, cuts = outer.outer.options(share_of), outer.fragments
    trained = [(named[id(p)], p) for p in held]
    return Blueprint.of_changes(
        trained, buffers, options=options, codec=codec, share=share_of, fragments=cuts
    )
