"""What servers that keep copies of each other's shards send each other."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from allfuse.roles.message import Message


@dataclass(frozen=True, kw_only=True)
class Copy(Message):
    """A piece of an update, to one that keeps a copy of the shard: what `worker` pushed, as it
    came; the other fields are those of `Push`."""

    kind: ClassVar[str] = "copy"
    shard: int
    worker: str
    lease: int
    sequence: int
    piece: int
    pieces: int
    options: list[dict[str, Any]]
    fragment: int = -1


@dataclass(frozen=True, kw_only=True)
class Copied(Message):
    """A copy of the shard holds all pieces of an update but these. birth: of the server that says
    so. sequence: the version that the update was made from.

    It is said when the last one came, and in answer to what comes twice.
    """

    kind: ClassVar[str] = "copied"
    shard: int
    lease: int
    sequence: int
    birth: int
    missing: list[int] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Fetch(Message):
    """Give me all of a shard. birth: of the one who asks. number: counts what it asks."""

    kind: ClassVar[str] = "fetch"
    shard: int
    birth: int
    number: int


@dataclass(frozen=True, kw_only=True)
class Part(Message):
    """One of all parts of a shard, to the one who asked with that birth and number; parts: 0 where
    there is nothing to give.

    answer: birth of who gives it, and its count of what it gave: only parts of one answer belong
    together. sequence: that the weights are of. lease -1: weights and states of a piece, by names;
    with the first part, ended: runs of leases of which nothing is kept. Else a piece of an update
    that was staged: worker and read are sender and sequence of its `Push`, options and fragment
    what it said.
    """

    kind: ClassVar[str] = "part"
    shard: int
    birth: int
    number: int
    answer: list[int]
    sequence: int
    part: int
    parts: int
    piece: int
    lease: int
    names: list[str] = field(default_factory=list)
    ended: list[list[int]] = field(default_factory=list)
    worker: str = ""
    read: int = -1
    options: list[dict[str, Any]] = field(default_factory=list)
    fragment: int = -1


COPYING: tuple[type[Message], ...] = (Copy, Copied, Fetch, Part)
