"""A torch.distributed process group as a link (gloo on CPU, NCCL on CUDA)."""

from __future__ import annotations

import ctypes
import threading
import time
from collections import deque
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from allfuse.base import torch_private
from allfuse.base.errors import PeerLost, UserError
from allfuse.base.torch_private import PrefixStore, Store
from allfuse.link.base import Link, Work
from allfuse.link.check import as_bytes, check_contiguous, check_parts, check_summable
from allfuse.link.lookout import Lookout, first_line
from allfuse.link.scatter import Summed

SLICE_S = 1.0  # how long one uninterrupted wait lasts before the lookout is asked
POLL_S = 0.01
SMALL_BYTES = 1 << 16
"""Of a part of a reduce-scatter. Messages over gloo took 1.4 to 2.5 times as long as the sum of
everything for parts of 512 bytes, 0.85 to 1.9 for 16 KB, 0.7 to 1.5 for 512 KB, between 2 or 3
processes of a busy machine."""

LOOK_S = 0.05  # how often whoever forms a link looks for members that are lost


class StoreBoard:
    """A torch store as a board. One client connection, shared by threads under a lock."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._lock = threading.Lock()

    def set(self, key: str, value: bytes) -> None:
        with self._lock:
            self.store.set(key, value.decode("latin-1"))

    def get(self, key: str) -> bytes | None:
        with self._lock:
            return self._get(key) if self.store.check([key]) else None

    def wait(self, key: str, timeout_s: float) -> bytes:
        deadline = time.monotonic() + timeout_s
        while (value := self.get(key)) is None:
            if time.monotonic() > deadline:
                raise TimeoutError(f"nothing was written under {key!r} within {timeout_s} s")
            time.sleep(POLL_S)  # polls: a blocking wait would hold the connection
        return value

    def _get(self, key: str) -> bytes:
        value: bytes = self.store.get(key)
        return value.decode().encode("latin-1")


class GroupWork(Work):
    """A transfer of a process group under way.

    Collectives are waited for in slices, so that an alarm is heard. A point-to-point transfer
    (`whole`) is waited for in one piece: when gloo's wait for one times out it breaks the pair.
    `work` is None while the link holds it back.
    """

    def __init__(
        self,
        link: GroupLink,
        work: Any,
        operation: str,
        whole: bool = False,
        peer: int | None = None,
    ) -> None:
        self.link, self.work, self.operation, self.whole = link, work, operation, whole
        self.peer = peer

    def wait(self) -> None:
        link, begin = self.link, time.monotonic()
        if self.work is None:
            link.start_held()
        doing = link.lookout.doing
        doing.update(operation=self.operation, step=link.step)
        while True:
            try:
                self._wait_slice()
                doing["operation"] = None
                return
            except RuntimeError as error:
                waited = time.monotonic() - begin
                timed_out = not self.work.is_completed()
                if timed_out and waited < link.timeout_s and not link.lookout.alarmed.is_set():
                    continue
                raise link.lost(self.operation, waited, error, self.peer) from None

    def _wait_slice(self) -> None:
        seconds = self.link.timeout_s if self.whole else min(SLICE_S, self.link.timeout_s)
        if self.link.device.type != "cuda":
            self.work.wait(timedelta(seconds=seconds))
            return
        # NCCL's wait only queues; a peer's death shows as work that never completes.
        deadline = time.monotonic() + SLICE_S
        while not self.work.is_completed():
            if time.monotonic() > deadline:
                raise RuntimeError("not completed in this slice")
            time.sleep(2e-5)
        self.work.wait()


class GroupLink(Link):
    """A stand-alone process group beside the default one, so that one replica's loss breaks no
    other group.

    `name` must be new on the board: two links of one name would meet each other's traces.

    Args:
        address: by which the peers find this host, where gloo moves the bytes; see `gloo_group`.

    Raises:
        PeerLost: from waits, and from the construction when a member does not come.
    """

    def __init__(
        self,
        board: StoreBoard,
        lookout: Lookout,
        name: str,
        members: tuple[int, ...],
        *,
        device: torch.device,
        timeout_s: float = 300.0,
        address: str | None = None,
    ) -> None:
        self.name, self.members, self.timeout_s = name, members, timeout_s
        self.rank = members.index(lookout.rank)
        self.device, self.lookout = device, lookout
        self.kind = "nccl" if device.type == "cuda" else "gloo"
        self.holds_back = device.type == "cuda"
        self._under_way: deque[Any] = deque()
        self._held: list[tuple[Callable[[], Any], GroupWork]] = []
        prefix = f"link/{name}/{'-'.join(map(str, members))}"
        store = PrefixStore(prefix, torch_private.clone_store(board.store))
        operation, begin = f"form link {name}", time.monotonic()
        lookout.doing.update(operation=operation, step=None)
        try:
            if device.type == "cuda":
                self.group = self._connect_gpus(store)
            else:
                self.group = self._connect_hosts(store, address)
        except (RuntimeError, TimeoutError) as error:
            raise self.lost(operation, time.monotonic() - begin, error) from None
        lookout.doing["operation"] = None

    def _connect_hosts(self, store: Store, address: str | None) -> dist.ProcessGroup:
        """A gloo group. Made in a thread of its own, since it waits to the deadline for a member
        that dies before it has come, also where the launcher has long told of that.

        Raises:
            RuntimeError: a member did not come, or is lost.
        """
        made: list[dist.ProcessGroup | Exception] = []

        def connect() -> None:
            try:
                made.append(
                    torch_private.gloo_group(store, self.rank, self.size, self.timeout_s, address)
                )
            except Exception as error:  # raised by whoever waits, below
                made.append(error)

        thread = threading.Thread(target=connect, name=f"allfuse-form-{self.name}", daemon=True)
        thread.start()
        keys = [f"lost/{member}" for member in self.members]
        while not made:
            thread.join(LOOK_S)
            if not made and any(self.lookout.board.get(key) is not None for key in keys):
                raise RuntimeError("a member was lost before it had come")
        (found,) = made
        if isinstance(found, Exception):
            raise found
        return found

    def _connect_gpus(self, store: Store) -> dist.ProcessGroup:
        """An NCCL group, once every member is here: NCCL itself would wait for them for ever.

        Raises:
            UserError: two members are on one GPU. NCCL says only that its usage is invalid.
        """
        board, deadline = StoreBoard(store), time.monotonic() + self.timeout_s
        board.set(
            f"gpu/{self.rank}", str(torch.cuda.get_device_properties(self.device).uuid).encode()
        )
        gpus = [board.wait(f"gpu/{rank}", deadline - time.monotonic()) for rank in range(self.size)]
        sharing = [self.members[rank] for rank, gpu in enumerate(gpus) if gpus.count(gpu) > 1]
        try:
            return torch_private.nccl_group(
                store, self.rank, self.size, self.timeout_s, self.device
            )
        except RuntimeError:
            if not sharing:
                raise
            raise UserError(
                f"ranks {', '.join(map(str, sharing))} share a GPU, and NCCL takes one rank on "
                "each; allowed: a GPU for each worker; next: fewer workers, or --device cpu"
            ) from None

    def lost(
        self, operation: str, seconds: float, error: Exception, awaited: int | None = None
    ) -> PeerLost:
        """The error to raise after a transfer failed: who is lost, found out by a roll call.

        Args:
            awaited: the peer of a transfer from one to one.
        """
        member = None if awaited is None else self.members[awaited]
        peer, why = self.lookout.who_is_lost(self.members, operation, self.step, member)
        reason = f"{why} ({first_line(error)})" if peer is None else why
        names = self.lookout.names
        return PeerLost(
            reason,
            rank=names[self.members[self.rank]],
            peer=None if peer is None else names[peer],
            operation=operation,
            step=self.step,
            seconds=seconds,
        )

    def _start(self, operation: str, begin: Callable[[], Any], peer: int | None = None) -> Work:
        self.start_held()
        work = self._begin(operation, begin)
        return GroupWork(self, work, operation, whole=peer is not None, peer=peer)

    def _begin(self, operation: str, begin: Callable[[], Any]) -> Any:
        while self._under_way and self._under_way[0].is_completed():
            self._under_way.popleft()
        try:
            work = begin()
        except RuntimeError as error:
            raise self.lost(operation, 0.0, error) from None
        self._under_way.append(work)
        return work

    def _start_one_to_one(self, operation: str, peer: int, begin: Callable[[], Any]) -> Work:
        """On CUDA it is held back, and goes with all that is started before somebody waits."""
        if not self.holds_back:
            return self._start(operation, begin, peer)
        work = GroupWork(self, None, operation, peer=peer)
        self._held.append((begin, work))
        return work

    def start_held(self) -> None:
        held, self._held = self._held, []
        if held:
            starts, works = [begin for begin, _ in held], [work for _, work in held]
            operation = works[0].operation
            begun = self._begin(operation, lambda: torch_private.start_together(self.group, starts))
            for work in works:
                work.work = begun

    def all_reduce(self, tensor: Tensor, operation: str) -> Work:
        check_summable(tensor, operation)
        self.sent_bytes += 2 * (self.size - 1) * tensor.nbytes // self.size
        return self._start(operation, lambda: self.group.allreduce([tensor]))

    def reduce_scatter(self, target: Tensor, parts: Tensor, operation: str) -> Work:
        """By messages over gloo, whose own would send twice as much: it sums everything and drops
        what others get. So are small parts summed. Such sums, and NCCL's, are added up in an order
        of their own."""
        if self.device.type != "cuda":
            if target.nbytes < SMALL_BYTES:
                return Summed(self, target, parts, operation)
            return super().reduce_scatter(target, parts, operation)
        check_parts(target, parts, self.size, operation)
        self.sent_bytes += (self.size - 1) * target.nbytes
        return self._start(
            operation, lambda: torch_private.reduce_scatter(self.group, target.detach(), parts)
        )

    def broadcast(self, tensor: Tensor, operation: str, root: int = 0) -> Work:
        check_contiguous(tensor, operation)
        if self.rank == root:
            self.sent_bytes += tensor.nbytes
        options = dist.BroadcastOptions()
        options.rootRank = root
        return self._start(operation, lambda: self.group.broadcast([as_bytes(tensor)], options))

    def send(self, tensor: Tensor, peer: int, operation: str) -> Work:
        check_contiguous(tensor, operation)
        self.sent_bytes += tensor.nbytes
        return self._start_one_to_one(
            operation, peer, lambda: self.group.send([as_bytes(tensor)], peer, 0)
        )

    def receive(self, tensor: Tensor, peer: int, operation: str) -> Work:
        check_contiguous(tensor, operation)
        return self._start_one_to_one(
            operation, peer, lambda: self.group.recv([as_bytes(tensor)], peer, 0)
        )

    def alive(self) -> tuple[int, ...]:
        board = self.lookout.board
        return tuple(
            rank
            for rank, member in enumerate(self.members)
            if all(board.get(f"{kind}/{member}") is None for kind in ("lost", "gone", "left"))
        )

    def close(self) -> None:
        """Drops the group without the usual farewell, which would wait for peers."""
        group = self.__dict__.pop("group", None)
        if group is not None and self.device.type == "cuda":
            group.abort()  # ends transfers that a lost peer left on the GPU
        elif group is not None and not all(work.is_completed() for work in self._under_way):
            # Its destructor would wait for transfers that a lost peer will never end: leak it.
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(group))
        self._under_way.clear()
        self._held.clear()


def form_replica_group(
    board: StoreBoard, replica: tuple[int, ...], rank: int, backend: str, timeout_s: float
) -> bool:
    """Make the default process group, which spans one replica; whether it was made.

    A no-op where one exists already.
    """
    if dist.is_initialized():
        return False
    store = PrefixStore(f"replica/{replica[0]}", torch_private.clone_store(board.store))
    dist.init_process_group(
        backend,
        store=store,
        rank=replica.index(rank),
        world_size=len(replica),
        timeout=timedelta(seconds=timeout_s),
    )
    return True


def leave_replica_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
