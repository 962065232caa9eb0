"""What workers, servers and the scheduler say to each other.

One dataclass for each message; its fields are plain values, checked when a letter is opened. The
course of one clock:

      worker                     servers                     scheduler
        |                           |                            |
        |<-- Lease(sequence=n) ---------------------------------- |   what to work on, and
        |<-- Weights(sequence=n) -- |                             |   with weights of which version
     computes                       |                             |
        |--- Push(lease) ---------> |                             |   a piece of the update
        |<-- Staged(lease) -------- |                             |   all pieces are here
        |--- Finished(lease) ------------------------------------>|   on all servers
        |                           |<-- Orders(n + 1, ...) ----- |   written to the book first
        |<-- Lease(sequence=n+1) -------------------------------- |
        |<-- Weights(sequence=n+1)--|                             |

An update is ordered only when all servers hold it, and servers carry out orders by their sequence,
each once: it is applied on all servers or none, and sequence n names one version of all weights.
Whoever hears nothing says its last message again; every message may come twice, late, or never.

The first order has no leases: it only sends the weights that were given, and names their version 0.
Where updates are fused in step, several leases of one block may fall to one worker, and a lease may
name the version that its worker holds already: then no weights come, and the worker goes back to
those. It keeps what it pushed until a lease of a later clock comes.
"""

from __future__ import annotations

import types
import typing
from dataclasses import dataclass, field, fields
from functools import lru_cache
from typing import Any, ClassVar, TypeAlias

from allfuse.link.post import Letter, Malformed
from allfuse.roles.encounters import ENCOUNTERS
from allfuse.roles.message import Message as Message

SCHEDULER = "scheduler"
"""Its name among those that it sends to; no worker may have it."""


# To the scheduler.


@dataclass(frozen=True, kw_only=True)
class Join(Message):
    """A worker comes, or comes again under the name it had.

    name: the sender's own. fingerprint: of job, data and model; those of all workers are equal.
    host: where it runs. steps_per_epoch: of the job's batches. steps, epochs: limits.
    blueprint: as `Blueprint.plain`, what servers hold. facts: what the run folder records, of the
    first worker; `evaluate_every` and `save_every`, in steps or "epoch", make work fall due.
    place: where others find it, where workers gossip.
    clip: largest norm of the gradient that all workers together make, where they are in step.
    """

    kind: ClassVar[str] = "join"
    name: str
    host: str
    fingerprint: str
    steps_per_epoch: int
    steps: int | None
    epochs: int | None
    blueprint: dict[str, Any]
    facts: dict[str, Any] = field(default_factory=dict)
    clip: float | None = None
    place: str = ""


@dataclass(frozen=True, kw_only=True)
class Hello(Message):
    """One who may join asks what the job is. Answered by `About`."""

    kind: ClassVar[str] = "hello"


@dataclass(frozen=True, kw_only=True)
class Finished(Message):
    """A worker has brought the update of a lease to all servers, and asks for more work.

    lease: -1 where it has given the first weights. sequence: the version that it was made from, of
    those that were offered for the lease. births: of the servers that hold it, by shard, as they
    said in `Staged`. loss: sum of the losses. count: what their mean is over. rows: samples.
    options: as in `Push`, for the record. logs: as in `Log`, where workers gossip.
    """

    kind: ClassVar[str] = "finished"
    lease: int
    sequence: int
    births: list[int]
    loss: float
    count: float
    rows: int
    seconds: float
    options: list[dict[str, Any]] = field(default_factory=list)
    logs: list[list[Any]] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Again(Message):
    """Something did not come.

    With the sequence of a lease that did: its weights; the lease comes again with those of a new
    sequence. Without: whatever it is; the answer is `Welcome` and the lease that is out, if any.
    """

    kind: ClassVar[str] = "again"
    lease: int | None = None
    sequence: int | None = None


@dataclass(frozen=True, kw_only=True)
class Beat(Message):
    """Still here. The scheduler's process answers with the same: a worker may wait for another one
    longer than it would for a scheduler that is gone."""

    kind: ClassVar[str] = "beat"


@dataclass(frozen=True, kw_only=True)
class Leave(Message):
    """A worker goes; what it holds may be given to others."""

    kind: ClassVar[str] = "leave"


@dataclass(frozen=True, kw_only=True)
class Stop(Message):
    """Hand out no more work."""

    kind: ClassVar[str] = "stop"
    reason: str


@dataclass(frozen=True, kw_only=True)
class Note(Message):
    """State that passes from worker to worker, such as the best evaluation so far.

    done: of the lease that it was made with; a note never replaces one of more.
    """

    kind: ClassVar[str] = "note"
    name: str
    done: int
    state: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Save(Message):
    """A piece of what a worker has of a checkpoint: all that servers do not hold.

    sequence: the version of the weights that it worked from last. done: of the lease that it was
    made with. score: of those weights, higher is better. content: with the first piece, what it is.
    """

    kind: ClassVar[str] = "save"
    sequence: int
    done: int
    score: float | None
    piece: int
    pieces: int
    content: str


