"""A world of processes that meet at a torch store."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from typing import TYPE_CHECKING

from allfuse.base.errors import PeerLost
from allfuse.launcher.base import World
from allfuse.launcher.outcome import safe_text

if TYPE_CHECKING:
    import torch

    from allfuse.base.torch_private import Store
    from allfuse.link.base import Link


LOOPBACK = "127.0.0.1"


class StoreWorld(World):
    """Ranks as processes.

    Args:
        loopback: all are on this host, and their traffic stays there.
        address: of this host, by which ranks of others find it; None is for torch to find out.
        host: the rank whose process holds the store, None when a process beside the ranks does.
    """

    spans_process = True

    def __init__(
        self,
        store: Store,
        rank: int,
        size: int,
        *,
        loopback: bool,
        address: str | None = None,
        timeout_s: float = 300.0,
        host: int | None = None,
    ) -> None:
        super().__init__()
        self.timeout_s = timeout_s
        self._loopback = loopback
        self._address = LOOPBACK if loopback else address
        self._enter(store, tuple(range(size)), rank, host)
        if not loopback:
            self.tell_host()
        self._closed = False
        self._leaves_group = False

    def _enter(
        self, store: Store, ids: tuple[int, ...], rank: int, host: int | None = None
    ) -> None:
        """Be one of these ranks, who meet at the store for the first time."""
        from allfuse.link.group import StoreBoard
        from allfuse.link.lookout import Lookout

        self._ids, self.rank, self.size = ids, rank, len(ids)
        self.board = self.store_board = StoreBoard(store)
        self._lookout = Lookout(self.store_board, rank, self.size, host, ids)
        self._links: Counter[tuple[str, tuple[int, ...]]] = Counter()
        self._keys.clear()

    @property
    def ids(self) -> tuple[int, ...]:
        return self._ids

    @property
    def is_one_host(self) -> bool:
        return self._loopback

    def link(
        self,
        name: str,
        members: tuple[int, ...],
        device: torch.device,
        groups: Collection[tuple[int, ...]] = (),
    ) -> Link:
        if len(members) == 1:
            from allfuse.link.lone import LoneLink

            return LoneLink(members[0])
        from allfuse.link.bridged import BridgedLink
        from allfuse.link.group import GroupLink
        from allfuse.link.shared import AVAILABLE, SharedLink

        self._links[name, members] += 1  # a second session must not meet the first one's traces
        unique = f"{name}/{self._links[name, members]}"

        def form(kind: type[GroupLink], name: str, members: tuple[int, ...]) -> Link:
            return kind(
                self.store_board,
                self._lookout,
                name,
                members,
                device=device,
                timeout_s=self.timeout_s,
                address=self._address,
            )

        hosts = self.hosts()
        mates = tuple(member for member in members if hosts[member] == hosts[self.rank])
        shares = AVAILABLE and device.type == "cpu"
        inside = all(len({hosts[rank] for rank in group}) == 1 for group in (*groups, members))
        if shares and inside:
            return form(SharedLink, unique, members)
        outer = form(GroupLink, unique, members)
        if not shares or len(mates) == 1:
            return outer
        return BridgedLink(outer, form(SharedLink, f"{unique}/inside", mates))

    def form_replica(self, replica: tuple[int, ...], backend: str) -> None:
        from allfuse.link.group import form_replica_group

        formed = form_replica_group(self.store_board, replica, self.rank, backend, self.timeout_s)
        self._leaves_group |= formed

    def close(self, error: BaseException | None = None) -> None:
        """Leave word for peers that will wait for this rank in vain, and give everything back."""
        from allfuse.link.group import leave_replica_group

        if self._closed:
            return
        self._closed = True
        how = "had finished its work"
        if error is not None:
            how = f"ended with {type(error).__name__}: {safe_text(error)}"
        self._lookout.close(how, lost_a_peer=isinstance(error, PeerLost))
        if self._leaves_group and error is None:  # after an error that could wait for lost peers
            leave_replica_group()
