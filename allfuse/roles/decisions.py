"""What the scheduler tells workers and servers. `messages` draws the course of a clock."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from allfuse.roles.message import Message


@dataclass(frozen=True, kw_only=True)
class About(Message):
    """What the job is. plan: its text. about: what the first worker's facts say of it; empty where
    none has come yet, who is to be waited for."""

    kind: ClassVar[str] = "about"
    plan: str
    about: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Welcome(Message):
    """To a worker: its number, the servers in the order of their shards.

    gives_weights: this worker brings the servers weights, its newest: all pieces to all servers,
    which keep them where they have none. Comes again when places change, or a server has lost all.
    """

    kind: ClassVar[str] = "welcome"
    number: int
    places: list[str]
    gives_weights: bool


@dataclass(frozen=True, kw_only=True)
class Refused(Message):
    """To one that may not take part, and why."""

    kind: ClassVar[str] = "refused"
    reason: str


@dataclass(frozen=True, kw_only=True)
class Lease(Message):
    """Work for one clock of a worker: some steps' part of the batch.

    lease: unique in a run, -1 when there is no more work. clock: the worker's own count, or that of
    all where they are in step. first_step: of the run, counted from 0. part, parts: which share of
    each batch. sequence: the version of the weights to begin with, which the servers send; -1 where
    none come: at the end of a job that failed, or has not begun. done: batches learned by all.
    fragment: of the weights, that the update is to be of. takes: that the worker takes in before it
    begins, of the version; -1 is all. Servers send that, and all where something is due. follows:
    the last lease of this worker that was ordered, where there are fragments: what came of later
    ones is forgotten.
    due: what falls to this worker before it begins: "evaluate", "save", and at the end "finish".
    notes: states that were handed in, where something is due and at the end. reason: why there is
    no more work. failed: it is an error. loss: at the end, the mean over the newest batches that
    had samples, of all that is known of them; None where there is none.
    """

    kind: ClassVar[str] = "lease"
    lease: int
    clock: int
    first_step: int
    steps: int
    part: int
    parts: int
    sequence: int
    done: int
    fragment: int = -1
    takes: int = -1
    follows: int = -1
    due: list[str] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)
    reason: str = ""
    failed: bool = False
    loss: float | None = None


@dataclass(frozen=True, kw_only=True)
class Repush(Message):
    """A server lost what it held of a lease that is not ordered yet: push it again, to all (who
    holds it says so at once), then say `Finished` again. places: where the servers are now."""

    kind: ClassVar[str] = "repush"
    lease: int
    places: list[str]


@dataclass(frozen=True, kw_only=True)
class Orders(Message):
    """To servers: what to do next, in order.

    first: the sequence of the first entry. entries: each [[lease, weight] ..., workers who get the
    weights of this sequence (a name, or a name and the fragment that it gets), leases to forget,
    whether to write the shard to disk], and at the end the factor that shortens the sum of
    gradients, where it is clipped. Answered by `Applied`; those that a server is past are nothing
    new to it.
    """

    kind: ClassVar[str] = "orders"
    first: int
    entries: list[list[Any]]


@dataclass(frozen=True, kw_only=True)
class Measure(Message):
    """To servers: how long is the weighted sum of these gradients? leases: each [lease, weight].
    Answered by `Measured`, or by nobody who does not hold them all."""

    kind: ClassVar[str] = "measure"
    leases: list[list[Any]]


@dataclass(frozen=True, kw_only=True)
class Partners(Message):
    """To servers that keep copies of each other's shards: where each was last, by its shard, and
    its birth; empty and -1 where there was none. whole: those that were made from a copy, as
    `Serve` says."""

    kind: ClassVar[str] = "partners"
    places: list[str]
    births: list[int]
    whole: list[bool]


@dataclass(frozen=True, kw_only=True)
class Found(Message):
    """To a server, in answer to `Serve`: the blueprint, so that it can make its shard.

    sequence: what it is to count as being of. Where it is of an earlier one, updates were lost.
    born: the last order when it came. What workers were sent by orders up to there, and hold, it
    cannot know.
    """

    kind: ClassVar[str] = "found"
    blueprint: dict[str, Any]
    servers: int
    sequence: int
    born: int = -1
