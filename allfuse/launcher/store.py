"""A world of processes that meet at a torch store."""

from __future__ import annotations

from typing import TYPE_CHECKING

from allfuse.launcher.base import World

if TYPE_CHECKING:
    import torch

    from allfuse.base.torch_private import Store
    from allfuse.link.base import Link


class StoreWorld(World):
    """Ranks as processes. `loopback` keeps their traffic on this host."""

    def __init__(
        self, store: Store, rank: int, size: int, *, loopback: bool, timeout_s: float = 300.0
    ) -> None:
        from allfuse.link.group import Lookout, StoreBoard

        super().__init__()
        self.rank, self.size, self.timeout_s = rank, size, timeout_s
        self._loopback = loopback
        self.store_board = StoreBoard(store)
        self.board = self.store_board
        self._lookout = Lookout(self.store_board, rank) if size > 1 else None

    def link(self, name: str, members: tuple[int, ...], device: torch.device) -> Link:
        if len(members) == 1 or self._lookout is None:
            from allfuse.link.lone import LoneLink

            return LoneLink(members[0])
        from allfuse.link.group import GroupLink

        return GroupLink(
            self.store_board,
            self._lookout,
            name,
            members,
            device=device,
            timeout_s=self.timeout_s,
            loopback=self._loopback,
        )

    def form_replica(self, replica: tuple[int, ...], backend: str) -> None:
        from allfuse.link.group import form_replica_group

        form_replica_group(self.store_board, replica, self.rank, backend)

    def tell_why_gone(self, reason: str) -> None:
        """Leave word for peers that will wait for this rank in vain."""
        try:
            self.board.set(f"gone/{self.rank}", reason.encode("utf-8", "replace"))
        except RuntimeError:
            return  # the store is gone: there is nobody to tell

    def close(self) -> None:
        from allfuse.link.group import leave_replica_group

        if self._lookout is not None:
            self._lookout.close()
        leave_replica_group()
