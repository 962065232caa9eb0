"""What workers and servers tell the scheduler. `messages` draws the course of a clock."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from allfuse.roles.message import Message


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
    heard `Found`. settled: it has asked for copies of its shard (see `Partners`), where there may
    be some. whole: it has one, with all that was staged: it can carry out every later order.
    """

    kind: ClassVar[str] = "serve"
    index: int
    birth: int
    applied: int
    place: str
    found: bool = False
    settled: bool = True
    whole: bool = False


@dataclass(frozen=True, kw_only=True)
class Applied(Message):
    """A server has carried out all orders up to a sequence.

    saved: the last one on its disk. failed: the last one that it could not write there, and why.
    """

    kind: ClassVar[str] = "applied"
    sequence: int
    saved: int | None = None
    failed: int = -1
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Measured(Message):
    """A server's answer to `Measure`. square: of the norm of the shard's sum."""

    kind: ClassVar[str] = "measured"
    leases: list[list[Any]]
    birth: int
    square: float
