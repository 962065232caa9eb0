"""A run's order of events executed serially, in one process, by plain PyTorch.

It shares with the code under test the job, the first weights, the order of samples, the rule that
cuts n rows into even shares, and how what servers hold is named (a blueprint). There are no servers
here, no workers at the same time, no pieces and no messages: whole tensors, one optimizer for each
group, one update after the other. What codecs do to updates and weights is in encoded.py.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import Parameter

from allfuse.base.errors import AllfuseError
from allfuse.base.tensors import share
from allfuse.job import Job, default_forward
from allfuse.plan import Site
from allfuse.roles.blueprint import Blueprint
from allfuse.roles.cutting import Block, cut_at_grains, view_all
from allfuse.roles.elementwise import find_class, from_plain, is_per_element, to_plain, to_text
from allfuse.roles.rotation import ALL
from allfuse.roles.terms import Terms
from allfuse.split.data import BatchPlan, Source, as_source, plan_batches
from allfuse.training.measure import sum_and_count
from allfuse.training.start import build_model
from allfuse.verify.encoded import Inward, Outward, names_of
from allfuse.verify.history import Event, History, Update
from allfuse.verify.reference import AUTOCAST, cut_into_pieces

Named: TypeAlias = dict[str, Tensor]

OWN_SHARE = 0.5
"""What a site keeps of its own weights under a delay (Douillard et al. 2025, arXiv:2501.18512)."""


@dataclass
class Lesson:
    """What a worker makes of its work. figures: loss and norm of each step, None without samples.

    values: gradients, or weights as read less weights now, by name. total, count: the sum of
    losses, and what their mean is over. options: those of the optimizer's groups at the end.
    """

    figures: list[tuple[float, float] | None] = field(default_factory=list)
    values: Named = field(default_factory=dict)
    total: float = 0.0
    count: float = 0.0
    options: list[dict[str, Any]] = field(default_factory=list)


class Samples:
    """Which samples a group of workers learns from in a step.

    Args:
        parts: into how many each batch is cut. ranks: workers of a group, who share a part.
    """

    def __init__(self, job: Job, parts: int, ranks: int) -> None:
        source = as_source(job.train, collate=job.collate)
        assert isinstance(source, Source), "refused when training begins"
        plan = plan_batches(source, batch_size=job.batch_size, seed=job.seed)
        assert isinstance(plan, BatchPlan), "refused when training begins"
        self.job, self.source, self.plan = job, source, plan
        self.parts, self.ranks = parts, ranks

    def pieces(self, step: int, part: int, device: torch.device) -> list[tuple[Any, int]]:
        """The batch of a part, in the pieces that a step accumulates over; none without samples."""
        epoch, number = divmod(step, self.plan.steps_per_epoch)
        batch = self.plan.indices(epoch, number)
        everybody = self.parts * self.ranks
        bounds = [
            share(len(batch), everybody, part * self.ranks + rank) for rank in range(self.ranks)
        ]
        sizes = [stop - start for start, stop in bounds]
        if not sum(sizes):
            return []
        chosen = np.concatenate([batch[start:stop] for start, stop in bounds])
        fetched = self.source.fetch(chosen, epoch, self.job.seed)
        accumulate = min([self.job.accumulate, *(size for size in sizes if size)])
        return cut_into_pieces(fetched, sizes, accumulate, device)

    def epoch(self, step: int) -> int:
        return step // self.plan.steps_per_epoch


class Pupil:
    """What belongs to one worker alone: its optimizer's state under `site`, its schedule, and the
    buffers that are not shared."""

    def __init__(
        self, job: Job, model: nn.Module, blueprint: Blueprint, samples: Samples, clip: float | None
    ) -> None:
        self.job, self.samples, self.blueprint, self.clip = job, samples, blueprint, clip
        self.model = copy.deepcopy(model)
        self.optimizer = job.optimizer(self.model.parameters())
        self.scheduler = None if job.scheduler is None else job.scheduler(self.optimizer)
        vars(self.optimizer)["_opt_called"] = True  # what schedulers of torch look for
        self._advanced = 0
        self._read_last = self._clock = -1
        self._begun: Named = {}
        self._late = Lesson()  # what is told, with the next update, of steps after the last one
        named = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        self.held = {held.name: named[held.name] for held in blueprint.tensors}
        self.device = next(iter(self.held.values())).device

    def own_share(self, update: Update, share: float) -> float:
        """What a worker keeps of its own weights, where an update begins from newer ones."""
        return share if -1 < self._read_last < update.read else 0.0

    def learn(
        self,
        update: Update,
        read: Mapping[str, Tensor],
        steps_here: bool,
        own: float = 0.0,
        late: int = 0,
        takes: int = ALL,
    ) -> Lesson:
        """Work on an update's samples from the weights that it was made of.

        Args:
            steps_here: the optimizer steps (`site`); else the gradient of the one step is it.
            own: the share of its own weights that the worker keeps.
            late: steps that are done after the update was handed in, and are in the next one.
            takes: the fragment that the worker takes in before; others are what it has come to.
        """
        for name in names_of(self.blueprint, takes):
            tensor = self.held[name]
            mixed = torch.lerp(read[name], tensor.detach(), own) if own else read[name].detach()
            tensor.data = mixed.clone()
        self._begin_clock(update)
        lesson, after = self._late, Lesson()
        end = update.first_step + update.steps
        for step in range(update.first_step, end - late):
            self.step(step, update.part, lesson, steps_here)
        self._hand_in(read, lesson, update.fragment)
        for step in range(end - late, end):
            self.step(step, update.part, after, steps_here)
        lesson.figures += after.figures
        self._late = Lesson(total=after.total, count=after.count)
        self._read_last = update.read
        return lesson

    def _begin_clock(self, update: Update) -> None:
        """A second update of one clock begins where the first one did, where the weights are taken
        in fragment by fragment."""
        if self.blueprint.fragments > 1:
            if update.clock == self._clock:
                for name, tensor in self.held.items():
                    tensor.data = self._begun[name].clone()
            self._begun = {name: tensor.detach().clone() for name, tensor in self.held.items()}
            self._clock = update.clock

    def _hand_in(self, read: Mapping[str, Tensor], lesson: Lesson, fragment: int) -> None:
        lesson.options = [to_plain(g, type(self.optimizer)) for g in self.optimizer.param_groups]
        for block in self.blueprint.blocks:
            for name in block.names if fragment in (ALL, block.fragment) else ():
                now, pushes = self.held[name], self.blueprint.groups[block.group].pushed
                if pushes == "change":
                    lesson.values[name] = read[name] - now.detach()
                else:
                    lesson.values[name] = torch.zeros_like(now) if now.grad is None else now.grad

    def step(self, step: int, part: int, lesson: Lesson, steps_here: bool = True) -> None:
        """One step, from the weights as they are."""
        self._advance(step)
        self.optimizer.zero_grad()
        pieces = self.samples.pieces(step, part, self.device)
        lesson.figures.append(self._differentiate(pieces, lesson) if pieces else None)
        if steps_here and pieces:
            self.optimizer.step()

    def _advance(self, step: int) -> None:
        """The learning rate of a step: where everybody's schedule stands before it."""
        every = self.job.scheduler_every
        target = {"step": step, "epoch": self.samples.epoch(step)}.get(every, 0)
        while self.scheduler is not None and self._advanced < target:
            self.scheduler.step()
            self._advanced += 1

    def _differentiate(
        self, pieces: list[tuple[Any, int]], lesson: Lesson
    ) -> tuple[float, float] | None:
        """The gradient of the mean loss, clipped; the loss, and the gradient's norm before. None,
        and no gradient, where the loss is over nothing."""
        rows, total, counted = sum(size for _, size in pieces), 0.0, 0.0
        dtype = AUTOCAST[self.job.precision]
        for batch, size in pieces:
            with torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None):
                outputs = (self.job.forward or default_forward)(self.model, batch)
                value = self.job.loss(outputs, batch)
            loss, factor, count = sum_and_count(value, size, "the loss")
            weight = factor / rows
            (loss if weight == 1.0 else loss * weight).backward()
            total, counted = total + loss.item() * factor, counted + count
        trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        gradients = [p.grad for p in trained if p.grad is not None]
        if counted == 0:
            self.optimizer.zero_grad()
            return None
        if rows != counted:
            for gradient in gradients:
                gradient.mul_(rows / counted)
        norm = torch.nn.utils.get_total_norm(gradients)
        if self.clip is not None:
            torch.nn.utils.clip_grads_with_norm_(trained, self.clip, norm)
        lesson.total, lesson.count = lesson.total + total, lesson.count + counted
        return total / counted, float(norm)


