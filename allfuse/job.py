"""What is trained: a model, data, a loss and an optimizer, as a plain function in a user's file."""

from __future__ import annotations

import ast
import functools
import importlib.util
import inspect
import math
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from allfuse.base.errors import JobError, nearest
from allfuse.split.data.generators import isolated
from allfuse.split.request import Request, make_request

Loss = Callable[[Any, Any], Any]

DRAW = 0  # seeds what a job file draws while it is imported and makes its job
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
        clip: largest global norm of the gradient, or None.
        accumulate: parts into which each worker cuts its share, to save memory.
        precision: "fp32", or autocast to "bf16" or "fp16".
        compile: whether to run the model through torch.compile.
        recompute: whether blocks of the model that repeat, such as the layers of a transformer,
            keep only what goes in and run again in the backward pass: less memory, more time.
        keep_whole, cut_also: names of modules, with * for any part: those that `tensor(n)` does not
            cut, and those that it cuts however small they are.
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
    clip: float | None = None
    accumulate: int = 1
    precision: str = "fp32"
    compile: bool = False
    recompute: bool = False
    keep_whole: Sequence[str] = ()
    cut_also: Sequence[str] = ()
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
        for name in ("evaluate_every", "save_every"):
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
        if not isinstance(self.metrics, Mapping):
            raise JobError(
                f"Job(metrics=...): received {type(self.metrics).__name__}; allowed: a dict of "
                "name -> function(outputs, batch)"
            )
        make_request("Job", self.keep_whole, self.cut_also)
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


def load_job(path: str | Path, settings: Mapping[str, Any], original: str | None = None) -> Job:
    """The job that the function `job` of a file returns.

    Args:
        path: a Python file with a function `job`.
        settings: arguments for it, as text or values; text is read as the type of the default.
        original: where the file was copied from, so that its neighbours can still be imported.

    Raises:
        JobError: no such file, no `job` in it, it raises (with its traceback), unknown settings.
    """
    function = load_job_function(path, original)
    return make_job(function, resolve(function, settings, str(path)), str(path))


def make_job(function: Callable[..., Job], arguments: Mapping[str, Any], path: str) -> Job:
    """The job that the function of a file makes of these arguments.

    Data that it draws at random is the same in every process, and when the run is resumed:
    generators are seeded while it runs, and left as they were.

    Raises:
        JobError: it raises (with its traceback), or returns something else.
    """
    try:
        with isolated(DRAW):
            made = function(**arguments)
    except JobError:
        raise
    except Exception as error:
        unknown = re.fullmatch(r"Job.__init__\(\) got an unexpected .*'(\w+)'", str(error))
        if unknown:
            raise _no_such_field(unknown[1]) from None
        raise JobError(f"{path}: job() raised an error\n{_trace_from(path)}") from None
    if not isinstance(made, Job):
        raise JobError(f"{path}: job() returned {type(made).__name__}; allowed: af.Job")
    return made


def _no_such_field(name: str) -> JobError:
    allowed = list(Job.__dataclass_fields__)
    of_stop = f" (Stop has one: stop=af.Stop({name}=...))" if hasattr(Stop, name) else ""
    hint = of_stop or nearest(name, allowed)
    return JobError(f"Job({name}=...): there is no such field{hint}; allowed: {', '.join(allowed)}")


def as_job(job: Job | Callable[..., Job] | str | Path, settings: Mapping[str, Any]) -> Job:
    """A job in any of its forms."""
    if isinstance(job, str | Path):
        return load_job(job, settings)
    if isinstance(job, Job):
        return job
    made = job(**settings)
    if not isinstance(made, Job):
        raise JobError(f"the job function returned {type(made).__name__}; allowed: af.Job")
    return made


def load_job_function(path: str | Path, original: str | None = None) -> Callable[..., Job]:
    """The function `job` of a Python file, which is run once for each process.

    What it draws at random is the same in every process and every time: see `make_job`.
    """
    file = Path(path)
    if not file.is_file():
        raise JobError(
            f"{path}: there is no such file; allowed: a Python file with a function job()"
        )
    for folder in (Path(original).parent if original else None, file.resolve().parent):
        if folder is not None and folder.is_dir() and str(folder) not in sys.path:
            sys.path.insert(0, str(folder))
    spec = importlib.util.spec_from_file_location(f"allfuse_job_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise JobError(f"{path}: is not a Python file; allowed: a file that ends in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # so that loader processes and pickles find its classes
    try:
        with isolated(DRAW):
            spec.loader.exec_module(module)
    except (Exception, SystemExit):
        raise JobError(f"{path}: importing it raised an error\n{_trace_from(path)}") from None
    function = getattr(module, "job", None)
    if not callable(function):
        raise JobError(
            f"{path}: there is no function job() in it; "
            "next: write def job(lr=1e-3) -> af.Job (see docs/writing-a-job.md)"
        )
    return function  # type: ignore[no-any-return]


def _trace_from(path: str | Path) -> str:
    """The running exception's traceback, from the user's file on."""
    error, file = sys.exception(), Path(path).resolve()
    trace = None if error is None else error.__traceback__
    while trace is not None and Path(trace.tb_frame.f_code.co_filename).resolve() != file:
        trace = trace.tb_next
    return "".join(traceback.format_exception(None, error, trace)).rstrip()


def resolve(
    function: Callable[..., Any], settings: Mapping[str, Any], where: str
) -> dict[str, Any]:
    """All arguments of a job function: its defaults, replaced by the settings.

    >>> resolve(lambda lr=1e-3, deep=False: None, {"lr": "3e-3", "deep": "true"}, "job.py")
    {'lr': 0.003, 'deep': True}
    """
    every = inspect.signature(function).parameters.values()
    parameters = {p.name: p for p in every if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    takes_any = any(p.kind is p.VAR_KEYWORD for p in every)
    for name in settings:
        if name not in parameters and not takes_any:
            allowed = ", ".join(parameters) or "none: job() takes no arguments"
            raise JobError(
                f"--set {name}: {where} has no such argument{nearest(name, parameters)}; "
                f"allowed: {allowed}"
            )
    values: dict[str, Any] = {}
    for name, parameter in parameters.items():
        if name in settings:
            values[name] = _read(name, settings[name], parameter.default)
        elif parameter.default is inspect.Parameter.empty:
            raise JobError(f"{where}: job() needs its argument {name}; next: add --set {name}=...")
        else:
            values[name] = parameter.default
    return values | {n: _read(n, v, None) for n, v in settings.items() if n not in parameters}


def _read(name: str, value: Any, default: Any) -> Any:
    """Text as the type of the default; values of other types as they are."""
    if not isinstance(value, str) or isinstance(default, str):
        return value
    try:
        if isinstance(default, bool):
            return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[
                value.lower()
            ]
        if isinstance(default, int):
            return int(value)
        if isinstance(default, float):
            return float(value)
    except (ValueError, KeyError):
        kind = type(default).__name__
        raise JobError(f"--set {name}={value}: allowed: a value of type {kind}") from None
    return _plain(value)


def _plain(text: str) -> Any:
    """A literal where the text is one, else the text."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
