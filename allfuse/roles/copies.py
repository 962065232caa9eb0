"""Copies of a shard on other servers: a server that is killed is made again from one.

With r copies the shard of server i is also on the r servers after it, in a ring. Phases of one
update, for a shard of B bytes:
  1. The server passes each piece of a push on to those that keep copies (r B, encoded as it came),
     and says that it holds the update once they do, too.
  2. All carry out the scheduler's orders, those that keep copies on these as well: the same steps
     of the same values, so that they stay equal bit for bit.
A server that is started again fetches its shard, with what was staged, before it says that it is
there; then it carries out the orders that it missed. Source: chain replication of a parameter
server's shards (Li et al. 2014, section 4.3), here with updates passed on, not results: one push
costs the same, and the copy can step while the server sends weights.
"""

from __future__ import annotations

from allfuse.roles.blueprint import Blueprint, read_codec
from allfuse.roles.messages import Copied, Copy, Fetch, Partners
from allfuse.roles.order import Order, carry_out
from allfuse.roles.shard import Shard
from allfuse.roles.stage import Bundle, Stage
from allfuse.roles.transfer import Transfer

MOST_ORDERS = 256  # that a copy keeps which it cannot carry out yet


class Keepers:
    """The servers that keep copies of a shard, and what each has confirmed.

    Attributes:
        shards: of the servers. places: where they are, those that are known.
    """

    def __init__(self, index: int, servers: int, replicas: int) -> None:
        self.shards = [(index + n) % servers for n in range(1, replicas + 1)]
        self.places: dict[int, str] = {}
        self._births: dict[int, int] = {}
        self._confirmed: dict[int, set[tuple[int, int | None]]] = {}

    def meet(self, partners: Partners) -> None:
        for shard in self.shards:
            if partners.places[shard]:
                self.places[shard] = partners.places[shard]
                self._births[shard] = partners.births[shard]

    def confirm(self, lease: int, sequence: int, birth: int) -> None:
        """The server of that birth holds all of a lease's update, made from that version."""
        self._confirmed.setdefault(lease, set()).add((sequence, birth))

    def hold(self, lease: int, sequence: int) -> bool:
        """Whether all do."""
        confirmed = self._confirmed.get(lease, set())
        return all((sequence, self._births.get(shard)) in confirmed for shard in self.shards)

    def forget(self, lease: int) -> None:
        self._confirmed.pop(lease, None)


class Backup:
    """A copy of another server's shard.

    Attributes:
        birth: of the server that it is a copy of, -1 where nobody is known.
        sequence: that it is of. is_whole: it has weights, those of the server.
        transfer: how they come.
    """

    def __init__(self, blueprint: Blueprint, index: int, servers: int) -> None:
        self.index = index
        self.shard = Shard(blueprint, index, servers)
        self.stage = Stage(blueprint, self.shard.pieces, read_codec(blueprint.codec))
        self.birth, self.sequence, self.is_whole = -1, -1, False
        self.transfer: Transfer | None = None
        self._orders: dict[int, Order] = {}
        self._is_late = False

    def follow(self, birth: int, whole: bool) -> None:
        """The server is of that birth; whole: it came from a copy, and is as its predecessor."""
        if birth == self.birth:
            return
        self.birth = birth
        self.is_whole = self.is_whole and whole
        self.transfer = None

    def fetch(self, own: int, number: int) -> Fetch | None:
        """What to ask the server, at an order: its shard, where that is not here."""
        if self.is_whole or self.transfer is not None or self.birth < 0:
            return None
        return self._ask(own, number)

    def tick(self, own: int, number: int, applied: int) -> Fetch | None:
        """What to ask the server, some time after this was called before; applied: the last order
        that was carried out where this copy is."""
        transfer, was_late = self.transfer, self._is_late
        self._is_late = self.is_whole and (self.lacks or self.sequence < applied)
        if self._is_late and was_late:
            self.is_whole = False  # what it needs to go on did not come
        if self.is_whole or self.birth < 0:
            return None
        if transfer is not None:
            transfer.tick()
        if transfer is not None and not transfer.is_stuck:
            return None
        return self._ask(own, number)

    def _ask(self, own: int, number: int) -> Fetch:
        fetch = Fetch(shard=self.index, birth=own, number=number)
        self.transfer = Transfer(fetch)
        return fetch

    @property
    def lacks(self) -> bool:
        """The next order is here, and an update that it needs is not."""
        order = self._orders.get(self.sequence + 1)
        return order is not None and any(self.stage.missing(lease) for lease, _ in order.leases)

    def install(self) -> None:
        """The transfer is whole."""
        assert self.transfer is not None
        self.transfer.install(self.shard, self.stage)
        self.sequence, self.is_whole = self.transfer.sequence, True
        self.transfer = None
        self._advance()

    def add(self, message: Copy) -> bool:
        """Take in a piece of an update; whether it was here before.

        Raises:
            Malformed: it is none of this shard.
        """
        known = message.piece not in self.stage.missing(message.lease)
        options = self.stage.read_options(message.options)
        values = self.stage.read(message.piece, message.pieces, message.tensors)
        fragment = self.stage.read_fragment(message.piece, message.fragment)
        bundle = Bundle(message.worker, message.sequence, options, fragment)
        self.stage.add(message.lease, message.piece, values, bundle, message.tensors, replaces=True)
        return known

    def tell(self, lease: int, own: int, *, asked: bool) -> Copied | None:
        """What there is to say of an update, where the weights are here: that it is whole, or,
        asked, what is missing."""
        if not self.is_whole or lease in self.stage.ended:
            return None
        missing = self.stage.missing(lease)
        if missing and not asked:
            return None
        sequence = self.stage.get(lease).sequence
        return Copied(shard=self.index, lease=lease, sequence=sequence, birth=own, missing=missing)

    def hear(self, sequence: int, order: Order) -> None:
        """An order, which is carried out as soon as it can be."""
        if self.is_whole and sequence <= self.sequence:
            return
        self._orders[sequence] = order
        while len(self._orders) > MOST_ORDERS:
            del self._orders[min(self._orders)]
        self._advance()

    def _advance(self) -> None:
        if not self.is_whole:
            return
        for sequence in [each for each in self._orders if each <= self.sequence]:
            del self._orders[sequence]
        while (order := self._orders.get(self.sequence + 1)) is not None:
            if any(self.stage.missing(lease) for lease, _ in order.leases):
                return
            for piece in range(len(self.shard.pieces)):
                carry_out(order, piece, self.shard, self.stage)
            for lease in order.ended:
                self.stage.end(lease)
            self.sequence += 1
            del self._orders[self.sequence]