class Central:
    """The weights that updates are applied to: whole tensors, end to end in blocks with an
    optimizer each, as a plain script would make it.

    It takes torch's fused steps where servers do. They round the last elements of what they are
    given otherwise, so that blocks are stepped whole.
    """

    def __init__(self, blueprint: Blueprint, model: nn.Module, servers: int) -> None:
        self.blueprint = blueprint
        named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        self._flats = [
            Parameter(torch.cat([named[name].detach().reshape(-1) for name in block.names]))
            for block in blueprint.blocks
        ]
        self.weights = view_all(blueprint.blocks, [flat.detach() for flat in self._flats])
        fused = cut_at_grains(blueprint.blocks, servers)
        self._optimizers = list(map(self._optimizer, blueprint.blocks, self._flats, fused))

    def _optimizer(self, block: Block, flat: Parameter, at_grains: bool) -> torch.optim.Optimizer:
        group = self.blueprint.groups[block.group]
        made: Any = find_class(group.optimizer)
        text = to_text(group.options)
        fused = at_grains and is_per_element(group.optimizer, text, block.dtype, fused=True)
        how = {"fused": True} if fused else {}
        optimizer: torch.optim.Optimizer = made([flat], **from_plain(group.options), **how)
        return optimizer

    @torch.no_grad()
    def apply(
        self,
        updates: Sequence[tuple[float, Named]],
        options: list[dict[str, Any]],
        factor: float = 1.0,
        averaged: Mapping[int, float] | None = None,
    ) -> None:
        """One step of what is in them by the weighted sum of updates.

        Args:
            options: of each group whose gradients are pushed; the others' are the blueprint's.
            factor: of gradients.
            averaged: fragments that are averaged, without an outer step, and at which rate.
        """
        each = zip(self.blueprint.blocks, self._flats, self._optimizers, strict=True)
        for block, flat, optimizer in each:
            if block.names[0] not in updates[0][1]:
                continue
            scale, group = 1.0, self.blueprint.groups[block.group]
            if group.pushed == "gradient":
                optimizer.param_groups[0].update(from_plain(options[block.group]))
                scale = factor
            else:
                optimizer.param_groups[0].update(from_plain(group.options))
            if averaged and block.fragment in averaged:
                plain = {"lr": averaged[block.fragment], "momentum": 0.0, "nesterov": False}
                optimizer.param_groups[0].update(plain)
            summed = [
                add_up([(weight * scale, values[name]) for weight, values in updates])
                for name in block.names
            ]
            flat.grad = torch.cat([values.reshape(-1).to(block.dtype) for values in summed])
            optimizer.step()

    def norm(self, updates: Sequence[tuple[float, Named]]) -> float:
        """Of the weighted sum of gradients."""
        names = [
            name
            for block in self.blueprint.blocks
            if self.blueprint.groups[block.group].pushed == "gradient"
            for name in block.names
        ]
        summed = [add_up([(weight, values[name]) for weight, values in updates]) for name in names]
        return float(torch.nn.utils.get_total_norm(summed))

    def copy(self) -> Named:
        return {name: weight.clone() for name, weight in self.weights.items()}


