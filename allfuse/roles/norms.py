"""How long the gradient of an update is that all workers make together: clipping in step.

No server holds all of a gradient, and what is summed is known only once the last worker is done. So
the sum is measured before it is ordered: servers tell the squares of their shards' norms, and the
order then says by what factor the sum is shortened. Two messages to and from each server for each
update, of some bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch

from allfuse.roles import messages as say
from allfuse.roles.outbox import Outbox
from allfuse.roles.records import Server
from allfuse.roles.shard import Shard, Values, weighted_sum

EPSILON = 1e-6  # as torch.nn.utils.clip_grads_with_norm_

Pairs = list[list[float]]


class Norms:
    """The norm of the sum that is to be ordered next, which servers are asked for.

    A server that was started anew, or other leases, begin it anew.
    """

    def __init__(self, outbox: Outbox, resend_s: float) -> None:
        self._outbox, self._resend_s = outbox, resend_s
        self._pairs: Pairs | None = None
        self._squares: dict[tuple[int, int], float] = {}  # by shard and birth
        self._asked_s = 0.0

    def ask(self, pairs: Pairs, servers: Iterable[Server]) -> float | None:
        """The norm of the sum of these [lease, weight]; None until all servers have told."""
        servers = list(servers)
        if pairs != self._pairs:
            self._pairs, self._squares = pairs, {}
            self._say(servers)
        holders = [(server.shard, server.birth) for server in servers]
        if any(holder not in self._squares for holder in holders):
            return None
        return math.sqrt(sum(self._squares[holder] for holder in holders))

    def hear(self, server: Server, message: say.Measured) -> None:
        if message.birth == server.birth and message.leases == self._pairs:
            self._squares[server.shard, server.birth] = message.square

    def tick(self, servers: Iterable[Server]) -> None:
        """Ask again who has not told."""
        if self._pairs is not None and self._outbox.now_s - self._asked_s >= self._resend_s:
            self._say(s for s in servers if (s.shard, s.birth) not in self._squares)

    def forget(self) -> None:
        """It was ordered."""
        self._pairs, self._squares = None, {}

    def _say(self, servers: Iterable[Server]) -> None:
        assert self._pairs is not None
        self._asked_s = self._outbox.now_s
        for server in servers:
            self._outbox.send(server.name, say.Measure(leases=self._pairs))


def clip_factor(norm: float, largest: float) -> float:
    """By what a gradient is multiplied whose norm is to be `largest` at most."""
    return min(1.0, largest / (norm + EPSILON))


def square_of(shard: Shard, piece: int, pushes: Sequence[tuple[float, Values]]) -> float:
    """The square of the norm of a piece's weighted sum, in float64; of gradients only."""
    total = 0.0
    for place, span in enumerate(shard.pieces[piece]):
        if shard.blueprint.pushes_changes(span.block):
            continue
        parts = [(weight, values[place]) for weight, values in pushes]
        norm = torch.linalg.vector_norm(weighted_sum(parts), dtype=torch.float64)
        total += float(norm) ** 2
    return total
