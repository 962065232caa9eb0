"""A link over ZeroMQ sockets, for peers that come and go."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

import torch
import zmq
from torch import Tensor

from allfuse.base.errors import DistributedError, PeerLost
from allfuse.base.tensors import share
from allfuse.link.base import Board, Link, Work
from allfuse.link.carrier import Carrier
from allfuse.link.check import check_contiguous, check_summable
from allfuse.link.endpoint import Endpoint
from allfuse.link.entrance import Entrance
from allfuse.link.frame import COLLECTIVES, TRANSFERS, Kind, fingerprint
from allfuse.link.lookout import Lookout
from allfuse.link.peer import WHY_BYTES, Peer
from allfuse.link.runner import Runner
from allfuse.link.transfer import Failure, Receiving, Sending, Transfer

LINGER_S = 3.0  # how long a close waits for peers to say that all has come


class SocketLink(Link):
    """A link whose every pair of peers has one TCP connection of its own.

    A peer that is lost or leaves ends only what goes to it and comes from it; collectives need all
    members. A peer does not come back to a link: make a new one, with a new name.

    A connection that breaks, heartbeats that stay unanswered, or a wait that reaches the deadline
    make a peer lost for good, so that nothing of it can arrive late and be taken for something
    else. With a `lookout` a loss is found out and told as on a `GroupLink`: a roll call names the
    cause, and the alarm ends every wait of every rank. Without one each rank knows what its
    connections tell, and goes on with the others.

    The lower rank of a pair listens, the higher connects. Whoever connects must know a password
    that both sides make of what is on the board and of the endpoint's token, or, encrypted, own
    the key that is on the board. `refused` counts connections of others; nothing of them is read.

    Nothing is unpickled: see `frame.py` for what is checked of every message.

    Args:
        member: this rank, one of `members`.
        name: new on the board: two links of one name would meet each other's addresses.
        endpoint: where to listen; None: on the host's own network, encrypted.

    Raises:
        PeerLost, BadMessage: from waits, from sending to a lost peer, and from the construction
            when a member does not come.
    """

    kind = "zeromq"

    def __init__(
        self,
        board: Board,
        member: int,
        name: str,
        members: tuple[int, ...],
        *,
        timeout_s: float = 300.0,
        endpoint: Endpoint | None = None,
        lookout: Lookout | None = None,
    ) -> None:
        self.name, self.members, self.member = name, members, member
        self.rank, self.timeout_s = members.index(member), timeout_s
        self.board, self.lookout = board, lookout
        self.endpoint = endpoint or Endpoint()
        self.about = fingerprint(f"{name} {members}")
        self.lock = self.changed = threading.Condition()
        self._closed = False
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._carrier = Carrier(f"allfuse-socket-{name}", self.lock, self._fail_all)
        self._runner = Runner(f"allfuse-socket-{name}-collectives")
        self._entrance = Entrance(self, self._context)
        self.peers = {
            rank: Peer(self, rank, self._entrance.open_socket())
            for rank in range(self.size)
            if rank != self.rank
        }
        try:
            with self.doing(f"form link {name}", None):
                self._entrance.meet(self._carrier)
        except BaseException:
            self.close()
            raise

    @property
    def refused(self) -> int:
        """Connections of strangers that were sent away."""
        with self.lock:
            own = sum(
                peer.parted for peer in self.peers.values() if not self.connects_to(peer.rank)
            )
            return max(0, self._entrance.gone - own)

    @property
    def alarmed(self) -> bool:
        return self.lookout is not None and self.lookout.alarmed.is_set()

    def connects_to(self, rank: int) -> bool:
        """Whether this rank connects to that one; else it listens for it."""
        return rank < self.rank

    def nudge(self, peer: Peer) -> None:
        self._carrier.nudge(peer)

    # From one to one

    def send(self, tensor: Tensor, peer: int, operation: str) -> Work:
        """Without a copy, if it is large: it may be changed when the wait is over, not before.

        Raises:
            PeerLost, BadMessage: of a peer that is lost already.
        """
        check_contiguous(tensor, operation)
        sending = self._send(tensor, peer, operation, self.step, TRANSFERS)
        if sending.failure is not None:
            raise self.error(sending.failure, sending.peer, operation, self.step, 0.0)
        self.sent_bytes += tensor.nbytes
        return sending

    def receive(self, tensor: Tensor, peer: int, operation: str) -> Work:
        """What a lost peer had sent can still be received."""
        check_contiguous(tensor, operation)
        return self._receive(tensor, peer, operation, self.step, TRANSFERS)

    def _send(
        self, tensor: Tensor, peer: int, operation: str, step: int | None, stream: int
    ) -> Sending:
        self._check_open()
        sending = Sending(self, self.peers[peer], tensor, operation, step)
        with self.lock:
            sending.peer.send(sending, stream)
        return sending

    def _receive(
        self, tensor: Tensor, peer: int, operation: str, step: int | None, stream: int
    ) -> Receiving:
        self._check_open()
        receiving = Receiving(self, self.peers[peer], tensor, operation, step)
        with self.lock:
            receiving.peer.receive(receiving, stream)
        return receiving

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError(f"link {self.name} was closed")

    # Collectives, in a thread beside the caller, in the order in which they are started

    def all_reduce(self, tensor: Tensor, operation: str) -> Work:
        """Start to sum in the order of ranks.

        Phases for B bytes on n ranks:
          1. each sends the r-th part of its tensor to rank r, which sums: (n - 1) / n B sent;
          2. each sends the part that it summed to all others: (n - 1) / n B sent.
        """
        check_summable(tensor, operation)
        self._check_open()
        self.sent_bytes += 2 * (self.size - 1) * tensor.nbytes // self.size
        step = self.step
        return self._runner.start(lambda: self._collect(self._sum, tensor, operation, step))

    def broadcast(self, tensor: Tensor, operation: str, root: int = 0) -> Work:
        """The root sends to each peer: (n - 1) B."""
        check_contiguous(tensor, operation)
        self._check_open()
        if self.rank == root:
            self.sent_bytes += (self.size - 1) * tensor.nbytes
        step = self.step

        def spread(tensor: Tensor, operation: str, step: int | None) -> None:
            if self.rank == root:
                works: list[Transfer] = [
                    self._send(tensor, peer, operation, step, COLLECTIVES) for peer in self.peers
                ]
            else:
                works = [self._receive(tensor, root, operation, step, COLLECTIVES)]
            for work in works:
                work.wait()

        return self._runner.start(lambda: self._collect(spread, tensor, operation, step))

    def _collect(
        self,
        collective: Callable[[Tensor, str, int | None], None],
        tensor: Tensor,
        operation: str,
        step: int | None,
    ) -> None:
        """Run a collective; if it fails tell those who wait for this rank's part of it."""
        try:
            collective(tensor.detach(), operation, step)
        except DistributedError as error:
            blamed = error.peer if isinstance(error, PeerLost) else self.member
            blamed = self.member if blamed is None else blamed
            with self.lock:
                for peer in self.peers.values():
                    why = error.reason.encode()[:WHY_BYTES]
                    peer.say(Kind.BROKEN, COLLECTIVES, blamed, why)
            raise

    def _sum(self, tensor: Tensor, operation: str, step: int | None) -> None:
        flat = tensor.reshape(-1)
        parts = [flat[slice(*share(flat.numel(), self.size, rank))] for rank in range(self.size)]
        own = parts[self.rank]
        values = [own if rank == self.rank else torch.empty_like(own) for rank in range(self.size)]
        self._swap(parts, values, operation, step)
        total = values[0] + values[1] if self.size > 1 else own
        for value in values[2:]:
            total += value
        own.copy_(total)
        self._swap([own] * self.size, parts, operation, step)

    def _swap(
        self, sent: list[Tensor], received: list[Tensor], operation: str, step: int | None
    ) -> None:
        """Send one tensor to each peer and receive one of each."""
        works: list[Transfer] = [
            self._receive(received[rank], rank, operation, step, COLLECTIVES) for rank in self.peers
        ]
        works += [self._send(sent[rank], rank, operation, step, COLLECTIVES) for rank in self.peers]
        for work in works:
            work.wait()

    # Who is lost

    def alive(self) -> tuple[int, ...]:
        with self.lock:
            lost = {peer.rank for peer in self.peers.values() if peer.failure is not None}
        return tuple(
            rank
            for rank, member in enumerate(self.members)
            if rank not in lost and not (self.lookout and self._is_written_off(member))
        )

    def _is_written_off(self, member: int) -> bool:
        words = (self.board.get(f"{kind}/{member}") for kind in ("lost", "gone", "left"))
        return any(word is not None for word in words)

    def error(
        self, failure: Failure, peer: Peer, operation: str, step: int | None, seconds: float
    ) -> DistributedError:
        """The error to raise; with a lookout a roll call finds out who is to blame for a loss."""
        blamed, reason = failure.member, failure.reason
        blamed = peer.member if blamed is None else blamed
        if failure.kind is PeerLost and self.lookout is not None and not self._closed:
            found, why = self.lookout.who_is_lost(self.members, operation, step)
            if found is not None:
                blamed, reason = found, why
        return failure.kind(
            reason, rank=self.member, peer=blamed, operation=operation, step=step, seconds=seconds
        )

    @contextlib.contextmanager
    def doing(self, operation: str, step: int | None) -> Iterator[None]:
        """Let the lookout know what this rank waits for; it stays known if that fails."""
        if self.lookout is not None:
            self.lookout.doing.update(operation=operation, step=step)
        yield
        if self.lookout is not None:
            self.lookout.doing["operation"] = None

    def _fail_all(self, reason: str) -> None:
        for peer in self.peers.values():
            peer.drop(Failure(PeerLost, f"cannot be heard any more: {reason}"))

    def close(self) -> None:
        """Say farewell and give all back: port, threads, context.

        What was handed over still arrives, unless a peer does not answer within `LINGER_S`. What
        is still waited for ends with PeerLost.
        """
        with self.lock:
            if self._closed:
                return
            self._closed = True
            here = [peer for peer in self.peers.values() if peer.present and not peer.failure]
            for peer in here:
                peer.say(Kind.BYE)
            self.changed.wait_for(lambda: all(p.seen or p.over for p in here), LINGER_S)
            for peer in self.peers.values():
                peer.drop(Failure(PeerLost, "is waited for on a link that this rank closed"))
        self._runner.close()
        self._carrier.stop()
        for peer in self.peers.values():
            peer.close()
        self._entrance.close()
        self._context.term()
