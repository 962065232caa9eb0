"""What the scheduler keeps of workers, servers, leases and orders: a row of the book each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple

from allfuse.roles.ledger import Unit


class Offer(NamedTuple):
    """Weights to begin a lease with. updates: how many are in them. low: the slowest clock."""

    sequence: int
    updates: int
    low: int


class Presence(StrEnum):
    """Where a worker stands."""

    HERE = "here"
    FINAL = "final"  # was told that there is no more work
    GONE = "gone"  # took its leave
    LOST = "lost"


@dataclass
class Worker:
    """A worker. number: in the order of joining. held: the version of the weights that it was told
    last. base: those it last worked from, None where that is not known. lease: what it works on,
    None while it waits. heard_s: when it last spoke."""

    name: str
    number: int
    host: str = ""
    presence: Presence = Presence.HERE
    held: int = -1
    base: Offer | None = None
    lease: int | None = None
    heard_s: float = 0.0

    @property
    def is_alive(self) -> bool:
        return self.presence in (Presence.HERE, Presence.FINAL)

    @property
    def rank(self) -> tuple[int, str]:
        """By name, w2 before w10: the order does not depend on who came first."""
        return len(self.name), self.name


@dataclass
class Server:
    """A server. found: the version that it was told to count as. applied: that it is known to be
    of. is_up: its connection stands. asked_s: when it was last sent orders. whole: it was made from
    a copy of its shard, and is as the one before it. born: the last order when it came."""

    name: str
    shard: int
    birth: int
    place: str
    found: int = -1
    applied: int = -1
    is_up: bool = True
    asked_s: float = 0.0
    whole: bool = False
    born: int = -1


class Rebirth(NamedTuple):
    """A server that took the place of one that was lost. sequence: of the weights that it came
    with, -1 for none. born: the last order then, from which on its shard is of those weights.
    whole: they came from a copy, and so did all that was ordered since."""

    shard: int
    sequence: int
    born: int
    whole: bool


class State(StrEnum):
    """Of a lease."""

    OUT = "out"
    STAGED = "staged"  # its update is on all servers
    COMMITTED = "committed"  # its update is ordered
    REVOKED = "revoked"  # can never be ordered; servers are still to forget it
    DROPPED = "dropped"  # servers were told to


@dataclass(frozen=True)
class Result:
    """What a worker said when it brought an update; `Finished` explains the fields."""

    sequence: int
    births: list[int]
    loss: float
    count: float
    rows: int
    seconds: float
    options: list[dict[str, Any]]


@dataclass
class Work:
    """A lease. offers: weights to begin with, whichever come. due: what is to be done before.
    since_s: from when on its worker could have worked on it."""

    lease: int
    worker: str
    clock: int
    unit: Unit
    offers: list[Offer]
    due: list[str] = field(default_factory=list)
    state: State = State.OUT
    result: Result | None = None
    since_s: float | None = None

    def offered(self, sequence: int) -> Offer | None:
        return next((offer for offer in self.offers if offer.sequence == sequence), None)


@dataclass(frozen=True)
class Order:
    """What all servers do next. leases: whose updates, with their weights, in the order of summing.
    to: workers that get the weights of the version that comes of it. dropped: leases to forget.
    save: servers write their shards to disk. updates: how many there were in all, this included.
    factor: of the sum of gradients, below 1 where it is clipped. of: the fragment of the weights
    that some of those workers get; the others get all."""

    sequence: int
    updates: int
    leases: list[tuple[int, float]]
    to: list[str]
    dropped: list[int]
    save: bool
    factor: float = 1.0
    of: Mapping[str, int] = field(default_factory=dict)

    @property
    def readers(self) -> list[str | list[Any]]:
        """Who gets the weights: a name, or a name and a fragment."""
        return [[name, self.of[name]] if name in self.of else name for name in self.to]

    @property
    def plain(self) -> list[Any]:
        entry = [[list(each) for each in self.leases], self.readers, self.dropped, self.save]
        return entry if self.factor == 1.0 else [*entry, self.factor]


def split_readers(readers: Sequence[Any]) -> tuple[list[str], dict[str, int]]:
    """The names, and the fragments of those who get one, of what `Order.readers` gives."""
    of = {each[0]: each[1] for each in readers if not isinstance(each, str)}
    return [each if isinstance(each, str) else each[0] for each in readers], of


class Commit(NamedTuple):
    """An update that was ordered, for the record. place: in its order. read: the version of the
    weights that it was made from. missed, lag: as in `Staleness`."""

    sequence: int
    place: int
    lease: int
    weight: float
    read: int
    missed: int
    lag: int
