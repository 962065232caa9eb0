"""What a training script sees, under any plan."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from allfuse.base.errors import AllfuseError, Interrupted, NonFiniteLoss, UserError
from allfuse.base.events import Bus
from allfuse.base.tensors import count_rows, cut_rows, share
from allfuse.fusion.statistics import GlobalBatchNorm, globalize_batch_norm
from allfuse.job import Hook, Metric, MetricFunction, default_forward
from allfuse.plan import Plan
from allfuse.split.data import Portion, Source, Stream, as_source
from allfuse.split.whole import Whole
from allfuse.training.keeper import Cursor, Keeper
from allfuse.training.learner import Learner, Precision
from allfuse.training.loading import Order, batch_size_of, make_loader
from allfuse.training.measure import measure, sum_and_count, to_device
from allfuse.training.place import Place
from allfuse.training.rounds import Rounds
from allfuse.training.start import build_model, seed_generators, spread
from allfuse.training.stepper import Step, Stepper

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
        self._cursor = Cursor()
        self._last: Portion | None = None
        self._wish: tuple[int, str] = (0, "")
        self._heard = 0
        self._stop: str | None = None
        self._began: float | None = None
        self._samples = self._sent_before = 0
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
        return self._cursor.steps

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

    def model(self, build: Callable[[], nn.Module] | nn.Module, name: str | None = None) -> nn.Module:
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
                f"the optimizer holds {len(strange)} parameters that no s.model(...) knows (the first "
                f"of shape {strange[0]}); next: give it the parameters of what s.model returned"
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
        """Save and restore `part` with the checkpoints: anything with state_dict/load_state_dict."""
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
            while self._stop is None and (epochs is None or self._cursor.epoch < epochs):
                yield from self._epoch(loader, steps)
            self._finish_training(epochs)
        finally:
            loader.close()

    def _epoch(self, loader: Any, steps: int | None) -> Iterator[Any]:
        if steps is not None and self.steps >= steps:
            self.end(f"{steps} steps are done")
            return
        for portion in loader.epoch(self._cursor.epoch, self._cursor.step_in_epoch):
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
                    "backward(last=False) needs count=, the number of things the loss is a mean over"
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
            f"the session has {len(self.learners)} optimizers and none of them was named; next: make "
            "it known with s.optimizer(...), and pass optimizer= when there are several"
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
            f"{self.keeper.how_to_go_on()}; next: a smaller learning rate, clip=1.0, or look at the "
            "samples of this step"
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
        self._cursor = self._cursor.after(portion)
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
        self._emit_step(step)
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

    def _emit_step(self, step: Step) -> None:
        seconds = time.perf_counter() - step.begin
        portion, figures = step.portion, step.figures
        shares = [] if portion is None else list(portion.shares)
        self._samples += sum(shares)
        sent = sum(link.sent_bytes for link in self.place.links)
        fused, self._sent_before = sent - self._sent_before, sent
        if not self.bus.wants("step"):
            return
        busy = [] if figures is None else figures.busy_s
        self.bus.emit(
            "step",
            epoch=self._cursor.epoch_of_last,
            loss=math.nan if figures is None else figures.loss,
            grad_norm=step.norm,
            lr=self.learners[0].learning_rate if self.learners else math.nan,
            samples=sum(shares),
            seconds=seconds,
            shares=shares,
            busy=[min(1.0, value / max(seconds, 1e-9)) for value in busy],
            fused_bytes=fused,
        )

    def _tell_step_number(self) -> None:
        self.bus.step = self.place.world.step = self.steps
        for link in self.place.links:
            link.step = self.steps

    # Begin, measure, save, end.

    def _begin(self, source: Source | Stream, loader: Any, epochs: int | None, steps: int | None) -> None:
        if self._began is not None:
            return
        self._began = time.monotonic()
        shapes = [
            f"{name}.{key}{tuple(value.shape)}"
            for name, module in self.models.items()
            for key, value in module.state_dict().items()
            if isinstance(value, Tensor)
        ]
        model_print = hashlib.sha256("\n".join(shapes).encode()).hexdigest()[:16]
        facts = {
            "batch_size": batch_size_of(loader),
            "seed": self.settings.seed,
            "choices": self.choices,
            "device": str(self.device),
            "threads": torch.get_num_threads(),
        }
        self.keeper.begin(facts, {"data": source.fingerprint(), "model": model_print})
        found = self.keeper.newest()
        if found is not None:
            state, note = self.keeper.read(found)
            self._restore(state, note)
        self._tell_step_number()
        per_epoch = loader.steps_per_epoch
        planned = None if epochs is None or per_epoch is None else epochs * per_epoch
        limits = [value for value in (steps, planned) if value is not None]
        self.bus.emit(
            "start",
            plan=str(self.plan),
            promise=self.plan.promise,
            workers=self.plan.workers,
            device=str(self.device),
            link=self._link_name(),
            threads=torch.get_num_threads(),
            samples=getattr(source, "size", None),
            batch_size=batch_size_of(loader),
            steps_per_epoch=per_epoch,
            total_steps=min(limits, default=None),
            parameters=sum(p.numel() for m in self.models.values() for p in m.parameters()),
            resumed_step=self.steps,
            out=None if self.keeper.path is None else str(self.keeper.path),
            choices=self.choices,
            data=source.promise,
        )

    def _link_name(self) -> str:
        if self.plan.workers == 1:
            return "none"
        if not self.place.world.has_process_groups:
            return "thread"
        return "nccl" if self.device.type == "cuda" else "gloo"

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
        if batch_size is None and source.settings.batch_size is None:
            batch_size = 64 * self.place.parts
        own_order = isinstance(source, Stream) or source.settings.sampler or source.settings.batch_sampler
        shuffle = None if own_order else False
        loader = make_loader(source, Order(batch_size=batch_size, shuffle=shuffle), self.place)
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
        self.keeper.save(self.steps, self._state, buffers, note)
        if block:
            self.keeper.wait()

    def _state(self) -> dict[str, Any]:
        """All that training needs to go on. Randomness is keyed by the step and needs no state."""
        scaler = self.precision.scaler
        cursor = self._cursor
        return {
            "models": {name: module.state_dict() for name, module in self.models.items()},
            "optimizers": [learner.optimizer.state_dict() for learner in self.learners],
            "schedulers": [scheduler.state_dict() for scheduler, _ in self.schedulers],
            "scaler": None if scaler is None else scaler.state_dict(),
            "cursor": [cursor.steps, cursor.epoch, cursor.step_in_epoch, cursor.epoch_of_last],
            "rounds": {"samples": self.rounds.samples, "steps_since": self.rounds.steps_since},
            "parts": {name: part.state_dict() for name, part in self.parts.items()},
        }

    def _restore(self, state: dict[str, Any], note: dict[str, Any]) -> None:
        for name, module in self.models.items():
            module.load_state_dict(state["models"][name])
        for learner, held in zip(self.learners, state["optimizers"], strict=True):
            learner.optimizer.load_state_dict(held)
        for (scheduler, _), held in zip(self.schedulers, state["schedulers"], strict=True):
            scheduler.load_state_dict(held)
        if self.precision.scaler is not None and state["scaler"] is not None:
            self.precision.scaler.load_state_dict(state["scaler"])
        self._cursor = Cursor(*state["cursor"])
        self.rounds.samples = state["rounds"]["samples"]
        self.rounds.steps_since = state["rounds"]["steps_since"]
        for name, part in self.parts.items():
            part.load_state_dict(state["parts"][name])

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
                if self._began is not None:
                    with self.rounds.fused_for_a_moment(self.models.values()):
                        self.keeper.export(self.models)
                    self.save()
                    self.keeper.wait()
            self._emit_end(error)
        finally:
            self.keeper.close(abandon=error is not None)
            self.place.close()
            for closer in self._closers:
                closer()

    def _emit_end(self, error: BaseException | None) -> None:
        if self._began is None:
            return
        seconds = time.monotonic() - self._began
        expected = isinstance(error, AllfuseError)
        reason = self._stop or "the script ended"
        if error is not None:
            reason = str(error) if expected else f"{type(error).__name__}: {error}"
        self.bus.emit(
            "end",
            reason=reason,
            steps=self.steps,
            seconds=seconds,
            samples=self._samples,
            samples_per_s=self._samples / max(seconds, 1e-9),
            fused_bytes=self._sent_before,
        )


