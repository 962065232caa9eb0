"""Makes a job of a user's file: the function in it, and the arguments that `--set` sets."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from allfuse.base.errors import JobError, nearest
from allfuse.job import Job, Stop
from allfuse.split.data.generators import isolated

DRAW = 0  # seeds what a job file draws while it is imported and makes its job


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
