"""Transfers of a borrowed group that are held back until somebody waits, as those between GPUs."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from allfuse.launcher.local import launch_local
from allfuse.link.borrowed import BorrowedLink, BorrowedWork


class Held(BorrowedLink):
    """Holds back between CPUs, too."""

    def _holds(self, data: Tensor) -> bool:
        return True


def exchange() -> list[Any]:
    """Both send first: what arrived, and whether anything had begun before somebody waited."""
    dist.init_process_group("gloo")
    try:
        link = Held(dist.group.WORLD)
        other, told = 1 - link.rank, []
        for number in range(2):
            arrived = [torch.zeros(3), torch.zeros(5)]
            own = [torch.full((3,), 10.0 * number + link.rank), torch.full((5,), 7.0 + link.rank)]
            sends = [link.send(each, other, "send") for each in own]
            receives = [link.receive(each, other, "receive") for each in arrived]
            works = [*sends, *receives]
            held = all(isinstance(work, BorrowedWork) and work.work is None for work in works)
            if number:  # a collective comes after what was started before it
                total = torch.ones(1)
                link.all_reduce(total, "sum").wait()
                assert int(total) == 2
            for work in reversed(works):
                work.wait()
            told.append((held, [float(each[0]) for each in arrived]))
        return told
    finally:
        dist.destroy_process_group()


def test_transfers_that_are_held_back_go_together_when_somebody_waits() -> None:
    assert launch_local(exchange, 2, timeout_s=60) == [(True, [1.0, 8.0]), (True, [11.0, 8.0])]
