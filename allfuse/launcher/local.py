"""Workers as processes of this machine, forked from a zygote that has torch loaded."""

from __future__ import annotations

import contextlib
import os
import pickle
import socket
import sys
import uuid
from collections.abc import Callable
from typing import Any

from allfuse.base.errors import UserError
from allfuse.launcher.outcome import judge
from allfuse.launcher.signals import asked_to_stop
from allfuse.launcher.store import LOOPBACK
from allfuse.launcher.watch import Watch
from allfuse.launcher.zygotes import borrowed, warm_up

__all__ = ["count_cores", "launch_local", "warm_up"]


def launch_local(
    function: Callable[[], Any],
    workers: int,
    *,
    plan: str | None = None,
    threads: int | None = None,
    timeout_s: float = 300.0,
) -> Any:
    """Run `function()` in `workers` fresh processes of this machine; what rank 0 returned.

    The function travels by cloudpickle, so functions of `__main__`, closures and notebooks work.
    Each worker computes with `threads` threads (cores / workers unless set). Workers lead process
    groups of their own; whatever they started and left ends with them.

    Raises:
        UserError: the function or its result cannot be pickled, or a worker raised one.
        WorkerFailed: a worker failed or was killed; the others have ended, within 5 s.
        Interrupted: Ctrl-C. Training ends after its step; what does not train is interrupted at
            once; a second Ctrl-C kills.
    """
    if workers < 1:
        raise UserError(f"workers: received {workers}; allowed: 1 or more")
    with asked_to_stop() as signals:
        warm_up()
        packed = pack_function(function)
        from allfuse.base.torch_private import PrefixStore  # while the zygote loads torch too

        store, run = open_store(), uuid.uuid4().hex
        threads = threads or max(1, count_cores() // workers)
        requests = [
            _pack_request(rank, workers, store.port, run, plan, threads, timeout_s)
            for rank in range(workers)
        ]
        flush_output()
        board = PrefixStore(run, store)
        with borrowed() as zygote:
            watch = Watch(zygote, signals, lambda rank, how: board.set(f"lost/{rank}", how))
            try:
                for request in requests:
                    watch.start(request, packed)
                watch.until_all_ended()
            finally:
                watch.close()
    return judge(watch.outcomes, interrupted=watch.stops > 0)


def _pack_request(
    rank: int, workers: int, port: int, run: str, plan: str | None, threads: int, timeout_s: float
) -> bytes:
    """What a worker takes over from here: also the environment, folder and paths of this moment."""
    from allfuse.launcher.worker import Request

    return pickle.dumps(
        Request(
            rank=rank,
            size=workers,
            run=run,
            store=(LOOPBACK, port),
            plan=plan,
            threads=threads,
            timeout_s=timeout_s,
            folder=current_folder(),
            environment={**os.environ, **rank_facts(rank, workers, port)},
            path=list(sys.path),
            command=list(sys.argv),
        )
    )


def count_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def rank_facts(rank: int, workers: int, port: int) -> dict[str, str]:
    """What torchrun tells a process, for scripts that call init_process_group() themselves."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(workers),
        "LOCAL_WORLD_SIZE": str(workers),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }


def current_folder() -> str:
    try:
        return os.getcwd()
    except FileNotFoundError:
        raise UserError(
            "the current folder is gone, so workers cannot start in it; next: cd to one that exists"
        ) from None


def pack_function(function: Callable[[], Any]) -> bytes:
    import cloudpickle

    try:
        return bytes(cloudpickle.dumps(function))
    except Exception as error:
        raise UserError(
            f"the function cannot be sent to worker processes: {type(error).__name__}: {error}; "
            "allowed: functions whose captured values can be pickled; next: create locks, files "
            "and generators inside the function"
        ) from None


def open_store() -> Any:
    """A store that only this host can reach; by itself torch's would listen on all its networks."""
    from allfuse.base.torch_private import TCPStore

    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    handle = listener.detach()  # the store closes it
    return TCPStore("127.0.0.1", port, None, True, wait_for_workers=False, master_listen_fd=handle)


def flush_output() -> None:
    """What was printed before the launch comes before what the workers print."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
