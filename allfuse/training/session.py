"""What a training script sees, under any plan."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from allfuse.base.errors import Interrupted, NonFiniteLoss, UserError
from allfuse.base.events import Bus
from allfuse.base.tensors import count_rows, cut_rows, share
from allfuse.fusion.statistics import GlobalBatchNorm, globalize_batch_norm
from allfuse.job import Hook, Metric, MetricFunction, default_forward
from allfuse.plan import Plan
from allfuse.split.data import Portion, Source, Stream, as_source
from allfuse.split.whole import Whole
from allfuse.training.keeper import Cursor, Keeper
from allfuse.training.learner import Learner, Precision
from allfuse.training.loading import Order, batch_size_of, make_loader, order_of_all
from allfuse.training.measure import measure, sum_and_count, to_device
from allfuse.training.place import Place
from allfuse.training.rounds import Rounds
from allfuse.training.start import build_model, seed_generators, spread
from allfuse.training.state import capture, model_fingerprint, restore
from allfuse.training.stepper import Stepper
from allfuse.training.telling import Teller

WISH_STOP, WISH_INTERRUPT = 1, 2


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a session trains; see `Job` for the meaning of each. `keep`: checkpoints kept."""

    seed: int = 0
    precision: str = "fp32"
    clip: float | None = None
    accumulate: int = 1
    compile: bool = False
    batch_statistics: str = "global"
    device: str | None = None
    keep: int = 3


