"""The reference: the plan executed serially in one process, written out to be checked by eye.

It shares with the code under test the job, the first weights, the order of samples (samples.py),
the rule that cuts n rows into even shares, and what is pure math (see replay.py). Everything else
is plain PyTorch: no session, no links. An exact plan is one model that learns from whole batches.
Where gradients are encoded or fused by another rule than the mean, the model learns from the share
of each replica by itself (see together.py for BatchNorm), and those gradients become one. A plan
with k sites is k models, each with its own optimizer, that become one now and then, or mix by the
weights of a gossip's schedule.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from allfuse.base.errors import NonFiniteLoss
from allfuse.base.tensors import map_nest, share
from allfuse.fusion.gradients import BUCKET_BYTES, FIRST_BUCKET_BYTES
from allfuse.job import Job, default_forward
from allfuse.plan import Data, Plan, Site
from allfuse.rule import Mean, SumRule
from allfuse.training.building import build_first
from allfuse.verify.record import Recorder
from allfuse.verify.replay import Replay, is_plain_mean, positions_of
from allfuse.verify.samples import cut_of, read_batches
from allfuse.verify.sites import Sites
from allfuse.verify.together import Together, has_batch_norm

Piece: TypeAlias = tuple[Any, int]
"""A batch, and its rows."""

AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Learner:
    """A model that learns by itself: one process's whole training, or that of one site."""

    def __init__(self, job: Job, model: nn.Module, device: torch.device) -> None:
        self.job, self.model, self.device = job, model, device
        self.optimizer = job.optimizer(model.parameters())
        self.scheduler = job.scheduler(self.optimizer) if job.scheduler is not None else None
        self.scaler = torch.amp.GradScaler(device.type, enabled=job.precision == "fp16")
        self.samples = 0  # learned from
        self.rounds = 0  # of fused gradients

    @property
    def held(self) -> list[Tensor]:
        """What the optimizer trains."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def learn(self, pieces: Sequence[Piece]) -> tuple[float, float]:
        """One optimizer step on a batch that comes in pieces of so many rows: loss and norm."""
        rows = sum(size for _, size in pieces)
        total, count = self._differentiate(pieces, rows)
        if not count:
            raise NonFiniteLoss("the loss of the reference is a mean over nothing")
        self.scaler.unscale_(self.optimizer)
        for parameter in self.held:
            if parameter.grad is not None:
                parameter.grad *= rows / count  # now it is
        return total / count, self._step(rows)

    def learn_apart(self, parts: Sequence[Sequence[Piece]], replay: Replay) -> tuple[float, float]:
        """The same on a batch of which each replica has a part, with gradients of its own."""
        sizes = [sum(size for _, size in pieces) for pieces in parts]
        rows = sum(sizes)
        if self.job.batch_statistics == "global" and has_batch_norm(self.model):
            totals, counts, gradients = self._differentiate_together(parts, rows)
        else:
            totals, counts, gradients = [], [], []
            for pieces in parts:
                total, count = self._differentiate(pieces, rows)
                totals.append(total)
                counts.append(count)
                gradients.append([parameter.grad for parameter in self.held])
                self.optimizer.zero_grad()
        if not sum(counts):
            raise NonFiniteLoss("the loss of the reference is a mean over nothing")
        self._fuse(gradients, [float(size) for size in sizes], counts, replay)
        return sum(totals) / sum(counts), self._step(rows)

    def _differentiate_together(
        self, parts: Sequence[Sequence[Piece]], rows: int
    ) -> tuple[list[float], list[float], list[list[Tensor | None]]]:
        """The same for all replicas, piece by piece, where statistics are of the rows of all."""
        there = [replica for replica, pieces in enumerate(parts) if pieces]
        together = Together(self.model, len(there))
        totals, counts = [0.0] * len(parts), [0.0] * len(parts)
        for number in range(len(parts[there[0]])):
            told = together.run(self._lose, [parts[replica][number] for replica in there])
            torch.stack([loss / rows for loss, _ in told]).sum().backward()
            for replica, (loss, counted) in zip(there, told, strict=True):
                totals[replica] += loss.item()
                counts[replica] += counted
        together.keep_buffers()
        gradients: list[list[Tensor | None]] = [[None] * len(self.held) for _ in parts]
        for replica, own in zip(there, together.gradients(self.held), strict=True):
            gradients[replica] = own
        return totals, counts, gradients

    def _lose(self, model: nn.Module, batch: Any, size: int) -> tuple[Tensor, float]:
        """The sum of losses of a model on a batch of so many rows, and what is counted."""
        with self.autocast():
            outputs = (self.job.forward or default_forward)(model, batch)
            return sum_of_losses(self.job.loss(outputs, batch), size)

    def _differentiate(self, pieces: Sequence[Piece], rows: int) -> tuple[float, float]:
        """Add the gradients of the sum of losses over `rows`; the sum, and what is counted."""
        total, count = 0.0, 0.0
        for batch, size in pieces:
            loss, counted = self._lose(self.model, batch, size)
            self.scaler.scale(loss / rows).backward()  # not yet over what the loss counts
            total += loss.item()
            count += counted
        return total, count

    @torch.no_grad()
    def _fuse(
        self,
        gradients: list[list[Tensor | None]],
        sizes: list[float],
        counts: list[float],
        replay: Replay,
    ) -> None:
        """Make one gradient of those of all replicas, bucket by bucket, from the last layer on."""
        rows, rule = sum(sizes), replay.rule
        trained = [place for place, p in enumerate(self.held) if p.requires_grad][::-1]
        factors = [1.0] * len(gradients)
        if not isinstance(rule, Mean):  # each replica's own mean
            factors = [rows / count if count else 0.0 for count in counts]
        if isinstance(rule, SumRule) and rule.needs_norm:
            for replica, own in enumerate(gradients):
                there = [g.double().reshape(-1) for g in own if g is not None]
                norm = float(torch.cat(there).norm()) if there else 0.0
                factors[replica] *= rule.shrink(norm * factors[replica])
        tensors = [self.held[place] for place in trained]
        for number, members in enumerate(positions_of(tensors, BUCKET_BYTES, FIRST_BUCKET_BYTES)):
            places = [trained[member] for member in members]
            held = [self.held[place] for place in places]
            blocks = [
                lay_out(held, [own[place] for place in places], factor)
                for own, factor in zip(gradients, factors, strict=True)
            ]
            shapes = [tuple(p.shape) for p in held]
            name = f"fuse gradients, bucket {number}"
            if isinstance(rule, Mean):
                fused = replay.sum(blocks, shapes, name, self.rounds) * (rows / sum(counts))
            else:
                fused = replay.fuse(blocks, sizes, shapes, name, self.rounds)
            pieces = fused.split([p.numel() for p in held])
            for p, place, piece in zip(held, places, pieces, strict=True):
                used = any(own[place] is not None for own in gradients)
                p.grad = piece.view_as(p) if used else None
        self.rounds += 1

    def _step(self, rows: int) -> float:
        """Clip, step; the norm of the gradient before."""
        parameters = [parameter for parameter in self.held if parameter.grad is not None]
        largest = math.inf if self.job.clip is None else self.job.clip
        norm = torch.nn.utils.clip_grad_norm_(parameters, largest)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.samples += rows
        return float(norm)

    def autocast(self) -> torch.autocast:
        dtype = AUTOCAST[self.job.precision]
        return torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None)

    def end_step(self, ends_epoch: bool) -> None:
        every = self.job.scheduler_every
        if self.scheduler is not None and (every == "step" or (every == "epoch" and ends_epoch)):
            self.scheduler.step()


def lay_out(held: list[Tensor], gradients: list[Tensor | None], factor: float) -> Tensor:
    """Gradients end to end; those that are not there are zero."""
    found = [
        torch.zeros_like(parameter) if gradient is None else gradient * factor
        for parameter, gradient in zip(held, gradients, strict=True)
    ]
    return torch.cat([each.reshape(-1) for each in found])


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
    sites = axis.n if isinstance(axis, Site) else 1
    data = plan.axis("data")
    inside = Replay(data, job.seed) if isinstance(data, Data) else None
    apart = inside is not None and not is_plain_mean(inside)
    replays = [Replay(data, job.seed) for _ in range(sites)] if isinstance(data, Data) else []
    each = plan.replicas // sites  # the replicas of a site stand side by side
    model = build_first(job).to(device)
    models = [model] + [copy.deepcopy(model) for _ in range(sites - 1)]
    learners = [Learner(job, model, device) for model in models]
    between = Sites(axis, job.seed, learners) if isinstance(axis, Site) and sites > 1 else None
    recorder.keep("0", models)
    batches = read_batches(job, plan.replicas, cut_of(plan, job))
    for step, batch in enumerate(islice(batches, steps), start=1):
        tick(step)
        figures: list[tuple[float, float] | None] = []
        inputs = []
        for site in range(sites):
            shares = batch.shares[site * each : (site + 1) * each]
            groups = [[part] for part in shares] if apart else [shares]
            accumulate = min([job.accumulate, *(len(part) for part in shares if len(part))])
            inputs.append(
                [
                    cut_into_pieces(
                        batch.fetch(group) if sum(map(len, group)) else None,
                        [len(part) for part in group],
                        accumulate,
                        device,
                    )
                    for group in groups
                ]
            )
        begin = time.perf_counter()
        for site, (learner, parts) in enumerate(zip(learners, inputs, strict=True)):
            if not any(parts):
                figures.append(None)
            elif apart:
                figures.append(learner.learn_apart(parts, replays[site]))
            else:
                figures.append(learner.learn(parts[0]))
            learner.end_step(batch.last)
        if between is not None:
            between.after_step(step)
        recorder.step(figures, time.perf_counter() - begin)
        recorder.keep(str(step), models)
    if between is not None:
        between.finish()
    recorder.keep("end", models)
    return model


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
