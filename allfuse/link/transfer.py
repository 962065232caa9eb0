"""Transfers of a socket link that are under way."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import zmq
from torch import Tensor

from allfuse.base.errors import DistributedError, PeerLost
from allfuse.link.base import Work
from allfuse.link.check import as_bytes
from allfuse.link.frame import Header, Malformed, fingerprint

if TYPE_CHECKING:
    from allfuse.link.peer import Peer
    from allfuse.link.socket import SocketLink

SLICE_S = 0.25  # how long a wait lasts before the alarm is looked at
COPY_BYTES = 1 << 16  # shorter tensors are copied: cheaper than to be told when they were sent


class Failure(NamedTuple):
    """Why a transfer cannot be; `member` is to blame where it is not the peer itself."""

    kind: type[DistributedError]
    reason: str
    member: int | None = None


class Transfer(Work):
    """One tensor to or from one peer.

    Attributes:
        data: the tensor's bytes, on the CPU.
        done: bytes that were handed over, or have come.
        ended: set when all were, or never will be: then there is a failure.
    """

    def __init__(
        self, link: SocketLink, peer: Peer, tensor: Tensor, operation: str, step: int | None
    ) -> None:
        self.link, self.peer, self.operation, self.step = link, peer, operation, step
        self.dtype, self.elements = tensor.dtype, tensor.numel()
        self.about = fingerprint(operation)
        self.data = as_bytes(tensor).numpy()
        self.done = 0
        self.ended = threading.Event()
        self.failure: Failure | None = None

    def end(self, failure: Failure | None = None) -> None:
        if not self.ended.is_set():
            self.failure = failure
            self.ended.set()

    def settled(self, timeout_s: float) -> bool:
        """Whether the tensor may be used, or a failure is known, after so long a wait."""
        return self.ended.wait(timeout_s)

    def wait(self) -> None:
        """Raises PeerLost or BadMessage, the former at the deadline of the link too."""
        begin = time.monotonic()
        deadline = begin + self.link.timeout_s
        with self.link.doing(self.operation, self.step):
            while not self.settled(max(0.0, min(SLICE_S, deadline - time.monotonic()))):
                if time.monotonic() >= deadline:
                    self._give_up("gave no sign within the deadline")
                elif self.link.alarmed:
                    self._give_up("is waited for, and someone misses a rank")
        if self.failure is not None:
            seconds = time.monotonic() - begin
            raise self.link.error(self.failure, self.peer, self.operation, self.step, seconds)

    def _give_up(self, reason: str) -> None:
        """The peer is lost: what comes later must not be taken for something else."""
        with self.link.lock:
            if not self.settled(0.0):
                failure = Failure(PeerLost, reason)
                self.peer.drop(failure)
                self.failure = self.failure or failure
                self.ended.set()


class Sending(Transfer):
    """A tensor on its way out. It may be changed when the wait is over, not before."""

    def __init__(
        self, link: SocketLink, peer: Peer, tensor: Tensor, operation: str, step: int | None
    ) -> None:
        super().__init__(link, peer, tensor.cpu(), operation, step)
        self.copied = len(self.data) < COPY_BYTES
        self.freed: zmq.MessageTracker | None = None

    def settled(self, timeout_s: float) -> bool:
        """Whether ZeroMQ has taken all bytes, and let go of the tensor's memory."""
        begin = time.monotonic()
        if not self.ended.wait(timeout_s):
            return False
        if self.failure is not None or self.freed is None or self.freed.done:
            return True
        try:
            self.freed.wait(max(1e-4, timeout_s - (time.monotonic() - begin)))
        except zmq.NotDone:
            return False
        if not self.peer.left:  # who left had taken what it wanted
            self.failure = self.peer.failure
        return True


class Receiving(Transfer):
    """A tensor that is to come."""

    def __init__(
        self, link: SocketLink, peer: Peer, tensor: Tensor, operation: str, step: int | None
    ) -> None:
        self.target: Tensor | None = None
        if tensor.device.type != "cpu":
            self.target, tensor = tensor, torch.empty_like(tensor, device="cpu")
        self.staged = tensor
        super().__init__(link, peer, tensor, operation, step)

    def take(self, header: Header, payload: memoryview) -> bool:
        """Put a piece in its place; whether the tensor is complete.

        Raises:
            Malformed: it is of another tensor than this one.
        """
        if (header.operation, header.dtype, header.amount) != (
            self.about,
            self.dtype,
            self.elements,
        ):
            raise Malformed(
                f"{header.words!r} of {header.amount} elements of {header.dtype}; this rank waits "
                f"for {self.operation!r} of {self.elements} elements of {self.dtype}"
            )
        if len(payload):
            piece = np.frombuffer(payload, np.uint8)
            self.data[header.start : header.start + len(piece)] = piece
        self.done = header.start + len(payload)
        return self.done == len(self.data)

    def wait(self) -> None:
        super().wait()
        if self.target is not None:
            with torch.no_grad():
                self.target.copy_(self.staged)
            self.target = None
