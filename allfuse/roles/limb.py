"""A rank that shares a worker's model with its first one, and talks to servers for itself alone."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from enum import IntEnum

import torch

from allfuse.launcher.crewmate import Crewmate
from allfuse.link.post import wait_any
from allfuse.roles.blueprint import Blueprint
from allfuse.roles.client import Client
from allfuse.roles.hand import SLICE_S, Hand
from allfuse.roles.limbs import name_of
from allfuse.roles.messages import SCHEDULER, Join, Lease, Mail, Message

PATIENCE_S = 0.5  # of one wait for weights, after which the first rank hears how it stands


class Standing(IntEnum):
    """How a rank stands towards a lease that it is to begin."""

    READY = 0
    COMING = 1  # its weights are on their way
    STUCK = 2  # nothing of them came


class Limb(Hand):
    """What it has of a model it pushes, and what it needs comes to it; which lease it works on, and
    where servers are, it is handed by the first rank, which the scheduler talks to.

    Args:
        join: what the first rank says of the worker. rank: of this one.
    """

    def __init__(
        self,
        crew: Crewmate,
        join: Join,
        blueprint: Blueprint,
        servers: int,
        rank: int,
        device: torch.device,
    ) -> None:
        super().__init__(crew, name_of(join.name, rank))
        self.client = Client(join, blueprint, servers, rank=rank, device=device)
        self._begin_to_keep_in_touch()

    def hear(self, heard: Sequence[Message], lease: Lease | None, kept: int) -> None:
        """What the first rank has heard, and the lease that it is ready to begin; see
        `Client.follow`."""
        with self._lock:
            client = self._open_client
            self._send(client.follow(heard, lease, kept, time.monotonic()))

    def await_lease(self) -> Standing:
        """Wait a while for the weights of the lease. Where they are here they stay as they are."""
        client = self._open_client
        before, until_s = client.replica.progress, time.monotonic() + PATIENCE_S
        slice_s = 0.0  # they may be here, and nothing more would come to wake us
        while True:
            with self._lock:
                self._work(slice_s)
                if self._trouble is not None:
                    raise self._trouble
                if client.is_ready or client.is_over:
                    client.hold()
                    return Standing.READY
                if time.monotonic() > until_s:
                    came = client.replica.progress != before
                    return Standing.COMING if came else Standing.STUCK
            slice_s = SLICE_S

    def begin(self) -> None:
        """All ranks are ready: work on the lease."""
        with self._lock:
            client = self._open_client
            if client.is_over:
                client.replica.settle()
            else:
                client.begin(time.monotonic())

    def release(self) -> None:
        """Not all are: newer weights may come."""
        with self._lock:
            self._open_client.release()

    def _send(self, mail: Iterable[Mail]) -> None:
        for to, message in mail:
            if to != SCHEDULER:  # which the first rank talks to
                self._server(to).send(message.letter())

    def _work(self, timeout_s: float) -> None:
        client = self._open_client
        self._send(client.tick(time.monotonic()))
        callers = list(self._servers.values())
        if callers:
            wait_any(callers, timeout_s)
        elif timeout_s:
            self._over.wait(timeout_s)  # there is nobody yet who could wake us
        self._hear_servers()
