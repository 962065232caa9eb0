"""n peers as threads of one process, with scripted faults: the default in tests."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from allfuse.base.errors import BadMessage, PeerLost
from allfuse.link.base import Link, Work
from allfuse.link.check import check_contiguous, check_parts, check_summable


class Killed(BaseException):
    """Ends a rank's thread as kill -9 ends a process. No `Exception`, so that nobody handles it."""


@dataclass
class Script:
    """Faults of the thread link. Operations of a rank are counted from 0 over all its links.

    `kill`, `stall` and `garble` name (rank, operation count): there the rank dies, falls silent
    until all others have ended, or sends something else than was agreed. `delay_s` is asked before
    each operation.

    >>> Script(kill={(2, 5)}).kill
    {(2, 5)}
    """

    kill: set[tuple[int, int]] = field(default_factory=set)
    stall: set[tuple[int, int]] = field(default_factory=set)
    garble: set[tuple[int, int]] = field(default_factory=set)
    delay_s: Callable[[int, int], float] = lambda rank, count: 0.0


@dataclass
class Meeting:
    """One collective: who has come, with which tensor, and whether the result is there.

    targets: where the sum of each rank's part goes, in a reduce-scatter.
    """

    operation: str
    root: int | None
    tensors: dict[int, Tensor] = field(default_factory=dict)
    targets: dict[int, Tensor] = field(default_factory=dict)
    done: bool = False


class Hub:
    """What the threads of one world share: meetings, mail, and who is lost.

    Also the board of such a world.

    Args:
        names: what errors and scripts call each rank; None: its number.
        before: the hub that these ranks met at before; its script goes on.
    """

    def __init__(
        self,
        size: int,
        script: Script | None = None,
        names: Sequence[int] | None = None,
        before: Hub | None = None,
    ) -> None:
        self.size = size
        self.names = tuple(names or range(size))
        self.script = script or Script()
        self.changed = threading.Condition()
        self.meetings: dict[tuple[str, tuple[int, ...], int], Meeting] = {}
        self.mail: dict[tuple[str, int, int, int], Tensor] = {}
        self.lost: dict[int, str] = {}
        self.victims: set[int] = set()  # of the lost: those that ended because they lost a peer
        self._stalled: set[int] = set()
        self._values: dict[str, bytes] = {}
        self._counts: Counter[int] = Counter()
        if before is not None:
            self.script, self._counts = before.script, before._counts

    def count_operation(self, member: int) -> bool:
        """Plays the script for the next operation of a rank; whether it is to send garbage."""
        rank = self.names[member]
        count = self._counts[rank]
        self._counts[rank] += 1
        if delay := self.script.delay_s(rank, count):
            time.sleep(delay)  # emulated slowness, not synchronization
        if (rank, count) in self.script.kill:
            raise Killed(f"rank {rank} at operation {count}")
        if (rank, count) in self.script.stall:
            with self.changed:
                self._stalled.add(member)
                self.changed.wait_for(lambda: len(self.lost) + len(self._stalled) >= self.size)
            raise Killed(f"rank {rank} stalled at operation {count}")
        return (rank, count) in self.script.garble

    def leave(self, rank: int, reason: str, lost_a_peer: bool = False) -> None:
        """The thread of this rank has ended: nobody will see it again."""
        with self.changed:
            self._stalled.discard(rank)
            self.lost.setdefault(rank, reason)
            if lost_a_peer:
                self.victims.add(rank)
            self.changed.notify_all()

    def blame(self, wanted: set[int]) -> tuple[int | None, str]:
        """Which of the ranks that were waited for is to blame, and why. Victims come last."""
        gone = sorted(wanted & self.lost.keys(), key=lambda rank: (rank in self.victims, rank))
        if gone:
            return gone[0], self.lost[gone[0]]
        return min(wanted, default=None), "gave no sign within the deadline"

    def set(self, key: str, value: bytes) -> None:
        with self.changed:
            self._values[key] = value
            self.changed.notify_all()

    def get(self, key: str) -> bytes | None:
        with self.changed:
            return self._values.get(key)

    def wait(self, key: str, timeout_s: float) -> bytes:
        with self.changed:
            if not self.changed.wait_for(lambda: key in self._values, timeout_s):
                raise TimeoutError(f"nothing was written under {key!r} within {timeout_s} s")
            return self._values[key]


class ThreadWork(Work):
    """Waits for a condition that the hub's other threads make true."""

    def __init__(
        self,
        link: ThreadLink,
        operation: str,
        ready: Callable[[], bool],
        wanted: Callable[[], set[int]],
    ) -> None:
        self.link, self.operation, self.ready, self.wanted = link, operation, ready, wanted

    def wait(self) -> None:
        """Raises PeerLost when a wanted peer is lost, or silent past the deadline."""
        hub, link = self.link.hub, self.link
        start = time.monotonic()

        def settled() -> bool:
            return self.ready() or bool(self.wanted() & hub.lost.keys())

        with hub.changed:
            hub.changed.wait_for(settled, link.timeout_s)
            if self.ready():
                return
            peer, reason = hub.blame(self.wanted())
        raise PeerLost(
            reason,
            rank=hub.names[link.members[link.rank]],
            peer=None if peer is None else hub.names[peer],
            operation=self.operation,
            step=link.step,
            seconds=time.monotonic() - start,
        )


