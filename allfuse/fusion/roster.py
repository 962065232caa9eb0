"""What ranks that others started tell each other before they fuse."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch

from allfuse.base.errors import UserError
from allfuse.launcher.host import host_identity
from allfuse.topology import Layout

if TYPE_CHECKING:
    from allfuse.link import Link


def tell(
    link: Link, device: torch.device, numbers: Sequence[float], operation: str
) -> list[list[float]]:
    """The numbers of every rank, in order, exactly: one sum of (n, k) float64, 8 n k bytes.

    Every rank has a row of its own and adds zeros elsewhere, so nothing is rounded.
    """
    rows = torch.zeros(link.size, len(numbers), dtype=torch.float64)
    rows[link.rank] = torch.tensor(numbers, dtype=torch.float64)
    rows = rows.to(device)
    link.all_reduce(rows, operation).wait()
    told: list[list[float]] = rows.tolist()
    return told


def number_of(text: str) -> float:
    """A number that stands for a text: 48 bits of its hash, which float64 holds exactly."""
    return float(int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big"))


def find_layout(link: Link, device: torch.device, fusion: str) -> Layout:
    """Which ranks of a link share a host. All of them must ask when one does.

    Raises:
        UserError: they do not mean the same `fusion`: on all alike.
    """
    rows = tell(link, device, [host_number(), number_of(fusion)], "find the hosts")
    for member, (_, other) in zip(link.members, rows, strict=True):
        if other != rows[0][1]:
            raise UserError(
                f"the plan of rank {member} is not that of rank {link.members[0]}; allowed: the "
                f"same on all; here: {fusion}"
            )
    return layout_of(host for host, _ in rows)


def host_number() -> float:
    """Equal in ranks of one host."""
    return number_of(host_identity())


def layout_of(hosts: Iterable[float]) -> Layout:
    return Layout(tuple(f"{host:.0f}" for host in hosts))
