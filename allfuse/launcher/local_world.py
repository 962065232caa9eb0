"""The world of a worker that a launcher on this machine has started, and looks after."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from allfuse.base.errors import PeerLost
from allfuse.launcher.generation import Lost, lost_between
from allfuse.launcher.regroup import Meeting, prefix_of
from allfuse.launcher.store import StoreWorld

if TYPE_CHECKING:
    from allfuse.base.torch_private import Store
    from allfuse.link.base import Board

LEAVE_S = 5.0  # within which the launcher ends a worker that is to leave with a lost one


class LocalWorld(StoreWorld):
    """Ranks as processes of this machine.

    Args:
        store: of the launcher. run: names the launch there.
        accuse: names to the launcher (the number of a generation, a worker that does not answer);
            None where all end when one is lost.
    """

    kind = "local"

    def __init__(
        self,
        store: Store,
        run: str,
        rank: int,
        size: int,
        *,
        timeout_s: float,
        accuse: Callable[[int, int], None] | None = None,
    ) -> None:
        from allfuse.base.torch_private import PrefixStore

        self._store, self._run, self._accuse = store, run, accuse
        self._worker = rank
        super().__init__(PrefixStore(run, store), rank, size, loopback=True, timeout_s=timeout_s)
        self.goes_on = accuse is not None
        self.local_rank, self.local_size = rank, size

    def regroup(self, error: PeerLost | None) -> tuple[Lost, ...]:
        if self._accuse is None:
            return super().regroup(error)
        self._lookout.close("meets the others anew", lost_a_peer=True)
        meeting = Meeting(self._worker, self._board(0), self._board, self._accuse, self.timeout_s)
        passed = meeting.attend(self._generation, error)
        here = passed[-1]
        self.is_over = here.is_over
        if self._worker not in here.members:
            if here.members:
                time.sleep(LEAVE_S)
            raise error or meeting.lost(None, "the others do not go on")
        self._generation = here.number
        rank = here.members.index(self._worker)
        self._enter(self._prefixed(here.number), here.members, rank)
        self.local_rank, self.local_size = self.rank, self.size
        return lost_between(passed)

    def _board(self, number: int) -> Board:
        from allfuse.link.group import StoreBoard

        return StoreBoard(self._prefixed(number))

    def _prefixed(self, number: int) -> Store:
        """The part of the store that belongs to a generation."""
        from allfuse.base.torch_private import PrefixStore, clone_store

        return PrefixStore(prefix_of(self._run, number), clone_store(self._store))
