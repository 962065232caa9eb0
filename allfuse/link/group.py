"""A torch.distributed process group as a link (gloo on CPU, NCCL on CUDA), and its lookout."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from allfuse.base import torch_private
from allfuse.base.errors import PeerLost
from allfuse.base.torch_private import PrefixStore, Store
from allfuse.link.base import Link, Work

SLICE_S = 1.0  # how long one uninterrupted wait lasts before the lookout is asked
GRACE_S = 2.0  # how long a roll call waits for answers
POLL_S = 0.2


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
            time.sleep(POLL_S / 20)  # polls: a blocking wait would hold the connection
        return value

    def _get(self, key: str) -> bytes:
        value: bytes = self.store.get(key)
        return value.decode().encode("latin-1")


class Lookout:
    """Knows which ranks are lost.

    Whoever sees a transfer fail raises the alarm on the board. A thread of every rank looks there
    and answers with what its rank is doing. Ranks that give no answer within `GRACE_S`, that the
    launcher saw die (`lost/<rank>`), or that said why they ended (`gone/<rank>`) are lost; if all
    answer, the ones that are not waiting in the same operation are to blame.
    """

    def __init__(self, board: StoreBoard, rank: int) -> None:
        self.board, self.rank = board, rank
        self.alarmed = threading.Event()
        self.doing: dict[str, Any] = {}
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._look, name="allfuse-lookout", daemon=True)
        self._thread.start()

    def _look(self) -> None:
        try:
            while not self._closed.wait(POLL_S):
                if self.board.get("alarm") is not None:
                    self.board.set(f"here/{self.rank}", json.dumps(self.doing).encode())
                    self.alarmed.set()
                    return
        except RuntimeError:  # the store is gone, and so is the run
            self.alarmed.set()

    def close(self) -> None:
        self._closed.set()
        self._thread.join(timeout=2.0)

    def who_is_lost(self, members: tuple[int, ...], operation: str) -> tuple[int | None, str]:
        """Raise the alarm, hold the roll call; the lost member and why, (None, why) if unknown."""
        others = [member for member in members if member != self.rank]
        try:
            self.board.set("alarm", str(self.rank).encode())
            deadline = time.monotonic() + GRACE_S
            while True:
                answers = {member: self._answer(member) for member in others}
                settled = all(answer is not None for answer in answers.values())
                if settled or time.monotonic() > deadline:
                    break
                time.sleep(POLL_S / 4)
        except RuntimeError as error:
            return None, f"the board is gone too ({_first_line(error)})"
        for member, answer in answers.items():
            if answer is not None and answer[0] in ("lost", "gone"):
                return member, answer[1]
        for member, answer in answers.items():
            if answer is None:
                return member, "gave no answer to the roll call"
        for member, answer in answers.items():
            doing = json.loads(answer[1]) if answer else {}
            if doing.get("operation") != operation:
                what = doing.get("operation", "its own work")
                return member, f"is alive but did not come; it is in {what}"
        return None, "all peers are alive and wait; is the network between them cut?"

    def _answer(self, member: int) -> tuple[str, str] | None:
        for kind in ("lost", "gone", "here"):
            if (value := self.board.get(f"{kind}/{member}")) is not None:
                return kind, value.decode()
        return None


class GroupWork(Work):
    """A collective of a process group under way, waited for in slices until its deadline."""

    def __init__(self, link: GroupLink, work: Any, operation: str) -> None:
        self.link, self.work, self.operation = link, work, operation
        self.started = time.monotonic()

    def wait(self) -> None:
        link = self.link
        doing = link.lookout.doing
        doing.update(operation=self.operation, step=link.step)
        begin = time.monotonic()
        while True:
            try:
                self._wait_slice()
                doing.pop("operation", None)
                return
            except RuntimeError as error:
                waited = time.monotonic() - begin
                timed_out = not self.work.is_completed()
                if timed_out and waited < link.timeout_s and not link.lookout.alarmed.is_set():
                    continue
                raise link.lost(self.operation, waited, error) from None

    def _wait_slice(self) -> None:
        if self.link.device.type != "cuda":
            self.work.wait(timedelta(seconds=SLICE_S))
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
        loopback: bool = False,
    ) -> None:
        self.name, self.members, self.timeout_s = name, members, timeout_s
        self.rank = members.index(lookout.rank)
        self.device, self.lookout = device, lookout
        prefix = f"link/{name}/{'-'.join(map(str, members))}"
        store = PrefixStore(prefix, torch_private.clone_store(board.store))
        begin = time.monotonic()
        try:
            if device.type == "cuda":
                self.group = torch_private.nccl_group(store, self.rank, self.size, timeout_s)
            else:
                self.group = torch_private.gloo_group(
                    store, self.rank, self.size, timeout_s, loopback
                )
        except RuntimeError as error:
            raise self.lost(f"form link {name}", time.monotonic() - begin, error) from None

    def lost(self, operation: str, seconds: float, error: Exception) -> PeerLost:
        """The error to raise after a transfer failed: who is lost, found out by a roll call."""
        peer, why = self.lookout.who_is_lost(self.members, operation)
        reason = f"{why} ({_first_line(error)})" if peer is None else why
        me = self.members[self.rank]
        return PeerLost(
            reason, rank=me, peer=peer, operation=operation, step=self.step, seconds=seconds
        )

    def _start(self, operation: str, begin: Callable[[], Any]) -> Work:
        try:
            return GroupWork(self, begin(), operation)
        except RuntimeError as error:
            raise self.lost(operation, 0.0, error) from None

    def all_reduce(self, tensor: Tensor, operation: str) -> Work:
        self.sent_bytes += 2 * (self.size - 1) * tensor.nbytes // self.size
        return self._start(operation, lambda: self.group.allreduce([tensor]))

    def broadcast(self, tensor: Tensor, operation: str, root: int = 0) -> Work:
        if self.rank == root:
            self.sent_bytes += tensor.nbytes
        options = dist.BroadcastOptions()
        options.rootRank = root
        return self._start(operation, lambda: self.group.broadcast([tensor], options))

    def send(self, tensor: Tensor, peer: int, operation: str) -> Work:
        self.sent_bytes += tensor.nbytes
        return self._start(operation, lambda: self.group.send([tensor], peer, 0))

    def receive(self, tensor: Tensor, peer: int, operation: str) -> Work:
        return self._start(operation, lambda: self.group.recv([tensor], peer, 0))

    def alive(self) -> tuple[int, ...]:
        board = self.lookout.board
        return tuple(
            rank
            for rank, member in enumerate(self.members)
            if board.get(f"lost/{member}") is None and board.get(f"gone/{member}") is None
        )

    def close(self) -> None:
        """Drops the group without the usual farewell, which would wait for peers."""
        if hasattr(self, "group"):
            del self.group


def form_replica_group(
    board: StoreBoard, replica: tuple[int, ...], rank: int, backend: str
) -> None:
    """Make the default process group, which spans one replica. A no-op where one exists already."""
    if dist.is_initialized():
        return
    store = PrefixStore(f"replica/{replica[0]}", torch_private.clone_store(board.store))
    dist.init_process_group(backend, store=store, rank=replica.index(rank), world_size=len(replica))


def leave_replica_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def host_name() -> str:
    return os.uname().nodename


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
