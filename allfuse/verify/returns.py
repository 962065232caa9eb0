"""Servers that were lost and came again, where they did so in a run's order of events."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from allfuse.roles.records import Rebirth
from allfuse.verify.central import Central, State
from allfuse.verify.encoded import Inward, Outward


class Returns:
    """Sets the shards of servers that came again back to what they came with: an earlier version,
    weights and optimizers, or, from a copy, no other. What such a server's readers hold it does not
    know.

    Weights and states are kept of those versions that a server came with, until it has come.

    Args:
        rebirths: in their order. restarts: after which orders the job was started again, from what
            servers had then: what workers had not sent is lost.
        inward: updates, by worker. outward: weights.
    """

    def __init__(
        self,
        rebirths: Sequence[Rebirth],
        restarts: Sequence[int],
        central: Central,
        inward: Mapping[str, Inward],
        outward: Outward,
    ) -> None:
        self._rebirths, self._restarts = list(rebirths), list(restarts)
        self._central, self._inward, self._outward = central, inward, outward
        self._kept: dict[tuple[int, int], State] = {}  # by shard and sequence

    def before(self, sequence: int) -> bool:
        """What happened before an order was carried out; whether weights changed."""
        moved = False
        while self._rebirths and self._rebirths[0].born < sequence:
            rebirth = self._rebirths.pop(0)
            self._outward.forget(rebirth.shard)
            if not rebirth.whole:
                self._central.restore(rebirth.shard, self._kept[rebirth.shard, rebirth.sequence])
                moved = True
        while self._restarts and self._restarts[0] < sequence:
            self._restarts.pop(0)
            self._outward.forget_all()
            for each in self._inward.values():
                each.forget()
        return moved

    def after(self, sequence: int) -> None:
        """An order was carried out."""
        needed = {(each.shard, each.sequence) for each in self._rebirths if not each.whole}
        for place in [place for place in self._kept if place not in needed]:
            del self._kept[place]
        for shard, wanted in needed:
            if wanted == sequence:
                self._kept[shard, wanted] = self._central.capture(shard)
