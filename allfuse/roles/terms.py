"""The terms of a job: what the scheduler holds its workers and servers to."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from allfuse.plan import Plan
from allfuse.sync import Asp, Bsp, Sync

BSP = Bsp()


@dataclass(frozen=True, kw_only=True)
class Terms:
    """How work is shared, and what is waited for how long. Times are in seconds.

    Args:
        parts: into how many each batch is cut.
        every: steps between two updates of a worker, of the same fragment.
        fragments: parts of the weights, each with updates of its own, at even distances.
        sync: how far workers may be apart.
        servers: shards of the weights, a server each; 0 where workers gossip.
        replicas: copies of each shard, on other servers.
        min, max: workers that are needed, and that may be there; None is `parts`.
        lease_s: silence after which a worker is lost.
        timeout_s: how long fewer than `min` workers, or servers that do not go on, are waited for.
        snapshot_s: between two orders to write the weights to disk; None: only the last version.
        resend_s: after which a server that has not said that it carried out its orders hears them
            again.
    """

    parts: int
    every: int = 1
    fragments: int = 1
    sync: Sync = BSP
    servers: int = 1
    replicas: int = 0
    min: int | None = None
    max: int | None = None
    lease_s: float = 10.0
    timeout_s: float = 60.0
    snapshot_s: float | None = 30.0
    resend_s: float = 1.0

    @cached_property
    def in_step(self) -> bool:
        """One order for all parts of a block, instead of one for each update."""
        return self.sync.bound == 0

    @property
    def gossips(self) -> bool:
        """Workers hold the weights themselves, and mix them with each other."""
        return self.servers == 0

    @property
    def is_scaled(self) -> bool:
        """An update that missed m others counts 1 / (m + 1)."""
        return isinstance(self.sync, Asp) and self.sync.scaled

    @property
    def fewest(self) -> int:
        return self.parts if self.min is None else self.min

    @property
    def most(self) -> int:
        return max(self.parts if self.max is None else self.max, self.fewest)

    @property
    def plain(self) -> dict[str, Any]:
        """What a book must agree on with those who go on from it."""
        own = {"parts": self.parts, "every": self.every, "servers": self.servers}
        own |= {"fragments": self.fragments} if self.fragments > 1 else {}
        return {**own, "sync": str(self.sync)}


def terms_of(plan: Plan, timeout_s: float) -> Terms:
    """What a scheduler holds workers of a plan to."""
    outer = plan.outer
    assert outer is not None, "all are in step, without servers"
    every = getattr(outer, "every", 1)
    assert isinstance(every, int)
    return Terms(
        parts=outer.n,
        every=every,
        fragments=getattr(outer, "fragments", 1),
        sync=outer.sync,
        servers=plan.servers,
        replicas=getattr(outer.topology, "replicas", 0),
        min=outer.min,
        max=outer.max,
        timeout_s=timeout_s,
    )