class ThreadLink(Link):
    """A link between threads. Sums in the order of ranks, so that results repeat bit for bit.

    `name` must be new to these members: two links of one name would meet each other.
    """

    kind = "thread"

    def __init__(
        self, hub: Hub, name: str, members: tuple[int, ...], member: int, timeout_s: float = 30.0
    ) -> None:
        self.hub, self.name, self.members = hub, name, members
        self.rank, self.timeout_s = members.index(member), timeout_s
        self._collectives = 0
        self._sent: dict[int, int] = {}
        self._received: dict[int, int] = {}

    def all_reduce(self, tensor: Tensor, operation: str) -> Work:
        check_summable(tensor, operation)
        self.sent_bytes += 2 * (self.size - 1) * tensor.nbytes // self.size
        return self._meet(tensor, operation, root=None)

    def broadcast(self, tensor: Tensor, operation: str, root: int = 0) -> Work:
        check_contiguous(tensor, operation)
        if self.rank == root:
            self.sent_bytes += tensor.nbytes
        return self._meet(tensor, operation, root)

    def reduce_scatter(self, target: Tensor, parts: Tensor, operation: str) -> Work:
        check_parts(target, parts, self.size, operation)
        self.sent_bytes += (self.size - 1) * target.nbytes
        return self._meet(parts, operation, None, target)

    def _meet(
        self, tensor: Tensor, operation: str, root: int | None, target: Tensor | None = None
    ) -> Work:
        hub = self.hub
        hub.count_operation(self.members[self.rank])
        key = (self.name, self.members, self._collectives)
        self._collectives += 1
        with hub.changed:
            meeting = hub.meetings.setdefault(key, Meeting(operation, root))
            self._check_agreed(meeting, tensor, operation, root)
            meeting.tensors[self.rank] = tensor
            if target is not None:
                meeting.targets[self.rank] = target.detach()
            if len(meeting.tensors) == self.size:
                _combine(meeting)
                del hub.meetings[key]
                hub.changed.notify_all()

        def wanted() -> set[int]:
            came = meeting.tensors.keys()
            return {member for rank, member in enumerate(self.members) if rank not in came}

        return ThreadWork(self, operation, lambda: meeting.done, wanted)

    def _check_agreed(
        self, meeting: Meeting, tensor: Tensor, operation: str, root: int | None
    ) -> None:
        first = next(iter(meeting.tensors.values()), tensor)
        same = first.shape == tensor.shape and first.dtype == tensor.dtype
        if meeting.operation != operation or meeting.root != root or not same:
            peer = self.members[next(iter(meeting.tensors))]
            theirs = f"{meeting.operation} of {_kind(first)}"
            raise self._bad_message(f"came with {theirs}", peer, operation, tensor)

    def _bad_message(self, what: str, peer: int, operation: str, tensor: Tensor) -> BadMessage:
        names = self.hub.names
        return BadMessage(
            f"rank {names[peer]} {what}, this rank with {operation} of {_kind(tensor)}; all must "
            "call the same",
            rank=names[self.members[self.rank]],
            peer=names[peer],
            operation=operation,
            step=self.step,
            seconds=0.0,
        )

    def send(self, tensor: Tensor, peer: int, operation: str) -> Work:
        check_contiguous(tensor, operation)
        me, other = self.members[self.rank], self.members[peer]
        garbled = self.hub.count_operation(me)
        count = self._sent.get(peer, 0)
        self._sent[peer] = count + 1
        self.sent_bytes += tensor.nbytes
        with self.hub.changed:
            sent = tensor.detach().reshape(-1)[:-1] if garbled else tensor.detach()
            self.hub.mail[(self.name, me, other, count)] = sent.clone()
            self.hub.changed.notify_all()
        return ThreadWork(self, operation, lambda: True, set)

    def receive(self, tensor: Tensor, peer: int, operation: str) -> Work:
        check_contiguous(tensor, operation)
        me, other = self.members[self.rank], self.members[peer]
        self.hub.count_operation(me)
        count = self._received.get(peer, 0)
        self._received[peer] = count + 1
        key = (self.name, other, me, count)
        arrived = False

        def take() -> bool:
            nonlocal arrived
            if not arrived and key in self.hub.mail:
                sent = self.hub.mail.pop(key)
                if sent.dtype != tensor.dtype or sent.numel() != tensor.numel():
                    raise self._bad_message(f"sent {_kind(sent)}", other, operation, tensor)
                tensor.detach().copy_(sent.view_as(tensor))
                arrived = True
            return arrived

        return ThreadWork(self, operation, take, lambda: {other})

    def alive(self) -> tuple[int, ...]:
        with self.hub.changed:
            return tuple(r for r, member in enumerate(self.members) if member not in self.hub.lost)

    def close(self) -> None:
        return


@torch.no_grad()
def _combine(meeting: Meeting) -> None:
    """The sum in the order of ranks, or the root's tensor, written into every peer's tensor; or the
    sum of each one's part, where it wants that."""
    ranks = sorted(meeting.tensors)
    if meeting.targets:
        for rank, target in meeting.targets.items():
            target.copy_(meeting.tensors[0][rank])
            for other in ranks[1:]:
                target += meeting.tensors[other][rank]
        meeting.done = True
        return
    if meeting.root is None:
        total = meeting.tensors[ranks[0]].clone()
        for rank in ranks[1:]:
            total += meeting.tensors[rank]
    else:
        total = meeting.tensors[meeting.root]
    for rank in ranks:
        if rank != meeting.root:
            meeting.tensors[rank].copy_(total)
    meeting.done = True


def _kind(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {tensor.dtype}"
