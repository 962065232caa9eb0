"""What is trained: a model, data, a loss and an optimizer, as a plain function in a user's file."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from allfuse.base.errors import JobError, nearest
from allfuse.split.request import Request, make_request
from allfuse.sync.averaging import Averaging

Loss = Callable[[Any, Any], Any]

MetricFunction = Callable[[Any, Any], Any]

CHOICES = {
    "precision": ("fp32", "bf16", "fp16"),
    "batch_statistics": ("global", "local"),
    "scheduler_every": ("step", "epoch", "evaluation"),
}
EVENTS = ("start", "step", "round", "evaluated", "saved", "not_saved", "note", "warning", "end")


def check_whole(owner: str, name: str, value: object, least: int = 1) -> None:
    """Refuse what is not a whole number from `least` on."""
    if type(value) is not int or value < least:
        raise JobError(
            f"{owner}({name}=...): received {value!r}; allowed: a whole number from {least}"
        )


def check_number(owner: str, name: str, value: object, *, positive: bool) -> None:
    """Refuse what is not a finite number, or not more than 0."""
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not number or (positive and value <= 0):  # type: ignore[operator]  # a number by then
        allowed = "a number above 0" if positive else "a number"
        raise JobError(f"{owner}({name}=...): received {value!r}; allowed: {allowed}")


def check_training(owner: str, given: Any, *, whole: Iterable[str]) -> None:
    """Check the fields that a job and a session have in common, and whole numbers from 1."""
    for name, allowed in CHOICES.items():
        received = getattr(given, name, allowed[0])
        if received not in allowed:
            raise JobError(
                f"{owner}({name}=...): received {received!r}{nearest(str(received), allowed)}; "
                f"allowed: {', '.join(allowed)}"
            )
    for name in whole:
        check_whole(owner, name, getattr(given, name))
    if type(given.seed) is not int:
        raise JobError(f"{owner}(seed=...): received {given.seed!r}; allowed: a whole number")
    if given.clip is not None:
        check_number(owner, "clip", given.clip, positive=True)


@dataclass(frozen=True, kw_only=True)
class Stop:
    """When training ends: at the first of those that are given.

    steps: optimizer steps. epochs: passes over the data. target: the monitored value reached.
    patience: evaluations in a row without a better monitored value. seconds: of training.
    """

    steps: int | None = None
    epochs: int | None = None
    target: float | None = None
    patience: int | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "epochs", "patience"):
            if getattr(self, name) is not None:
                check_whole("Stop", name, getattr(self, name))
        for name in ("seconds", "target"):
            if getattr(self, name) is not None:
                check_number("Stop", name, getattr(self, name), positive=name == "seconds")
        if all(getattr(self, name) is None for name in self.__dataclass_fields__):
            raise JobError(
                "Stop(): no rule was given; allowed: steps, epochs, target, patience, seconds"
            )


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A figure that is not a mean over samples, such as an F1 score.

    `update(outputs, batch)` returns a tensor whose sum over all batches holds all that `result`
    needs; `result(total)` makes the figure of it.

    >>> def counts(outputs, batch):
    ...     guess, truth = outputs > 0, batch[1] > 0
    ...     return torch.stack([(guess & truth).sum(), guess.sum(), truth.sum()])
    >>> f1 = Metric(update=counts, result=lambda t: float(2 * t[0] / (t[1] + t[2])))
    """

    update: MetricFunction
    result: Callable[[Tensor], float]


@dataclass(frozen=True)
class Hook:
    """A function to call at an event, on every rank. Made by `af.on`."""

    event: str
    function: Callable[..., None]