@dataclass(frozen=True, kw_only=True)
class Tell(Message):
    """An event of a worker, for those who watch the run."""

    kind: ClassVar[str] = "tell"
    event: str
    data: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Serve(Message):
    """A server is ready.

    index: which shard it holds. birth: random, new whenever its process is. applied: the sequence
    that its shard is of; -1 before it has any weights. place: where workers find it. found: it has
    heard `Found`.
    """

    kind: ClassVar[str] = "serve"
    index: int
    birth: int
    applied: int
    place: str
    found: bool = False


@dataclass(frozen=True, kw_only=True)
class Applied(Message):
    """A server has carried out all orders up to a sequence. saved: the last one on its disk."""

    kind: ClassVar[str] = "applied"
    sequence: int
    saved: int | None = None


@dataclass(frozen=True, kw_only=True)
class Measured(Message):
    """A server's answer to `Measure`. square: of the norm of the shard's sum."""

    kind: ClassVar[str] = "measured"
    leases: list[list[Any]]
    birth: int
    square: float


# From the scheduler.


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
    due: what falls to this worker before it begins: "evaluate", "save", and at the end "finish".
    notes: states that were handed in, where something is due and at the end. reason: why there is
    no more work. failed: it is an error.
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
    due: list[str] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)
    reason: str = ""
    failed: bool = False


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
    weights of this sequence, leases to forget, whether to write the shard to disk], and at the end
    the factor that shortens the sum of gradients, where it is clipped. Answered by `Applied`; those
    that a server is past are nothing new to it.
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
class Found(Message):
    """To a server, in answer to `Serve`: the blueprint, so that it can make its shard.

    sequence: what it is to count as being of. Where it is of an earlier one, updates were lost.
    """

    kind: ClassVar[str] = "found"
    blueprint: dict[str, Any]
    servers: int
    sequence: int


# Between workers and servers.


@dataclass(frozen=True, kw_only=True)
class Give(Message):
    """The first weights of a shard, in pieces, by the worker that the scheduler chose."""

    kind: ClassVar[str] = "give"
    piece: int
    pieces: int


@dataclass(frozen=True, kw_only=True)
class Push(Message):
    """A piece of an update's shard, as values or encoded.

    sequence: the version that it was made from. options: those of the optimizer that changed, by
    group.
    """

    kind: ClassVar[str] = "push"
    lease: int
    sequence: int
    piece: int
    pieces: int
    options: list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Ask(Message):
    """To a server that did not say `Staged`: what does it lack? lease -1: of the first weights."""

    kind: ClassVar[str] = "ask"
    lease: int


@dataclass(frozen=True, kw_only=True)
class Staged(Message):
    """A server holds all pieces but these; lease -1: of the first weights.

    It is said when the last one came, and in answer to what comes twice and to `Ask`.
    """

    kind: ClassVar[str] = "staged"
    lease: int
    birth: int
    missing: list[int] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Weights(Message):
    """A piece of a shard's weights of one version.

    base: the version to which the encoded differences are to be added; -1 where they are weights.
    """

    kind: ClassVar[str] = "weights"
    sequence: int
    piece: int
    pieces: int
    base: int = -1


MESSAGES: dict[str, type[Message]] = {
    cls.kind: cls
    for cls in (
        Join,
        Hello,
        Finished,
        Again,
        Beat,
        Leave,
        Stop,
        Note,
        Save,
        Tell,
        Serve,
        Applied,
        Measured,
        About,
        Welcome,
        Refused,
        Lease,
        Repush,
        Orders,
        Measure,
        Found,
        Give,
        Push,
        Ask,
        Staged,
        Weights,
    )
} | {cls.kind: cls for cls in ENCOUNTERS}

Mail: TypeAlias = tuple[str, Message]
"""A receiver and what it is told."""


def open_letter(letter: Letter) -> Message:
    """The message in a letter.

    Raises:
        Malformed: there is no such message, or its fields are not what they should be.
    """
    cls = MESSAGES.get(letter.kind)
    if cls is None:
        raise Malformed(f"a message of kind {letter.kind!r}")
    hints = _hints(letter.kind)
    if letter.fields.keys() != hints.keys():
        raise Malformed(f"a {letter.kind} with fields {sorted(letter.fields)}")
    for name, value in letter.fields.items():
        if not _fits(value, hints[name]):
            raise Malformed(f"a {letter.kind} whose {name} is a {type(value).__name__}")
    return cls(tensors=letter.tensors, **letter.fields)


@lru_cache
def _hints(kind: str) -> dict[str, Any]:
    """What each field of a message may be."""
    cls = MESSAGES[kind]
    hints = typing.get_type_hints(cls)
    return {spec.name: hints[spec.name] for spec in fields(cls) if spec.name != "tensors"}


def _fits(value: object, hint: Any) -> bool:
    """Whether a plain value is of the kind that a field says."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return any(_fits(value, each) for each in inner)
    if origin is list:
        return isinstance(value, list) and all(_fits(each, inner[0]) for each in value)
    if origin is dict:
        return isinstance(value, dict) and all(isinstance(key, str) for key in value)
    if hint is Any:
        return True
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)