class Session:
    """Models, optimizers and batches of one training run, under any plan.

    A context manager, made by `af.session`. The same script runs alone, under `allfuse run --plan`,
    and under torchrun.

    Raises:
        PlanError: the plan cannot run here. PeerLost: a worker is lost. NonFiniteLoss: the loss is
        NaN or infinite. Interrupted: Ctrl-C, after a checkpoint was saved.

    Example:
        with af.session(out="runs/x") as s:
            model = s.model(Net)
            optimizer = s.optimizer(torch.optim.AdamW(model.parameters(), lr=1e-3))
            for batch in s.batches(dataset, batch_size=256, epochs=3):
                loss = s.step(batch, loss_fn)
    """

    def __init__(
        self,
        plan: Plan | str | None = None,
        *,
        out: str | Path | None = None,
        resume: bool = False,
        settings: Settings | None = None,
    ) -> None:
        self.settings = settings or Settings()
        self.place = Place(plan, self.settings.device)
        self.bus = Bus(self.place.rank)
        try:
            self.keeper = Keeper(self.place, out, resume, self.settings.keep, self.bus)
        except BaseException:
            self.place.close()
            raise
        self.split = Whole()
        self.precision = Precision(self.settings.precision, self.device)
        self.stepper = Stepper(self.place, self.settings.clip)
        self.rounds = Rounds(self.place, self.bus)
        self.models: dict[str, nn.Module] = {}
        self.learners: list[Learner] = []
        self.schedulers: list[tuple[Any, str]] = []
        self.parts: dict[str, Any] = {}
        self.choices: dict[str, str] = dict(self.place.choices)
        self._norms: list[GlobalBatchNorm] = []
        self.cursor = Cursor()
        self._last: Portion | None = None
        self._wish: tuple[int, str] = (0, "")
        self._heard = 0
        self._stop: str | None = None
        self.teller = Teller(self)
        self._closers: list[Callable[[], None]] = []

    # What a script asks about.

    @property
    def plan(self) -> Plan:
        return self.place.plan

    @property
    def device(self) -> torch.device:
        return self.place.device

    @property
    def rank(self) -> int:
        return self.place.rank

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which alone prints and writes."""
        return self.place.rank == 0

    @property
    def steps(self) -> int:
        """Optimizer steps done, those before a resume included."""
        return self.cursor.steps

    @property
    def stop_reason(self) -> str | None:
        return self._stop

    def print(self, *values: Any) -> None:
        """Print on rank 0 only."""
        if self.is_main:
            print(*values, flush=True)

    def on(self, event: str, function: Callable[..., None]) -> None:
        """Call `function(session, event)` at each event of this name, on every rank."""
        self.bus.subscribe(lambda happened: function(self, happened), [event])

    def at_close(self, function: Callable[[], None]) -> None:
        """Call `function()` when the session ends, however it ends."""
        self._closers.append(function)

    def add_hooks(self, hooks: Sequence[Hook]) -> None:
        for hook in hooks:
            self.on(hook.event, hook.function)

    def stop(self, reason: str) -> None:
        """Ask to stop. Any rank may; all end after the same step, the next one at the earliest."""
        if not self._wish[0]:
            self._wish = (WISH_STOP, reason)

    def end(self, reason: str) -> None:
        """Stop after this step. For reasons that every rank finds at the same step."""
        self._stop = self._stop or reason

    def due(self, every: int | str | None) -> bool:
        """Whether something that is done every so many steps, or every "epoch", is due now."""
        self.close_step()
        if every is None or self._last is None:
            return False
        if every == "epoch":
            return self._last.last
        return self.steps % int(every) == 0

    # What a script hands over.

    def model(
        self, build: Callable[[], nn.Module] | nn.Module, name: str | None = None
    ) -> nn.Module:
        """The model, on this rank's device, with the same weights on every rank.

        A function is called under the session's seed. With several workers BatchNorm uses the
        statistics of the global batch, unless the session was made with batch_statistics="local".
        """
        module = build_model(build, self.settings.seed).to(self.device)
        name = name or ("model" if not self.models else f"model{len(self.models)}")
        if name in self.models:
            raise UserError(f"model {name!r} is there already; allowed: another name")
        spread([*module.parameters(), *module.buffers()], self.place.replicas)
        shared = self.place.data.size > 1 and self.settings.batch_statistics == "global"
        if shared and any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in module.modules()):
            self._norms += globalize_batch_norm(module, self.place.statistics_link())
        if self.settings.compile:
            module.compile()
        self.models[name] = module
        return module

    def optimizer(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """The same optimizer, known to the session: its gradients are fused before it steps."""
        known = {
            id(parameter): f"{prefix}.{name}" if len(self.models) > 1 else name
            for prefix, module in self.models.items()
            for name, parameter in module.named_parameters()
        }
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        strange = [tuple(p.shape) for p in parameters if id(p) not in known]
        if strange:
            raise UserError(
                f"the optimizer holds {len(strange)} parameters that no s.model(...) knows (the "
                f"first of shape {strange[0]}); next: give it parameters of what s.model returned"
            )
        trained = [p for p in parameters if p.requires_grad]
        learner = Learner(
            optimizer,
            [known[id(p)] for p in trained],
            trained,
            split=self.split,
            fusion=self.place.data_fusion,
            link=self.place.data,
            precision=self.precision,
        )
        optimizer.register_step_pre_hook(lambda *_: self.keeper.settle())
        self.learners.append(learner)
        for each in self.learners:
            each.alone = len(self.learners) == 1
        return optimizer

    def scheduler(self, scheduler: Any, every: str = "step") -> Any:
        """The same scheduler, stepped by the session: every "step", "epoch" or "evaluation"."""
        self.schedulers.append((scheduler, every))
        return scheduler

    def remember(self, name: str, part: Any) -> Any:
        """Save and restore `part`, which has state_dict and load_state_dict, with checkpoints."""
        self.parts[name] = part
        return part

    # The loop.

    def batches(
        self,
        data: Any,
        batch_size: int | None = None,
        epochs: int | None = None,
        *,
        seed: int | None = None,
        shuffle: bool | None = None,
        drop_last: bool | None = None,
        loaders: int | None = None,
        collate: Callable[[list[Any]], Any] | None = None,
        steps: int | None = None,
    ) -> Iterator[Any]:
        """This rank's share of every batch, on its device; every sample of an epoch exactly once.

        `batch_size` is the samples of one step over all workers. Goes on after the last checkpoint
        when the session resumes. Ends after `epochs` or `steps` (None: never for that reason), or
        when the session stops.
        """
        source = as_source(data, collate=collate)
        order = Order(
            batch_size=batch_size,
            seed=self.settings.seed if seed is None else seed,
            shuffle=shuffle,
            drop_last=drop_last,
            loaders=loaders,
        )
        loader = make_loader(source, order, self.place)
        try:
            self._begin(source, loader, epochs, steps)
            while self._stop is None and (epochs is None or self.cursor.epoch < epochs):
                yield from self._epoch(loader, steps)
            self._finish_training(epochs)
        finally:
            loader.close()

    def _epoch(self, loader: Any, steps: int | None) -> Iterator[Any]:
        if steps is not None and self.steps >= steps:
            self.end(f"{steps} steps are done")
            return
        for portion in loader.epoch(self.cursor.epoch, self.cursor.step_in_epoch):
            self._open_step(portion)
            if self.stepper.reference(portion):  # a site may have no sample of a small last batch
                yield to_device(portion.batch, self.device)
            self.close_step()
            if steps is not None and self.steps >= steps:
                self.end(f"{steps} steps are done")
            if self._stop is not None:
                return

    def step(
        self,
        batch: Any,
        loss: Callable[[Any, Any], Any],
        *,
        forward: Callable[[nn.Module, Any], Any] | None = None,
        model: nn.Module | None = None,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> float:
        """Forward, backward, fusion, clipping, the optimizer's step. The mean loss of the batch.

        With several optimizers name the one to step; only its parameters get gradients.
        """
        learner = self._learner(optimizer)
        model = model if model is not None else self._only_model()
        run = forward or default_forward
        rows = count_rows(batch)
        pieces = min(self.settings.accumulate, rows)
        for number in range(pieces):
            start, stop = share(rows, pieces, number)
            piece = batch if pieces == 1 else cut_rows(batch, start, stop)
            with self.precision.autocast():
                value = loss(run(model, piece), piece)
            total, count = sum_and_count(value, stop - start, "the loss")
            self._differentiate(learner, total, count, last=number == pieces - 1)
        figures = self.stepper.finish(learner, self._not_finite)
        learner.step()
        if len(self.learners) == 1:
            self.close_step()
        return figures.loss

    def backward(
        self,
        loss: Tensor,
        *,
        count: float | None = None,
        last: bool = True,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> float:
        """Backward and fusion, for loops that call `optimizer.step()` themselves.

        `loss` is the mean over `count` things (the samples of the batch unless given). Afterwards
        the gradients are those of the whole batch, so clipping is torch's own. With `last=False`
        they only add up; `count` must then be given. Returns the mean loss of the whole batch.
        """
        if self.precision.scaler is not None:
            raise UserError(
                "backward() with precision fp16: the loss scaler must step the optimizer; "
                "allowed: bf16 or fp32 here, or s.step(batch, loss)"
            )
        step = self.stepper.current
        if count is None:
            if not last or (step is not None and step.losses):
                raise UserError(
                    "backward(last=False) needs count=, the number of things in the loss's mean"
                )
            portion = None if step is None else step.portion
            count = 1.0 if portion is None else float(max(portion.rows, 1))
        learner = self._learner(optimizer)
        self._differentiate(learner, loss * count, count, last)
        return self.stepper.finish(learner, self._not_finite).loss if last else math.nan

    def _differentiate(self, learner: Learner, total: Tensor, count: float, last: bool) -> None:
        if self.place.world.stop_requested.is_set():
            self._wish = (WISH_INTERRUPT, "interrupted")
        self.stepper.differentiate(learner, total, count, last=last, wish=self._wish[0])

    def _learner(self, optimizer: torch.optim.Optimizer | None) -> Learner:
        if optimizer is None and len(self.learners) == 1:
            return self.learners[0]
        for learner in self.learners:
            if learner.optimizer is optimizer:
                return learner
        raise UserError(
            f"the session has {len(self.learners)} optimizers and none of them was named; next: "
            "make it known with s.optimizer(...), and pass optimizer= when there are several"
        )

    def _only_model(self) -> nn.Module:
        if len(self.models) != 1:
            raise UserError(
                f"the session has {len(self.models)} models; next: pass model= to step(...)"
            )
        return next(iter(self.models.values()))

    def _not_finite(self, what: str, value: float, rank: int) -> NonFiniteLoss:
        return NonFiniteLoss(
            f"{what} is {value} on rank {rank} at step {self.steps}; the weights were not changed; "
            f"{self.keeper.how_to_go_on()}; next: a smaller learning rate, clip=1.0, or look "
            "at the samples of this step"
        )

    # Steps.

    def _open_step(self, portion: Portion) -> None:
        for norm in self._norms:
            norm.weight_of_rows = 1.0 if portion.rows else 0.0
        if self.place.world.has_process_groups:  # threads share one process's generators
            seed_generators(self.settings.seed, self.steps, self.rank)
        self.stepper.open(portion)

    def close_step(self) -> None:
        """Count the open step, fuse weights where a round is due, and tell what happened.

        Called by the session itself when the next batch is asked for; a no-op when none is open.
        """
        step = self.stepper.close()
        if step is None:
            return
        portion = self._last = step.portion
        self.cursor = self.cursor.after(portion)
        self._tell_step_number()
        self.rounds.samples += self.stepper.reference(portion)
        self.rounds.steps_since += 1
        ends_epoch = portion is not None and portion.last
        for scheduler, every in self.schedulers:
            if every == "step" or (every == "epoch" and ends_epoch):
                scheduler.step()
        if step.figures is not None:
            self._heard = max(self._heard, *step.figures.stops)
        if self.rounds.due(self.steps):
            self.keeper.settle()
            self.rounds.fuse(self.models.values())
        self.teller.step(step)
        self.keeper.tell_outcomes()
        self._maybe_stop(ends_epoch)

    def _maybe_stop(self, ends_epoch: bool) -> None:
        """Stop where all ranks know that one wishes to. Sites meet at rounds and ends of epochs."""
        heard = self._heard
        if self.rounds.active:
            if not (ends_epoch or self.rounds.due(self.steps)):
                return
            heard = self.rounds.agree(max(heard, self._wish[0]))
        if heard >= WISH_INTERRUPT:
            self.save(block=True)
            raise Interrupted(f"interrupted after step {self.steps}; {self.keeper.how_to_go_on()}")
        if heard:
            self.end(self._wish[1] or "another worker asked to stop")

    def _tell_step_number(self) -> None:
        self.bus.step = self.place.world.step = self.steps
        for link in self.place.links:
            link.step = self.steps

    # Begin, measure, save, end.

    def _begin(
        self, source: Source | Stream, loader: Any, epochs: int | None, steps: int | None
    ) -> None:
        """Once, before the first step: the run folder, the state to go on from, the first event."""
        if self.teller.began is not None:
            return
        size, per_epoch = batch_size_of(loader), loader.steps_per_epoch
        facts = {
            "batch_size": size,
            "seed": self.settings.seed,
            "choices": self.choices,
            "device": str(self.device),
            "threads": torch.get_num_threads(),
        }
        fingerprints = {"data": source.fingerprint(), "model": model_fingerprint(self.models)}
        self.keeper.begin(facts, fingerprints)
        found = self.keeper.newest()
        if found is not None:
            restore(self, self.keeper.read(found))
        self._tell_step_number()
        self.teller.start(source, size, per_epoch, epochs, steps)
        if self.keeper.resume and found is None:
            self.bus.emit(
                "note", text="there is no checkpoint yet: training starts at the beginning"
            )

    def evaluate(
        self,
        metrics: Mapping[str, MetricFunction | Metric],
        data: Any,
        *,
        batch_size: int | None = None,
        name: str = "validation",
        forward: Callable[[nn.Module, Any], Any] | None = None,
        model: nn.Module | None = None,
        collate: Callable[[list[Any]], Any] | None = None,
        best: Callable[[dict[str, float]], bool] | None = None,
    ) -> dict[str, float]:
        """The figures over a data set, each sample once, the same on every rank.

        Sites measure the mean of their weights. `best(figures)` says whether they are the best yet.
        """
        self.close_step()
        begin = time.perf_counter()
        source = as_source(data, collate=collate)
        loader = make_loader(source, order_of_all(source, batch_size, self.place), self.place)
        self.keeper.settle()
        with self.rounds.fused_for_a_moment(self.models.values()):
            figures, samples = measure(
                model if model is not None else self._only_model(),
                loader,
                metrics,
                forward=forward or default_forward,
                link=self.place.replicas,
                device=self.device,
                autocast=self.precision.autocast,
            )
        loader.close()
        seconds = time.perf_counter() - begin
        self.bus.emit(
            "evaluated",
            split=name,
            metrics=figures,
            samples=samples,
            seconds=seconds,
            best=best(figures) if best is not None else False,
        )
        return figures

    def evaluated(self, value: float) -> None:
        """Step the schedulers that wait for evaluations, with the monitored value."""
        for scheduler, every in self.schedulers:
            if every == "evaluation":
                scheduler.step(value)

    def save(self, *, block: bool = False) -> None:
        """Save a checkpoint in the background; `block` waits until it is on disk."""
        self.close_step()
        buffers = [b for module in self.models.values() for b in module.buffers()]
        note = {"steps": self.steps, "plan": str(self.plan)}
        self.keeper.save(self.steps, lambda: capture(self), buffers, note)
        if block:
            self.keeper.wait()

    def _finish_training(self, epochs: int | None) -> None:
        """The last round, so that all sites end equal."""
        if self._stop is None:
            self.end(f"{epochs} epochs are done")
        if self.rounds.active and self.rounds.steps_since:
            self.keeper.settle()
            self.rounds.fuse(self.models.values())

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                self.close_step()
                if self.teller.began is not None:
                    with self.rounds.fused_for_a_moment(self.models.values()):
                        self.keeper.export(self.models)
                    self.save()
                    self.keeper.wait()
            self.teller.end(error)
        finally:
            self.keeper.close(abandon=error is not None)
            self.place.close()
            for closer in self._closers:
                closer()
