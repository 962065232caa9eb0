"""The one tree of errors.

Every message says what happened, what was received, what is allowed and what to do next.
`exit_code` is what the command line ends with: 2 for bad input, 130 for an interrupt, else 1.

    AllfuseError
    ├── UserError            bad input
    │   ├── PlanError        a plan that has no meaning: given, why not, the nearest that can
    │   ├── JobError         the job file or its arguments
    │   ├── DataError        the samples or rows
    │   ├── RunError         the run folder: exists already, another job, nothing to resume
    │   └── MergeError       models on disk that cannot be read, or not be fused with each other
    ├── CheckpointError      a checkpoint that cannot be written or read
    ├── NonFiniteLoss        the loss became NaN or infinite
    ├── DistributedError     names rank, peer, operation, step, seconds
    │   ├── PeerLost         a peer died, left or stayed silent past the deadline
    │   └── BadMessage       a peer sent something else than was agreed
    ├── WorkerFailed         a worker process ended with an error of its own
    └── Interrupted          Ctrl-C, after the checkpoint was saved
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class AllfuseError(Exception):
    """Root of all errors that allfuse raises on purpose.

    `tells_where` says that its text has rank and step, whichever rank it comes from.
    """

    exit_code = 1
    tells_where = False


class UserError(AllfuseError):
    """Bad input. One clear message, exit code 2, nothing half-written."""

    exit_code = 2


class PlanError(UserError):
    """A plan that cannot be.

    Args:
        given: the plan or the part of it that was received.
        why: why it has no meaning.
        nearest: the nearest plan that can be.
        allowed: what is allowed there, where no plan is nearer than others.
    """

    def __init__(self, given: str, why: str, nearest: str = "", allowed: str = "") -> None:
        what = f"allowed: {allowed}" if allowed else f"nearest that can: {nearest}"
        super().__init__(f"{given}: {why}; {what}")
        self.given, self.why, self.nearest, self.allowed = given, why, nearest, allowed

    def __reduce__(self) -> tuple[type[PlanError], tuple[str, str, str, str]]:
        return type(self), (self.given, self.why, self.nearest, self.allowed)


class JobError(UserError):
    """The job file, the job it returns, or its arguments are not usable."""


class DataError(UserError):
    """Samples or rows that cannot be used; names the sample or the row."""


class RunError(UserError):
    """The run folder does not fit what is asked of it."""


class MergeError(UserError):
    """Models on disk that cannot be read, or not fused with each other; names file and tensor."""


class CheckpointError(AllfuseError):
    """A checkpoint could not be written, or none can be read."""


class NonFiniteLoss(AllfuseError):
    """The loss became NaN or infinite; names step and rank."""

    tells_where = True


class WorkerFailed(AllfuseError):
    """A worker process failed. Carries the traceback of the first one that did.

    Args:
        message: what happened, with the worker's rank and step.
        rank: the rank that failed first.
        trace: that worker's traceback as text, empty when it was killed.
        exit_code: what the command line should end with.
    """

    def __init__(self, message: str, rank: int, trace: str = "", exit_code: int = 1) -> None:
        super().__init__(message)
        self.rank, self.trace, self.exit_code = rank, trace, exit_code


class Interrupted(AllfuseError):
    """Ctrl-C or a stop signal, after a checkpoint was saved where there is a run folder."""

    exit_code = 130


class DistributedError(AllfuseError):
    """An operation between ranks failed.

    Args:
        reason: what was seen.
        rank: the rank that noticed, counted over the whole plan.
        peer: the rank that it waited for, None when it cannot be told.
        operation: what was being done, for example "fuse gradients, bucket 2".
        step: the optimizer step, None before the first.
        seconds: how long was waited.
    """

    def __init__(
        self,
        reason: str,
        *,
        rank: int,
        peer: int | None,
        operation: str,
        step: int | None,
        seconds: float,
    ) -> None:
        who = "a peer" if peer is None else f"rank {peer}"
        at = "before the first step" if step is None else f"at step {step}"
        super().__init__(
            f"rank {rank} lost {who} in {operation} {at} after {seconds:.1f} s: {reason}"
        )
        self.reason, self.rank, self.peer = reason, rank, peer
        self.operation, self.step, self.seconds = operation, step, seconds


class PeerLost(DistributedError):
    """A peer died, left, or stayed silent past the deadline."""


class BadMessage(DistributedError):
    """A peer sent something else than what was agreed."""


def nearest(word: str, allowed: Iterable[str]) -> str:
    """A hint such as "; did you mean 'lr'?", or "" when nothing is near.

    >>> nearest("rin", ["ring", "tree"])
    "; did you mean 'ring'?"
    """
    found = difflib.get_close_matches(word, list(allowed), n=1, cutoff=0.5)
    return f"; did you mean {found[0]!r}?" if found else ""
