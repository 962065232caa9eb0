"""Which peers share a host."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Layout:
    """Peers 0 to n - 1, and the host of each, by any names that can be compared.

    >>> Layout.of(3).by_host
    ((0, 1, 2),)
    >>> Layout(("b", "a", "b")).by_host
    ((0, 2), (1,))
    """

    hosts: tuple[str, ...]

    @classmethod
    def of(cls, peers: int, per_host: int | None = None) -> Layout:
        """So many peers on one host, or `per_host` on each, filled one after the other."""
        return cls(tuple(str(peer // (per_host or peers)) for peer in range(peers)))

    @property
    def size(self) -> int:
        return len(self.hosts)

    @cached_property
    def by_host(self) -> tuple[tuple[int, ...], ...]:
        """The peers of each host, hosts in the order of their first peer."""
        groups: dict[str, list[int]] = {}
        for peer, host in enumerate(self.hosts):
            groups.setdefault(host, []).append(peer)
        return tuple(tuple(group) for group in groups.values())
