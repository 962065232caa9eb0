"""What a forked worker does: runs the function that it was sent and reports how it ended."""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import importlib
import json
import os
import pickle
import signal
import socket
import sys
import threading
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import cloudpickle

from allfuse.base.errors import UserError
from allfuse.launcher.base import entered
from allfuse.launcher.channel import receive_frame, send_frame
from allfuse.launcher.crewmate import Crewmate, CrewRequest
from allfuse.launcher.generation import Lost
from allfuse.launcher.outcome import Failure, describe_failure
from allfuse.launcher.signals import catch_signals
from allfuse.launcher.store import StoreWorld

STOP = b"stop"  # what a launcher says after it has sent the function
LOST = b"lost"  # and the number of the generation, where others go on without one that is lost
DONE, FAILED = b"d", b"f"  # how a worker's one report begins
MISSES = b"m"  # how it begins to say who does not answer


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a worker takes over from its launcher, and where it meets the other ranks.

    store: host and port. goes_on: the others go on when one is lost. again: the losses after which
    all were started again; resumes: they had begun a run by then.
    """

    rank: int
    size: int
    run: str
    store: tuple[str, int]
    plan: str | None
    threads: int
    timeout_s: float
    folder: str
    environment: dict[str, str]
    path: list[str]
    command: list[str]
    crew: CrewRequest | None = None
    goes_on: bool = False
    again: tuple[Lost, ...] = ()
    resumes: bool = False


def work(channel: socket.socket) -> None:
    """Runs in a fresh fork. Never returns."""
    code = 1
    try:
        code = _run_and_report(channel)
        threading._shutdown()  # type: ignore[attr-defined]  # others may finish, as in any program
        atexit._run_exitfuncs()
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except (OSError, ValueError, AttributeError):
                continue
        os._exit(code)


def _run_and_report(channel: socket.socket) -> int:
    """The exit code. One report is sent, however the function ended."""
    body, function = receive_frame(channel), receive_frame(channel)
    if body is None or function is None:
        return 1  # the launcher has died
    request: Request = pickle.loads(body)  # noqa: S301  our own launcher
    world: StoreWorld | None = None
    try:
        _take_over(request)
        world = _enter_world(request, channel)
        _obey(channel, world)
        with entered(world):
            result = pickle.loads(function)()  # noqa: S301  our own launcher
        report, code = DONE + _pack_result(result, world.rank), 0
    except BaseException as error:
        _ignore_stops()
        failure = describe_failure(error, None if world is None else world.step)
        report, code = _report(failure)
    _ignore_stops()
    with contextlib.suppress(OSError):  # the launcher has died: nobody is left to hear
        send_frame(channel, report)
    return code


def _report(failure: Failure) -> tuple[bytes, int]:
    if failure.exit_code == 0:  # sys.exit() is an end without a result
        return DONE + pickle.dumps(None), 0
    return FAILED + pickle.dumps(failure), failure.exit_code


def _take_over(request: Request) -> None:
    """Become like the launcher: its folder, environment, paths, and lines as they are printed."""
    import numpy as np
    import torch

    os.chdir(request.folder)
    os.environ.clear()
    os.environ.update(request.environment)
    sys.path[:], sys.argv[:] = request.path, request.command
    importlib.invalidate_caches()  # files may be newer than the zygote
    faulthandler.enable()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            # whole lines, also under PYTHONUNBUFFERED: workers' lines would run into each other
            stream.reconfigure(line_buffering=True, write_through=False)
    np.random.seed()  # or all workers of one zygote would draw alike
    torch.set_num_threads(request.threads)


def _enter_world(request: Request, channel: socket.socket) -> StoreWorld:
    from allfuse.base.torch_private import TCPStore
    from allfuse.launcher.local_world import LocalWorld

    def accuse(number: int, worker: int) -> None:
        send_frame(channel, MISSES + json.dumps([number, worker]).encode())

    store = TCPStore(*request.store, None, False, timedelta(seconds=300))
    world = LocalWorld(
        store,
        request.run,
        request.rank,
        request.size,
        timeout_s=request.timeout_s,
        accuse=accuse if request.goes_on else None,
    )
    world.plan, world.again, world.resumes = request.plan, request.again, request.resumes
    world.local_rank, world.local_size = request.rank, request.size
    if request.crew is not None:
        world.crew = Crewmate.of(request.crew, store)
        world.local_rank, world.local_size = request.crew.local_rank, request.crew.local_size
    return world


def _pack_result(result: Any, rank: int) -> bytes:
    if rank != 0:
        return pickle.dumps(None)
    try:
        return bytes(cloudpickle.dumps(result))
    except Exception as error:
        raise UserError(
            f"the function returned a {type(result).__name__} on rank 0 that cannot be sent back: "
            f"{type(error).__name__}: {error}; allowed: values that can be pickled; next: return "
            "plain values or tensors"
        ) from error


def _obey(channel: socket.socket, world: StoreWorld) -> None:
    """Stop when the launcher or a signal asks for it; end at once when the launcher has died."""

    catch_signals(world.ask_to_stop)
    main = threading.main_thread().ident
    assert main is not None

    def listen() -> None:
        while (said := receive_frame(channel)) is not None:
            if said.startswith(LOST):
                world.hear_of_loss(int(said.removeprefix(LOST)))
            elif world.heeds_stop:
                world.ask_to_stop()
            else:  # interrupts what the main thread waits for, too
                signal.pthread_kill(main, signal.SIGINT)
        os._exit(1)

    threading.Thread(target=listen, name="allfuse-listener", daemon=True).start()


def _ignore_stops() -> None:
    """Nothing is left to stop, and the report must be sent whole."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
