"""What one worker of a run does with its work, by plain PyTorch."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from allfuse.base.tensors import share
from allfuse.job import Job, default_forward
from allfuse.roles.blueprint import Blueprint
from allfuse.roles.elementwise import to_plain
from allfuse.roles.rotation import ALL
from allfuse.split.data import BatchPlan, Source, as_source, plan_batches
from allfuse.training.measure import sum_and_count
from allfuse.verify.central import Named
from allfuse.verify.encoded import names_of
from allfuse.verify.history import Update
from allfuse.verify.reference import AUTOCAST, cut_into_pieces


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
