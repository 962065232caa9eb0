"""Carries the letters between a rank of a worker and the servers."""

from __future__ import annotations

import contextlib
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from allfuse.launcher.crewmate import Crewmate
from allfuse.link.post import Caller, Malformed
from allfuse.roles.client import Client
from allfuse.roles.messages import Mail, open_letter

TICK_S = 0.25  # between two looks at what came, while the worker computes
QUICK_S = 0.01  # the same, while an update is on its way, or weights are
SLICE_S = 0.05  # of a wait, after which others may use the callers


class Hand(ABC):
    """A rank's callers to servers; a thread beside it keeps in touch while it computes: often while
    `is_awaited`, when weights come meanwhile.

    Attributes:
        client: of the worker, or of one of its ranks; None before it takes part.
    """

    def __init__(self, crew: Crewmate, name: str) -> None:
        self.name, self._post = name, crew.post()
        self._lock = threading.RLock()
        self._servers: dict[str, Caller] = {}
        self.client: Client | None = None
        self.is_awaited = False
        self._over = threading.Event()
        self._thread: threading.Thread | None = None
        self._trouble: BaseException | None = None

    def _begin_to_keep_in_touch(self) -> None:
        self._thread = threading.Thread(
            target=self._keep_in_touch, name="allfuse-agent", daemon=True
        )
        self._thread.start()

    @property
    def _open_client(self) -> Client:
        assert self.client is not None, "join first"
        return self.client

    def push(
        self, gradients: Mapping[str, Tensor], options: list[dict[str, Any]], scale: float = 1.0
    ) -> None:
        """Some gradients are final: send what is whole, multiplied by `scale`."""
        with self._lock:
            client = self._open_client
            client.options = options
            self._send(client.push(gradients, time.monotonic(), scale))

    def finish(
        self,
        options: list[dict[str, Any]],
        *,
        loss: float,
        count: float,
        rows: int,
        seconds: float,
    ) -> None:
        """The update of the lease is whole."""
        with self._lock:
            client = self._open_client
            client.options = options
            now_s = time.monotonic()
            self._send(client.finish(now_s, loss=loss, count=count, rows=rows, seconds=seconds))

    @abstractmethod
    def _send(self, mail: Iterable[Mail]) -> None:
        """Hand letters over, each to whom it is for."""

    @abstractmethod
    def _work(self, timeout_s: float) -> None:
        """Take in what came within a time, and say what is due."""

    def _server(self, place: str) -> Caller:
        if place not in self._servers:
            self._servers[place] = self._post.call(place, self.name)
        return self._servers[place]

    def _hear_servers(self) -> None:
        """Take in what servers said, and be where they can write to."""
        client = self._open_client
        for caller in list(self._servers.values()):
            for letter in caller.receive(0):
                with contextlib.suppress(Malformed):  # nothing has changed then
                    message = open_letter(letter)
                    self._send(client.handle(caller.place, message, time.monotonic()))
        for place in client.places:
            self._server(place)  # they can only write to whom they know

    def _keep_in_touch(self) -> None:
        while not self._over.wait(QUICK_S if self.is_awaited else TICK_S):
            with self._lock:
                if self._over.is_set():
                    return
                try:
                    self._work(0.0)
                except BaseException as error:  # the worker hears of it when it waits next
                    self._trouble = error
                    return

    def close(self) -> None:
        """Go."""
        self._over.set()
        with self._lock:
            for caller in self._servers.values():
                caller.close()
        if self._thread is not None:
            self._thread.join()
