"""The reference: the plan executed serially in one process, written out to be checked by eye.

It shares with the code under test the job, the first weights, the order of samples (samples.py) and
the rule that cuts n rows into even shares. Everything else is plain PyTorch: no session, no links,
no fusions. An exact plan is one model that learns from whole batches; a plan with k sites is k
models, each with its own optimizer, that become their weighted mean now and then, or mix by the
weights of a gossip's schedule.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from allfuse.base.errors import NonFiniteLoss
from allfuse.base.tensors import map_nest, share
from allfuse.job import Job, default_forward
from allfuse.plan import Plan, Site
from allfuse.topology import Layout, Schedule
from allfuse.training.start import build_model
from allfuse.verify.record import Recorder
from allfuse.verify.samples import read_batches

AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Learner:
    """A model that learns by itself: one process's whole training, or that of one site."""

    def __init__(self, job: Job, model: nn.Module, device: torch.device) -> None:
        self.job, self.model, self.device = job, model, device
        self.optimizer = job.optimizer(model.parameters())
        self.scheduler = job.scheduler(self.optimizer) if job.scheduler is not None else None
        self.scaler = torch.amp.GradScaler(device.type, enabled=job.precision == "fp16")
        self.samples = 0  # learned from since the last round

    def learn(self, pieces: Sequence[tuple[Any, int]]) -> tuple[float, float]:
        """One optimizer step on a batch that comes in pieces of so many rows: loss and norm."""
        rows = sum(size for _, size in pieces)
        total, count = 0.0, 0.0
        for batch, size in pieces:
            with self.autocast():
                outputs = (self.job.forward or default_forward)(self.model, batch)
                loss, counted = sum_of_losses(self.job.loss(outputs, batch), size)
            self.scaler.scale(loss / rows).backward()  # not yet over what the loss counts
            total += loss.item()
            count += counted
        if not count:
            raise NonFiniteLoss("the loss of the reference is a mean over nothing")
        self.scaler.unscale_(self.optimizer)
        held = [p for group in self.optimizer.param_groups for p in group["params"]]
        parameters = [parameter for parameter in held if parameter.grad is not None]
        for parameter in parameters:
            parameter.grad *= rows / count  # now it is
        largest = math.inf if self.job.clip is None else self.job.clip
        norm = torch.nn.utils.clip_grad_norm_(parameters, largest)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.samples += rows
        return total / count, float(norm)

    def autocast(self) -> torch.autocast:
        dtype = AUTOCAST[self.job.precision]
        return torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None)

    def end_step(self, ends_epoch: bool) -> None:
        every = self.job.scheduler_every
        if self.scheduler is not None and (every == "step" or (every == "epoch" and ends_epoch)):
            self.scheduler.step()


def run_reference(
    job: Job,
    plan: Plan,
    steps: int,
    device: torch.device,
    recorder: Recorder,
    tick: Callable[[int], None],
) -> nn.Module:
    """Train and return the model (the first site's); the recorder takes figures and weights.

    `tick(step)` is called before each step. Raises NonFiniteLoss.
    """
    axis = plan.axis("site")
    sites, every = (axis.n, axis.every) if isinstance(axis, Site) else (1, "end")
    topology = axis.topology if isinstance(axis, Site) else None
    mixing = topology if topology is not None and not topology.exact and sites > 1 else None
    each = plan.replicas // sites  # the replicas of a site stand side by side
    model = build_model(job.model, job.seed).to(device)
    models = [model] + [copy.deepcopy(model) for _ in range(sites - 1)]
    learners = [Learner(job, model, device) for model in models]
    recorder.keep("0", models)
    for step, batch in enumerate(islice(read_batches(job, plan.replicas), steps), start=1):
        tick(step)
        figures: list[tuple[float, float] | None] = []
        inputs = []
        for site in range(sites):
            shares = batch.shares[site * each : (site + 1) * each]
            sizes = [len(part) for part in shares]
            fetched = batch.fetch(shares) if sum(sizes) else None
            inputs.append(cut_into_pieces(fetched, sizes, job.accumulate, device))
        begin = time.perf_counter()
        for learner, pieces in zip(learners, inputs, strict=True):
            figures.append(learner.learn(pieces) if pieces else None)
            learner.end_step(batch.last)
        if every != "end" and step % every == 0:
            if mixing is None:
                average(learners)
            else:
                mix(learners, mixing.schedule(Layout.of(sites), step // every - 1, job.seed))
        recorder.step(figures, time.perf_counter() - begin)
        recorder.keep(str(step), models)
    if mixing is not None:
        for learner in learners:
            learner.samples = 1  # all count alike
    average(learners)
    recorder.keep("end", models)
    return model


@torch.no_grad()
def average(learners: list[Learner]) -> None:
    """A round: weights and floating buffers become their mean, weighted by samples learned from."""
    total = sum(learner.samples for learner in learners)
    if len(learners) == 1 or total == 0:
        return
    held = [[*each.model.parameters(), *each.model.buffers()] for each in learners]
    for tensors in zip(*held, strict=True):
        if tensors[0].is_floating_point():
            pairs = zip(tensors, learners, strict=True)
            mean = sum(tensor * (learner.samples / total) for tensor, learner in pairs)
            for tensor in tensors:
                tensor.copy_(mean)
    for learner in learners:
        learner.samples = 0


@torch.no_grad()
def mix(learners: list[Learner], schedule: Schedule) -> None:
    """A round of gossip: each value becomes its own share of itself and that of what it hears."""
    held = [[*each.model.parameters(), *each.model.buffers()] for each in learners]
    for phase in schedule.phases:
        for tensors in zip(*held, strict=True):
            if not tensors[0].is_floating_point():
                continue
            before = [tensor.clone() for tensor in tensors]
            for site, tensor in enumerate(tensors):
                heard = [(before[t.src], t.weight) for t in phase if t.dst == site]
                own = 1 - sum(weight for _, weight in heard)
                tensor.copy_(before[site] * own + sum(value * weight for value, weight in heard))
    for learner in learners:
        learner.samples = 0


def cut_into_pieces(
    batch: Any, sizes: list[int], accumulate: int, device: torch.device
) -> list[tuple[Any, int]]:
    """The pieces of a batch that a step accumulates over; none when the batch is empty.

    `sizes` are the rows of each replica. All cut their own rows into as many even runs, at most
    `accumulate` and none empty, and piece j is the j-th run of all replicas together.
    """
    total, pieces = sum(sizes), []
    runs = min([accumulate, *(size for size in sizes if size)]) if total else 0
    for number in range(runs):
        rows: list[int] = []
        for replica, size in enumerate(sizes):
            start, stop = share(size, runs, number)
            first = sum(sizes[:replica])
            rows += range(first + start, first + stop)
        pieces.append((map_nest(_taking(rows, total, device), batch), len(rows)))
    return pieces


def _taking(rows: list[int], total: int, device: torch.device) -> Callable[[Any], Any]:
    def take(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        whole = len(rows) == total or leaf.dim() == 0 or leaf.shape[0] != total
        return (leaf if whole else leaf[rows]).to(device)

    return take


def sum_of_losses(value: Any, rows: int) -> tuple[Tensor, float]:
    """What a loss function returned, as a sum and what the mean is over."""
    if isinstance(value, tuple):
        return value[0], float(value[1])
    if value.dim() == 0:
        return value * rows, float(rows)  # a mean over rows
    return value.sum(), float(rows)  # one value for each row
