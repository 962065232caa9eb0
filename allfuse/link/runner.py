"""Work that a link does in a thread beside its caller."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

import torch

from allfuse.link.base import Work


class Turned(Work):
    """A fusion that a runner will do, does or has done."""

    def __init__(self, job: Callable[[], None]) -> None:
        self.job = job
        self.done = threading.Event()
        self.error: BaseException | None = None

    def wait(self) -> None:
        """Every wait inside the job has its deadline, and so has this one."""
        self.done.wait()
        if self.error is not None:
            raise self.error


class Runner:
    """Does one job after the other in a thread of its own, beside whoever ordered them.

    After an error all later jobs end with the same error: the peers are out of step.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._jobs: queue.SimpleQueue[Turned | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._closed = False
        self._last: Callable[[], None] = lambda: None

    def start(self, job: Callable[[], None]) -> Work:
        if self._closed:
            raise ValueError(f"{self._name} was closed")
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            self._thread.start()
        work = Turned(job)
        self._jobs.put(work)
        return work

    def _run(self) -> None:
        error: BaseException | None = None
        while (work := self._jobs.get()) is not None:
            if error is None:
                try:
                    with torch.no_grad():
                        work.job()
                except BaseException as failure:
                    error = failure
            work.error = error
            work.done.set()
            del work  # what it holds on to is not kept until the next one comes
        self._last()

    def close(self, last: Callable[[], None] = lambda: None) -> None:
        """End after the jobs that were ordered, and do `last` then. Waits for nobody."""
        if self._closed:
            return
        self._closed, self._last = True, last
        if self._thread is None:
            last()
        self._jobs.put(None)
