"""A server among those that keep copies of each other's shards. Sans I/O."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from allfuse.link.post import Malformed
from allfuse.roles.blueprint import Blueprint
from allfuse.roles.copies import Backup, Keepers
from allfuse.roles.messages import Copy, Fetch, Mail, Message, Part, Partners
from allfuse.roles.order import Order
from allfuse.roles.shard import Shard
from allfuse.roles.stage import Stage
from allfuse.roles.transfer import Transfer, nothing, parts_of

PATIENCE_S = 5.0  # without a word of those that may have a copy


class Own(NamedTuple):
    """The server's own shard. is_fixed: only orders change it."""

    shard: Shard
    stage: Stage
    sequence: int
    is_fixed: bool


class Ring:
    """What a server has to do with copies: those of its shard, those that it keeps, and the one
    that it may be made from.

    Attributes:
        keepers: who keeps copies of its shard.
        copies: of others' shards, by shard.
        places: of all servers, by shard; empty where they are not known.
        is_settled: it has a copy of its shard, or nobody has one. rescue: the one that it has.
    """

    def __init__(self, index: int, servers: int, birth: int, replicas: int) -> None:
        self.index, self.servers, self.birth, self.replicas = index, servers, birth, replicas
        self.keepers = Keepers(index, servers, replicas)
        self.copies: dict[int, Backup] = {}
        self.places: list[str] = [""] * servers
        self.is_settled = replicas == 0
        self.rescue: Transfer | None = None
        self._rescues: dict[int, Transfer] = {}
        self._moved_s: float | None = None
        self._number = 0
        self._asked: dict[str, Fetch] = {}  # who waits for the own shard
        self._waiting: set[int] = set()  # leases that not all copies hold

    def begin(self, blueprint: Blueprint) -> None:
        """It is known what servers hold."""
        self.is_settled, self.rescue = True, None
        self._rescues.clear()
        for n in range(1, self.replicas + 1):
            shard = (self.index - n) % self.servers
            self.copies[shard] = Backup(blueprint, shard, self.servers)

    # What comes.

    def meet(self, message: Partners) -> Iterator[Mail]:
        """Hear where the others are.

        Raises:
            Malformed: it is not said of all.
        """
        told = (message.places, message.births, message.whole)
        if any(len(each) != self.servers for each in told):
            raise Malformed(f"partners of {len(message.places)} servers; there are {self.servers}")
        self.places = message.places
        self.keepers.meet(message)
        for shard, copy in self.copies.items():
            copy.follow(message.births[shard], message.whole[shard])
        if not self.is_settled:
            yield from self._ask_for_copies()

    def handle(self, sender: str, message: Message, own: Own | None) -> Iterator[Mail]:
        """What there is to say to another server.

        Raises:
            Malformed: it is not what this one takes.
        """
        match message:
            case Copy(shard=shard) if shard in self.copies:
                asked = self.copies[shard].add(message)
                told = self.copies[shard].tell(message.lease, self.birth, asked=asked)
                if told is not None:
                    yield sender, told
            case Fetch():
                yield from self._give(sender, message, own)
            case Part(shard=self.index):
                self._take_rescue(message)
            case Part(shard=shard) if shard in self.copies:
                yield from self._take_part(sender, message, self.copies[shard])
            case Copy() | Part() if own is None:
                return  # it is not known yet what this server keeps
            case _:
                raise Malformed(f"a {message.kind} from {sender}, of a shard that is not kept here")

    def hear(self, sequence: int, order: Order) -> Iterator[Mail]:
        """An order, for all copies."""
        for copy in self.copies.values():
            copy.hear(sequence, order)
            fetch = copy.fetch(self.birth, self._next())
            if fetch is not None:
                yield self.places[copy.index], fetch

    def tick(self, now_s: float, applied: int) -> Iterator[Mail]:
        """Every second or two. applied: the last order that the server carried out."""
        if not self.is_settled and self._rescues:
            for each in self._rescues.values():
                each.tick()
            if self._moved_s is None or not all(each.is_stuck for each in self._rescues.values()):
                self._moved_s = now_s
            self.is_settled = now_s - self._moved_s > PATIENCE_S
        for copy in self.copies.values():
            fetch = copy.tick(self.birth, self._next(), applied)
            if fetch is not None:
                yield self.places[copy.index], fetch

    def _next(self) -> int:
        self._number += 1
        return self._number

    # The own shard, elsewhere.

    def pass_on(self, lease: int, piece: int, stage: Stage) -> Iterator[Mail]:
        """A piece of an update, to all that keep copies."""
        bundle = stage.get(lease)
        message = Copy(
            shard=self.index,
            worker=bundle.sender,
            lease=lease,
            sequence=bundle.sequence,
            piece=piece,
            pieces=len(stage.pieces),
            options=[dict(changed) for changed in bundle.options],
            fragment=bundle.fragment,
            tensors=bundle.came[piece],
        )
        for place in self.keepers.places.values():
            yield place, message

    def remind(self, stage: Stage) -> Iterator[Mail]:
        """Those that did not say that they hold an update hear a piece of it again, and say what
        they lack. To be asked for every second or two."""
        waiting = {
            lease
            for lease, bundle in stage.held()
            if not stage.missing(lease) and not self.keepers.hold(lease, bundle.sequence)
        }
        for lease in sorted(waiting & self._waiting):
            yield from self.pass_on(lease, min(stage.get(lease).came), stage)
        self._waiting = waiting

    def answer_all(self, own: Own | None) -> Iterator[Mail]:
        """Those who asked for the own shard before it was fixed."""
        if own is not None and own.is_fixed:
            asked, self._asked = self._asked, {}
            for sender, fetch in asked.items():
                yield from self._give(sender, fetch, own)

    def _give(self, sender: str, fetch: Fetch, own: Own | None) -> Iterator[Mail]:
        copy, answer = self.copies.get(fetch.shard), [self.birth, self._next()]
        if fetch.shard == self.index:
            if own is None or not own.is_fixed:
                self._asked[sender] = fetch
                return
            parts = parts_of(fetch, answer, own.sequence, own.shard, own.stage)
        elif copy is not None and copy.is_whole and not copy.lacks:
            parts = parts_of(fetch, answer, copy.sequence, copy.shard, copy.stage)
        else:
            parts = iter([nothing(fetch, answer)])
        for part in parts:
            yield sender, part

    # Others' shards.

    def _take_part(self, sender: str, message: Part, copy: Backup) -> Iterator[Mail]:
        if copy.transfer is None:
            return
        copy.transfer.take(message)
        if copy.transfer.is_whole:
            copy.install()
            for lease, _ in copy.stage.held():
                told = copy.tell(lease, self.birth, asked=False)
                if told is not None:
                    yield sender, told

    # What this server is made from.

    def _ask_for_copies(self) -> Iterator[Mail]:
        for shard, place in self.keepers.places.items():
            before = self._rescues.get(shard)
            if before is None or (before.is_stuck and not before.refused):
                fetch = Fetch(shard=self.index, birth=self.birth, number=self._next())
                self._rescues[shard] = Transfer(fetch)
                yield place, fetch

    def _take_rescue(self, message: Part) -> None:
        for transfer in self._rescues.values():
            transfer.take(message)
            if transfer.is_whole and not self.is_settled:
                self.rescue, self.is_settled = transfer, True
        refused = [transfer.refused for transfer in self._rescues.values()]
        if len(refused) == len(self.keepers.shards) and all(refused):
            self.is_settled = True
