"""Workers as processes of this machine, forked from a zygote that has torch loaded."""

from __future__ import annotations

import contextlib
import os
import pickle
import socket
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from allfuse.base.errors import UserError
from allfuse.launcher.base import BEGAN
from allfuse.launcher.generation import RESTARTS, LossPolicy, Lost
from allfuse.launcher.outcome import how_it_ended
from allfuse.launcher.regroup import prefix_of
from allfuse.launcher.signals import asked_to_stop
from allfuse.launcher.store import LOOPBACK
from allfuse.launcher.survivors import SurvivorsWatch, judge_survivors
from allfuse.launcher.watch import Watch
from allfuse.launcher.zygotes import Zygote, borrowed, warm_up

if TYPE_CHECKING:
    from allfuse.link.base import Board

__all__ = ["count_cores", "launch_local", "threads_each", "warm_up"]


def launch_local(
    function: Callable[[], Any],
    workers: int,
    *,
    plan: str | None = None,
    threads: int | None = None,
    timeout_s: float = 300.0,
    policy: LossPolicy | None = None,
) -> Any:
    """Run `function()` in `workers` fresh processes of this machine; what rank 0 returned.

    The function travels by cloudpickle, so functions of `__main__`, closures and notebooks work.
    Each worker computes with `threads` threads (cores / workers unless set). Workers lead process
    groups of their own; whatever they started and left ends with them. `policy` says what becomes
    of the others when one is killed.

    Raises:
        UserError: the function or its result cannot be pickled, or a worker raised one.
        WorkerFailed: a worker failed or was killed; the others have ended, within 5 s.
        Interrupted: Ctrl-C. Training ends after its step; what does not train is interrupted at
            once; a second Ctrl-C kills.
    """
    if workers < 1:
        raise UserError(f"workers: received {workers}; allowed: 1 or more")
    policy = policy or LossPolicy()
    with asked_to_stop() as signals:
        warm_up()
        launch = _Launch(
            packed=pack_function(function),
            workers=workers,
            plan=plan,
            threads=threads or threads_each(workers),
            timeout_s=timeout_s,
            policy=policy,
            store=open_store(),  # while the zygote loads torch too
        )
        flush_output()
        with borrowed() as zygote:
            watch = launch.run(zygote, signals)
            while policy.on_loss == "restart" and launch.may_restart(watch):
                watch = launch.run(zygote, signals)
    return judge_survivors(watch.outcomes, interrupted=watch.stops > 0)


@dataclass(kw_only=True)
class _Launch:
    """What is run, perhaps several times. lost: in the attempts before."""

    packed: bytes
    workers: int
    plan: str | None
    threads: int
    timeout_s: float
    policy: LossPolicy
    store: Any
    lost: list[Lost] = field(default_factory=list)
    resumes: bool = False
    run_id: str = ""

    def run(self, zygote: Zygote, signals: socket.socket) -> Watch:
        """Start all workers, and look after them until all have ended."""
        from allfuse.base.torch_private import PrefixStore
        from allfuse.link.group import StoreBoard

        self.run_id = uuid.uuid4().hex

        def board_of(number: int) -> Board:
            return StoreBoard(PrefixStore(prefix_of(self.run_id, number), self.store))

        watch: Watch
        if self.policy.goes_on:
            watch = SurvivorsWatch(zygote, signals, self.workers, self.policy, board_of)
        else:
            board = board_of(0)
            watch = Watch(zygote, signals, lambda n, how: board.set(f"lost/{n}", how.encode()))
        try:
            for rank in range(self.workers):
                watch.start(self._pack_request(rank), self.packed)
            watch.until_all_ended()
        finally:
            watch.close()
        self.resumes |= board_of(0).get(BEGAN) is not None
        return watch

    def may_restart(self, watch: Watch) -> bool:
        """Whether a worker was killed, and nobody failed by itself; says so."""
        killed = [o for o in watch.outcomes if o.failure is None and o.is_cause]
        failed = [o for o in watch.outcomes if o.failure is not None and o.is_cause]
        if not killed or failed or watch.stops or len(self.lost) >= RESTARTS:
            return False
        first = min(killed, key=lambda each: each.order or 0)
        self.lost.append(Lost(first.rank, how_it_ended(first.status), time.time()))
        where = "from the last checkpoint" if self.resumes else "from the beginning"
        print(
            f"allfuse: {self.lost[-1]}; all workers are started again {where}, "
            f"{len(self.lost)} of {RESTARTS} times",
            file=sys.stderr,
            flush=True,
        )
        return True

    def _pack_request(self, rank: int) -> bytes:
        """What a worker takes over from here: also the environment, folder and paths of this
        moment."""
        from allfuse.launcher.worker import Request

        return pickle.dumps(
            Request(
                rank=rank,
                size=self.workers,
                run=self.run_id,
                store=(LOOPBACK, self.store.port),
                plan=self.plan,
                threads=self.threads,
                timeout_s=self.timeout_s,
                folder=current_folder(),
                environment={**os.environ, **rank_facts(rank, self.workers, self.store.port)},
                path=list(sys.path),
                command=list(sys.argv),
                goes_on=self.policy.goes_on,
                again=tuple(self.lost),
                resumes=self.resumes,
            )
        )


def count_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads_each(workers: int) -> int:
    """Threads of each worker of this host, where nobody said how many: OMP_NUM_THREADS, which
    torchrun sets to 1 by itself and therefore says nothing there, or an even share of the cores."""
    said = os.environ.get("OMP_NUM_THREADS", "")
    if said.isdecimal() and int(said) > 0 and "TORCHELASTIC_RUN_ID" not in os.environ:
        return int(said)
    return max(1, count_cores() // workers)


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