def on(event: str, function: Callable[..., None]) -> Hook:
    """A hook for `Job(hooks=[...])`: `function(session, event)` is called on every rank.

    Events: "start", "step", "round", "evaluated", "end" (see docs/writing-a-job.md). A hook may use
    collectives, change learning rates, or call `session.stop(reason)`. "saved", "not_saved", "note"
    and "warning" come on rank 0 only, some time after the fact: hooks for them must not wait for
    other ranks.

    Raises:
        JobError: there is no such event.
    """
    if event not in EVENTS:
        raise JobError(
            f"on({event!r}): there is no such event{nearest(event, EVENTS)}; "
            f"allowed: {', '.join(EVENTS)}"
        )
    return Hook(event, function)


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is trained. The four fields without a default are all that a job must say.

    Attributes:
        model: a function that builds the module, or a module.
        train: samples: a map-style dataset, tensors or arrays in a tuple or dict, a DataLoader, or
            an iterable dataset.
        loss: `loss(outputs, batch)` -> the mean over the samples, or (sum, count) where the count
            is what the mean is over (tokens, pixels).
        optimizer: `optimizer(parameters)` -> a torch optimizer.
        forward: `forward(model, batch)` -> outputs; by default the first item of a tuple or list is
            the input, the keys of a dict that the model's forward names are keyword arguments.
        scheduler: `scheduler(optimizer)` -> a learning-rate scheduler, stepped as
            `scheduler_every` says ("step", "epoch" or "evaluation", with the monitored value). If
            it takes a second argument, that is how often it will step: `(optimizer, steps)`.
        validation, test: samples like `train`; never shuffled.
        metrics: name -> `f(outputs, batch)` returning a mean over samples, one value for each
            sample, (sum, count), or a `Metric`.
        monitor: the metric that decides which checkpoint is best and when to stop; "-" in front
            means that lower is better. By default the first metric, else "-loss".
        batch_size: samples of one optimizer step, over all workers. Plans do not change it. By
            default the DataLoader's that is `train`, else 32; None where its sampler decides.
        evaluate_every, save_every: steps, or "epoch", or None.
        snapshots: how often the weights as they are go to `snapshots/` in the run folder, as files
            that can be fused later: steps, or "epoch"; None: never.
        average: how the weights are averaged along the steps, `af.EMA(...)` or `af.SWA(...)`; None:
            not at all. The average is measured beside the weights, and written beside the model.
        clip: largest global norm of the gradient, or None.
        accumulate: parts into which each worker cuts its share, to save memory.
        precision: "fp32", or autocast to "bf16" or "fp16".
        compile: whether to run the model through torch.compile.
        recompute: whether blocks of the model that repeat, such as the layers of a transformer,
            keep only what goes in and run again in the backward pass: less memory, more time.
        keep_whole, cut_also: names of modules, with * for any part: those that `tensor(n)` does not
            cut, and those that it cuts however small they are.
        weights: what the model begins with, instead of what its function draws: a safetensors file,
            or a folder with such files, of which each worker reads what it needs.
        batch_statistics: BatchNorm over the "global" batch, or over each worker's "local" share.
        loaders: processes that read samples ahead, for each worker.
        collate: samples -> batch, for map-style datasets.
        inputs: column names of the model's input, in order, for prediction from tables.
        classes: names of the output classes, for prediction.
        hooks: made by `af.on`.
    """

    model: Callable[[], nn.Module] | nn.Module
    train: Any
    loss: Loss
    optimizer: Callable[[Iterable[Any]], torch.optim.Optimizer]
    forward: Callable[[nn.Module, Any], Any] | None = None
    scheduler: Callable[..., Any] | None = None
    scheduler_every: str = "step"
    validation: Any = None
    test: Any = None
    metrics: Mapping[str, MetricFunction | Metric] = field(default_factory=dict)
    monitor: str | None = None
    batch_size: int | None = None
    stop: Stop = field(default_factory=lambda: Stop(epochs=1))
    evaluate_every: int | str | None = "epoch"
    save_every: int | str | None = "epoch"
    snapshots: int | str | None = None
    average: Averaging | None = None
    clip: float | None = None
    accumulate: int = 1
    precision: str = "fp32"
    compile: bool = False
    recompute: bool = False
    keep_whole: Sequence[str] = ()
    cut_also: Sequence[str] = ()
    weights: str | Path | None = None
    batch_statistics: str = "global"
    loaders: int = 0
    collate: Callable[[list[Any]], Any] | None = None
    seed: int = 0
    inputs: Sequence[str] | None = None
    classes: Sequence[str] | None = None
    hooks: Sequence[Hook] = ()

    def __post_init__(self) -> None:
        if self.batch_size is None:
            object.__setattr__(self, "batch_size", _batch_size_of(self.train))
        whole = ("accumulate",) if self.batch_size is None else ("batch_size", "accumulate")
        check_training("Job", self, whole=whole)
        check_whole("Job", "loaders", self.loaders, least=0)
        self._check_kinds()
        for name in ("evaluate_every", "save_every", "snapshots"):
            value = getattr(self, name)
            if value not in (None, "epoch") and (type(value) is not int or value < 1):
                raise JobError(
                    f"Job({name}=...): received {value!r}; allowed: steps, 'epoch' or None"
                )
        if self.monitor is not None and self.monitor_name not in (*self.metrics, "loss"):
            raise JobError(
                f"Job(monitor={self.monitor!r}): there is no such metric"
                f"{nearest(self.monitor_name, self.metrics)}; "
                f"allowed: {', '.join(('loss', *self.metrics))} with or without '-' in front"
            )
        self._check_measured()

    def _check_kinds(self) -> None:
        """Refuse what is of another kind than a field needs, before anything starts."""
        needed = ("model", "loss", "optimizer")
        optional = ("forward", "scheduler", "collate")
        for name in (*needed, *(name for name in optional if getattr(self, name) is not None)):
            value = getattr(self, name)
            if not callable(value):
                raise JobError(
                    f"Job({name}=...): received {type(value).__name__}; allowed: a function "
                    f"(see help(af.Job))"
                )
        if not isinstance(self.stop, Stop):
            raise JobError(
                f"Job(stop=...): received {self.stop!r}; allowed: af.Stop(epochs=3), for one"
            )
        if not isinstance(self.average, Averaging | None):
            raise JobError(
                f"Job(average=...): received {self.average!r}; allowed: af.EMA(decay=0.999), or "
                "af.SWA(start=1000), for two"
            )
        if not isinstance(self.metrics, Mapping):
            raise JobError(
                f"Job(metrics=...): received {type(self.metrics).__name__}; allowed: a dict of "
                "name -> function(outputs, batch)"
            )
        make_request("Job", self.keep_whole, self.cut_also)
        if self.weights is not None and not isinstance(self.weights, str | Path):
            raise JobError(
                f"Job(weights=...): received {type(self.weights).__name__}; allowed: the path of a "
                "safetensors file, or of a folder with such files"
            )
        for hook in self.hooks:
            if not isinstance(hook, Hook):
                raise JobError(
                    f"Job(hooks=...): received {type(hook).__name__}; allowed: what af.on(event, "
                    "function) makes"
                )

    def _check_measured(self) -> None:
        """Refuse rules that wait for evaluations which never come."""
        waiting = [name for name in ("target", "patience") if getattr(self.stop, name) is not None]
        rules = [f"stop=Stop({name}=...)" for name in waiting]
        if self.scheduler is not None and self.scheduler_every == "evaluation":
            rules.append("scheduler_every='evaluation'")
        if rules and (self.validation is None or self.evaluate_every is None):
            raise JobError(
                f"Job({rules[0]}): it needs evaluations; received validation="
                f"{'None' if self.validation is None else '...'}, evaluate_every="
                f"{self.evaluate_every!r}; next: give validation data, and evaluate_every='epoch'"
            )

    @property
    def request(self) -> Request:
        """What it wants of how its model is cut."""
        return make_request("Job", self.keep_whole, self.cut_also)

    @property
    def monitor_text(self) -> str:
        """The monitored metric, with "-" in front when lower is better."""
        return self.monitor or next(iter(self.metrics), "-loss")

    @property
    def monitor_name(self) -> str:
        return self.monitor_text.removeprefix("-")

    @property
    def lower_is_better(self) -> bool:
        return self.monitor_text.startswith("-")

    def score(self, figures: Mapping[str, float]) -> float:
        """The monitored value of an evaluation, signed so that higher is better."""
        value = figures[self.monitor_name]
        return -value if self.lower_is_better else value


def _batch_size_of(data: Any) -> int | None:
    """What a DataLoader says; None where its own batch sampler decides; 32 for other data."""
    if not isinstance(data, torch.utils.data.DataLoader):
        return 32
    return data.batch_size


def default_forward(model: nn.Module, batch: Any) -> Any:
    """The first item of a tuple or list; of a dict, the keys that the model's forward names."""
    if isinstance(batch, list | tuple):
        return model(batch[0])
    if isinstance(batch, Mapping):
        names = _keywords(getattr(model.forward, "__func__", model.forward))
        if names is None:
            return model(**batch)
        return model(**{key: value for key, value in batch.items() if key in names})
    return model(batch)


@functools.lru_cache(maxsize=64)
def _keywords(forward: Callable[..., Any]) -> frozenset[str] | None:
    """The names of a function's arguments; None when it takes any."""
    parameters = inspect.signature(forward).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return None
    return frozenset(parameters)