def add_up(parts: Sequence[tuple[float, Tensor]]) -> Tensor:
    """The weighted sum, in float32 or wider, in this order."""
    (weight, first), *rest = parts
    if not rest and weight == 1.0:
        return first
    total = first.to(torch.promote_types(first.dtype, torch.float32)) * weight
    for weight, values in rest:
        total.add_(values, alpha=weight)
    return total


class Serial:
    """The run of a job under a plan with servers, executed from its history.

    Kept are the weights that later updates were made of, and no others.

    Args:
        terms: of the plan. outer: its axis that is out of step. ranks: workers of a group.
    """

    def __init__(
        self, job: Job, outer: Any, terms: Terms, ranks: int, device: torch.device
    ) -> None:
        self.job, self.outer, self.terms = job, outer, terms
        self.model = build_model(job.model, job.seed).to(device)
        self.blueprint = make_blueprint(job, self.model, outer, terms)
        self.central = Central(self.blueprint, self.model, terms.servers)
        self.samples = Samples(job, terms.parts, ranks)
        self.outward = Outward(self.blueprint, terms.servers)
        self.inward: dict[str, Inward] = {}
        self.pupils: dict[str, Pupil] = {}
        self._versions: dict[tuple[str, int], Named] = {}  # by reader and sequence
        self._limit: int | None = None
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
        history: History,
        learned: Callable[[Update, Lesson], None],
        arrived: Callable[[Event, Named, Mapping[str, Named]], None],
    ) -> Named:
        """Execute all events; the weights at the end.

        Args:
            learned: told of each update. arrived: of each version of the weights, and of what each
                of its readers then has.
        """
        self._limit = history.limit
        due: dict[tuple[str, int], int] = {}
        for update in history.updates:
            due[update.worker, update.read] = due.get((update.worker, update.read), 0) + 1
        now = self.central.copy()
        for event in history.events:
            if event.updates:
                self._apply(event, due, learned)
                now = self.central.copy()
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
            self.inward[update.worker] = Inward(self.blueprint, self.terms.servers, update.worker)
        pupil, delay = self.pupils[update.worker], getattr(self.outer, "delay", 0)
        own = pupil.own_share(update, OWN_SHARE if delay else 0.0)
        if own:
            self.inward[update.worker].undo(own)
        is_last = self._limit is not None and update.first_step + update.steps >= self._limit
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
