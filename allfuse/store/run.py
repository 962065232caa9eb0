"""The folder of a run: what was trained how, and everything that came of it."""

from __future__ import annotations

import ast
import contextlib
import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from allfuse.base.errors import JobError, RunError
from allfuse.store.durable import PARTIAL, explain, parse_json, replace_bytes

RECORD, LOCK = "run.json", ".lock"
MODEL, AVERAGE, SNAPSHOTS = "model", "average", "snapshots"
FORMAT = 1


class RunFolder:
    """A run on disk. Make one with `create` or `open`.

        run.json            plan, arguments, versions, fingerprints, choices, seed, command line
        job.py              a copy of the job file
        events.jsonl        what happened
        shares.jsonl        what was decided on shares of batches, under balance=speed
        checkpoints/        see `Checkpoints`
        model.safetensors   the trained model
        average.safetensors its weights averaged along the steps, where a job asks for that
        snapshots/          its weights at some steps, likewise

    `create` and `open(..., lock=True)` hold the folder, so that no other run writes to it, until
    `close` or the end of the process, however it ends.

    Example:
        with RunFolder.create("runs/digits", {"plan": "data(2)", "seed": 0}) as run:
            run.add_choice("bucket_bytes", 1 << 20)
            checkpoints = Checkpoints(run.checkpoints)
    """

    def __init__(self, path: Path, record: Mapping[str, Any], lock: int | None) -> None:
        self.path = path
        self._record = dict(record)
        self._lock = lock

    @classmethod
    def create(
        cls, path: str | Path, record: Mapping[str, Any], job_file: Path | None = None
    ) -> RunFolder:
        """A new run with this record, which is plain data, and a copy of its job file.

        Raises:
            RunError: the folder holds a run or other files, another run is at work in it, or it
                cannot be written. Nothing is written then.
        """
        path = Path(path)
        _refuse_used(path)
        _format(record)
        try:
            is_new = not path.exists()
            path.mkdir(parents=True, exist_ok=True)
            lock = _hold(path)
            run = cls(path, record, lock)
            try:
                _refuse_used(path)  # again, now that nobody else can write
                try:
                    if job_file is not None:
                        run.copy_job(job_file)
                    run._write(run.record)  # last: a folder with a record holds a run
                except BaseException:
                    run._take_back(is_new)
                    raise
            except BaseException:
                run.close()
                raise
        except OSError as error:
            raise RunError(explain(error, path)) from error
        return run

    @classmethod
    def open(cls, path: str | Path, *, lock: bool = False) -> RunFolder:
        """The run in a folder; with `lock` it is held, as by `create`.

        Raises:
            RunError: there is no run, its record is damaged, or another run is at work in it.
        """
        path = Path(path)
        held: int | None = None
        try:
            record = _read_record(path)
            if lock:
                held = _hold(path)
                record = _read_record(path)  # as the one who held it before left it
        except OSError as error:
            raise RunError(explain(error, path)) from error
        return cls(path, record, held)

    @property
    def record(self) -> dict[str, Any]:
        """What is known of the run: a copy."""
        return dict(self._record)

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def events_path(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def model_path(self) -> Path:
        return self.path / f"{MODEL}.safetensors"

    @property
    def average_path(self) -> Path:
        return self.path / f"{AVERAGE}.safetensors"

    @property
    def job_path(self) -> Path:
        return self.path / "job.py"

    @property
    def tensorboard_path(self) -> Path:
        return self.path / "tensorboard"

    def update(self, **changes: Any) -> None:
        """Change entries of the record; a crash leaves the old record or the new one.

        Raises:
            RunError: it cannot be written, or is not plain data; the old record stays.
        """
        self._write({**self._record, **changes})

    def add_choice(self, name: str, value: Any) -> None:
        """Note what was chosen by measuring, so that resuming chooses the same."""
        self.update(choices={**self._record.get("choices", {}), name: value})

    def copy_job(self, job_file: Path) -> None:
        """Keep a copy of the job file.

        Raises:
            RunError: it cannot be read or written.
        """
        try:
            replace_bytes(self.job_path, Path(job_file).read_bytes())
        except OSError as error:
            raise RunError(explain(error, self.job_path)) from error

    def _take_back(self, is_new: bool) -> None:
        """Remove what was written of a run that could not be created."""
        with contextlib.suppress(OSError):
            for name in (self.job_path.name, RECORD, LOCK):
                (self.path / name).unlink(missing_ok=True)
            if is_new:
                self.path.rmdir()

    def close(self) -> None:
        """Let other runs write here."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _write(self, record: dict[str, Any]) -> None:
        try:
            write_record(self.path, record)
        except OSError as error:
            raise RunError(explain(error, self.path / RECORD)) from error
        self._record = record


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Make a folder that of a run by its record, which is plain data.

    Raises:
        RunError: it is not. OSError: it cannot be written; what was there stays.
    """
    replace_bytes(path / RECORD, _format(record))


def versions() -> dict[str, str]:
    """The versions that a run's numbers depend on, without importing the packages."""
    found = {"python": platform.python_version()}
    for name in ("allfuse", "torch", "numpy"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "unknown"
    return found


def source_fingerprint(path: Path) -> str:
    """A short hash of what a Python file does: comments, layout and docstrings do not count.

    Fields that are empty are left out, for newer Pythons add such fields to the same source.

    Raises:
        JobError: the file cannot be read or is not Python.
    """
    try:
        tree = ast.parse(Path(path).read_bytes(), str(path))
    except (OSError, SyntaxError, ValueError) as error:
        raise JobError(f"cannot read {path} as Python: {error}") from error
    state = hashlib.sha256()
    for part in _syntax(tree):
        state.update(f"{part};".encode(errors="backslashreplace"))
    return state.hexdigest()[:16]


def _syntax(node: Any) -> Iterator[str]:
    if isinstance(node, list):
        yield "["
        for item in node:
            yield from _syntax(item)
        yield "]"
    elif isinstance(node, ast.Constant):
        yield f"{type(node.value).__name__} {node.value!r}"
    elif isinstance(node, ast.AST):
        yield f"({type(node).__name__}"
        for name, value in ast.iter_fields(node):
            if name == "body" and isinstance(value, list) and _has_docstring(node):
                value = value[1:]
            if value not in (None, []):
                yield name
                yield from _syntax(value)
        yield ")"
    else:
        yield repr(node)


def _has_docstring(node: ast.AST) -> bool:
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    return isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None


def _refuse_used(path: Path) -> None:
    allowed = "allowed: a new path, or --resume to go on with that run"
    if (path / RECORD).exists():
        raise RunError(f"run folder {path} exists already; {allowed}")
    if path.exists() and not path.is_dir():
        raise RunError(f"run folder {path} is a file; allowed: a new path or an empty folder")
    if path.is_dir():
        others = [
            p.name for p in path.iterdir() if p.name != LOCK and not p.name.startswith(PARTIAL)
        ]
        if others:
            raise RunError(
                f"run folder {path} holds other files ({sorted(others)[0]}, ...) and no run; "
                "allowed: a new path or an empty folder"
            )


def _format(record: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps({"format": FORMAT, **record}, indent=1).encode()
    except (TypeError, ValueError) as error:
        raise RunError(
            f"the record of a run must be plain data: {error}; allowed are dict, list, str, int, "
            "float, bool and None"
        ) from error


def is_run(path: str | Path) -> bool:
    """Whether a folder holds a run, whole or not.

    Raises:
        RunError: the path cannot be one of a folder.
    """
    try:
        return (Path(path) / RECORD).exists()
    except OSError as error:
        raise RunError(explain(error, Path(path))) from None


def _read_record(path: Path) -> dict[str, Any]:
    file = path / RECORD
    if not file.is_file():
        raise RunError(
            f"there is no run in {path} (no {RECORD}); allowed: a folder that "
            "`allfuse train --out` made, or `allfuse merge` of runs"
        )
    try:
        content = parse_json(file.read_bytes())
    except ValueError as error:
        raise RunError(f"{file} is damaged: {error}; restore it from a copy") from error
    if isinstance(content, dict) and content.pop("format", None) == FORMAT:
        return content
    raise RunError(
        f"{file} is no record of a run in format {FORMAT}; restore it from a copy, or use the "
        "allfuse that wrote it"
    )


def _hold(path: Path) -> int:
    """Lock a folder for this process; the system lets go of it when the process ends."""
    descriptor = os.open(path / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(descriptor, 200).decode(errors="replace") or "another process"
        os.close(descriptor)
        raise RunError(
            f"{holder} is writing to the run folder {path}; wait for it to end, "
            "or choose a new path"
        ) from None
    except OSError:
        os.close(descriptor)
        raise
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
    return descriptor
