"""Work that a link does in a thread beside its caller."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

import torch

from allfuse.link.base import Work


class Turned(Work):
    """A fusion that a runner will do, does or has done."""

    def __init__(self, runner: Runner, job: Callable[[], None]) -> None:
        self.runner, self.job = runner, job
        self.done = threading.Event()
        self.error: BaseException | None = None

    def wait(self) -> None:
        """Every wait inside the job has its deadline, and so has this one."""
        while not self.done.is_set() and self.runner.help():
            pass
        self.done.wait()
        if self.error is not None:
            raise self.error


class Runner:
    """Does one job after the other, in a thread of its own beside whoever ordered them, or in that
    of whoever waits, if that is sooner: to hand a job over and to hear of its end takes longer than
    a small one does.

    After an error all later jobs end with the same error: the peers are out of step.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._jobs: deque[Turned] = deque()
        self._ordered = threading.Semaphore(0)
        self._turn = threading.Lock()  # held while a job is done
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._closed = False
        self._last: Callable[[], None] = lambda: None

    def start(self, job: Callable[[], None]) -> Work:
        if self._closed:
            raise ValueError(f"{self._name} was closed")
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            self._thread.start()
        work = Turned(self, job)
        self._jobs.append(work)
        self._ordered.release()
        return work

    def help(self) -> bool:
        """Do the next job here; False if the thread does one, or there is none."""
        if not self._turn.acquire(blocking=False):
            return False
        try:
            return self._do_next()
        finally:
            self._turn.release()

    def _do_next(self) -> bool:
        if not self._jobs:
            return False
        work = self._jobs.popleft()
        if self._error is None:
            try:
                with torch.no_grad():
                    work.job()
            except BaseException as failure:
                self._error = failure
        work.error = self._error
        work.job = _nothing  # what it holds on to is not kept until somebody drops the work
        work.done.set()
        return True

    def _run(self) -> None:
        while True:
            self._ordered.acquire()
            with self._turn:
                if not self._do_next() and self._closed:
                    break
        self._last()

    def close(self, last: Callable[[], None] = lambda: None) -> None:
        """End after the jobs that were ordered, and do `last` then. Waits for nobody."""
        if self._closed:
            return
        self._closed, self._last = True, last
        if self._thread is None:
            last()
        self._ordered.release()


def _nothing() -> None:
    return
