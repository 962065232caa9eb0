"""How the ranks of a prediction go on together, stop together, and hand rank 0 their text."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, TypeVar

import torch

from allfuse.base.errors import DistributedError, PeerLost
from allfuse.base.tensors import tensor_bytes

if TYPE_CHECKING:
    from allfuse.link import Link


T = TypeVar("T")


class State(IntEnum):
    """How a rank's turn ended."""

    GOOD = 0
    BAD_ROW = 1  # a row of the input cannot be used
    FAILED = 2  # raises an error of its own


@dataclass(frozen=True, kw_only=True)
class Status:
    """What a rank tells of its turn: the row is that of a bad one, `taken` counts the rows of all
    ranks as this rank found them, `scored` its own, `length` the bytes of its text, `ahead` the
    batches for each rank in the next turn (rank 0 decides)."""

    state: State = State.GOOD
    row: int = 0
    taken: int = 0
    scored: int = 0
    length: int = 0
    ahead: int = 0


FIELDS = tuple(Status.__dataclass_fields__)


class Agreement:
    """Exchanges over the link of all ranks that share the work. World size 1 exchanges nothing.

    Args:
        work: what they share, for errors.
    """

    def __init__(self, link: Link, device: torch.device, work: str = "rows") -> None:
        self.link, self.device, self.work = link, device, work

    def together(self, attempt: Callable[[], tuple[Status, T]]) -> tuple[list[Status], T]:
        """Do something on all ranks, and go on only if none failed.

        Raises:
            What `attempt` raised here. PeerLost: it raised on another rank.
        """
        try:
            mine, result = attempt()
        except Exception:
            with contextlib.suppress(DistributedError):  # what went wrong here says more
                self.exchange(Status(state=State.FAILED))
            raise
        return self.exchange(mine), result

    def exchange(self, mine: Status) -> list[Status]:
        """The status of every rank, by rank. One transfer of 48 bytes for each rank.

        Raises:
            PeerLost: a rank is gone, or says that it failed, and this one did not.
        """
        link = self.link
        slots = torch.zeros(link.size, len(FIELDS), dtype=torch.int64)
        slots[link.rank] = torch.tensor([getattr(mine, name) for name in FIELDS])
        slots = slots.to(self.device)
        link.all_reduce(slots, f"agree on {self.work}").wait()
        found = []
        for values in slots.tolist():
            state, *others = values
            found.append(Status(state=State(state), **dict(zip(FIELDS[1:], others, strict=True))))
        failed = [rank for rank, status in enumerate(found) if status.state is State.FAILED]
        if failed and mine.state is not State.FAILED:
            raise PeerLost(
                "it failed with an error of its own",
                rank=link.members[link.rank],
                peer=link.members[failed[0]],
                operation=f"agree on {self.work}",
                step=link.step,
                seconds=0.0,
            )
        return found

    def gather(self, text: bytes, lengths: Sequence[int]) -> list[bytes]:
        """The texts of all ranks on rank 0, in the order of ranks; nothing on the others.

        One transfer from each other rank that has text, all under way at once.
        """
        link = self.link
        if link.rank != 0:
            if text:
                sent = torch.frombuffer(bytearray(text), dtype=torch.uint8).to(self.device)
                link.send(sent, 0, f"hand in {self.work}").wait()
            return []
        received = {
            peer: torch.empty(length, dtype=torch.uint8, device=self.device)
            for peer, length in enumerate(lengths)
            if peer and length
        }
        works = [
            link.receive(tensor, peer, f"gather {self.work}") for peer, tensor in received.items()
        ]
        for work in works:
            work.wait()
        return [text, *(bytes(tensor_bytes(tensor.cpu())) for tensor in received.values())]
