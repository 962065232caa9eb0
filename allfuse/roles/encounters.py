"""What workers that gossip say to each other, and to the scheduler about it.

Each has a desk of its own. One exchange, asked for by worker i (the *visitor*) of worker j (the
*host*), for weights of B bytes:

      visitor i                          host j
        |--- Parcel("offer", x_i) -------> |    B bytes; i trains on
        |<-- Received("offer") ----------- |    all pieces are here
        |                                  |    between two of its steps: d = (x_i - x_j) / 2
        |<-- Parcel("answer", d) --------- |    x_j += d                      B bytes
        |--- Received("answer") ---------> |    between two of i's steps: x_i -= d

Nobody waits: a host that cannot answer says `Declined`, and what is not answered is asked for again
by `Query`, whose answer is the pieces that are missing. Every message may come twice, late or
never. The sum of all weights, what is on its way included, is the same before and after.

Under a codec the two keep a copy of x_i as it is known to both (public.py). An offer says then what
x_i is ahead of the copy that their last exchange left, and d is taken from the copy; both are
encoded, and both workers apply what comes out of d. A host that has no such copy declines, and
says so: the next offer is of plain weights, as the first one is.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from allfuse.link.post import Malformed
from allfuse.roles.message import Message

OFFER, LAST = "offer", "last"  # parcels of visitors
ANSWER, COPY, MEAN = "answer", "copy", "mean"  # parcels of hosts
OF_VISITORS = (OFFER, LAST)
OF_HOSTS = (ANSWER, COPY, MEAN)
ANSWERS = {OFFER: ANSWER, LAST: MEAN, COPY: COPY}
"""What a host gives for what it is asked."""


@dataclass(frozen=True, kw_only=True)
class Parcel(Message):
    """A piece of weights, or of a difference.

    content: "offer", to be met half way; "last", to be averaged at the end; "answer" to an offer;
    "copy", for one who has no weights; "mean" of all at the end. number: of the visitor's question,
    counted up by each visitor. base: of what is encoded, the exchange that left the copy which the
    offer is ahead of; -1 of plain values. logs: with the first piece, what the sender has done that
    is not in the scheduler's book yet, as in `Log`.
    """

    kind: ClassVar[str] = "parcel"
    content: str
    number: int
    piece: int
    pieces: int
    base: int = -1
    logs: list[list[Any]] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Received(Message):
    """Of a parcel all pieces are here but these: in answer to the last one, and to `Query`."""

    kind: ClassVar[str] = "received"
    content: str
    number: int
    missing: list[int] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Query(Message):
    """What of a parcel has come? A visitor asks until its question is answered."""

    kind: ClassVar[str] = "query"
    content: str
    number: int


@dataclass(frozen=True, kw_only=True)
class Want(Message):
    """A visitor without weights asks for a copy, until it has it."""

    kind: ClassVar[str] = "want"
    number: int


@dataclass(frozen=True, kw_only=True)
class Declined(Message):
    """A host has an offer of its own out, or has given its last weights. Nothing has changed.

    lacks: it has no copy of what the offer is ahead of.
    """

    kind: ClassVar[str] = "declined"
    number: int
    lacks: bool = False


@dataclass(frozen=True, kw_only=True)
class Peers(Message):
    """From the scheduler: who has weights, as [name, number, place] in the order of joining.

    collector: the name of the one that averages the weights of all at the end; empty until then.
    version: of what is said here, counted up.
    """

    kind: ClassVar[str] = "peers"
    peers: list[list[Any]]
    collector: str = ""
    version: int = 0


@dataclass(frozen=True, kw_only=True)
class Log(Message):
    """To the scheduler, for its book: what workers did, as [worker, place of the first in its log,
    entries]. Answered by `Logged`."""

    kind: ClassVar[str] = "log"
    logs: list[list[Any]]


@dataclass(frozen=True, kw_only=True)
class Logged(Message):
    """From the scheduler: so many entries of the receiver's own log are in the book."""

    kind: ClassVar[str] = "logged"
    count: int


ENCOUNTERS: tuple[type[Message], ...] = (
    Parcel,
    Received,
    Query,
    Want,
    Declined,
    Peers,
    Log,
    Logged,
)


def is_of_host(message: Message) -> bool:
    """Whether it answers this worker's own question; else it is one of another worker."""
    match message:
        case Parcel(content=content) | Query(content=content):
            return content in OF_HOSTS
        case Received(content=content):
            return content not in OF_HOSTS
        case Declined():
            return True
        case Want():
            return False
    raise Malformed(f"a {message.kind} from another worker")
