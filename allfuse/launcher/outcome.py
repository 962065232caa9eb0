"""How workers ended, and what their launcher makes of it."""

from __future__ import annotations

import pickle
import signal
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from allfuse.base.errors import AllfuseError, Interrupted, PeerLost, UserError, WorkerFailed


@dataclass(frozen=True, kw_only=True)
class Failure:
    """An exception of a worker as plain values: those of users need not be picklable.

    `expected` says that allfuse raised it on purpose; `error` is then the pickled error, where that
    is possible. `peer`: the rank that is lost. `tells_where`: the text has rank and step, which
    need not be those of this worker.
    """

    type: str
    text: str
    trace: str
    expected: bool
    peer_lost: bool
    exit_code: int
    step: int | None
    error: bytes | None = None
    peer: int | None = None
    tells_where: bool = False

    @property
    def was_stopped(self) -> bool:
        """Whether it ended because it was asked to, by whatever exception."""
        return self.exit_code == Interrupted.exit_code


def describe_failure(error: BaseException, step: int | None) -> Failure:
    """What a worker reports of the exception that ended it, at this optimizer step."""
    expected, text, exit_code, packed = isinstance(error, AllfuseError), safe_text(error), 1, None
    if isinstance(error, AllfuseError):
        exit_code = error.exit_code
        packed = _pack_error(error)
    elif isinstance(error, SystemExit):
        exit_code = _exit_code_of(error)
        text = f"the function called exit({text})"
    elif isinstance(error, KeyboardInterrupt):
        exit_code, text = Interrupted.exit_code, text or "interrupted"
    return Failure(
        type=type(error).__name__,
        text=text,
        trace="".join(traceback.format_exception(_from_the_function(error))),
        expected=expected,
        peer_lost=isinstance(error, PeerLost),
        exit_code=exit_code,
        step=step,
        error=packed,
        peer=error.peer if isinstance(error, PeerLost) else None,
        tells_where=isinstance(error, AllfuseError) and error.tells_where,
    )


def _from_the_function(error: BaseException) -> BaseException:
    """The exception without the frames of this launcher that lead to the user's function."""
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_globals.get("__package__") == __package__:
        trace = trace.tb_next
    return error.with_traceback(trace or error.__traceback__)


def safe_text(error: BaseException) -> str:
    """The text of an exception, even of one whose own `__str__` raises."""
    try:
        return str(error)
    except Exception as inner:
        return f"(its text cannot be shown: {type(inner).__name__})"


def _exit_code_of(error: SystemExit) -> int:
    """As Python itself would end: nothing is 0, a text is 1, a number is what the system keeps."""
    if error.code is None:
        return 0
    return error.code & 0xFF if isinstance(error.code, int) else 1


def _pack_error(error: AllfuseError) -> bytes | None:
    try:
        packed = pickle.dumps(error)
        pickle.loads(packed)  # noqa: S301  our own bytes: does it come back?
    except Exception:
        return None
    return packed


@dataclass
class Outcome:
    """What the launcher knows of one worker.

    `status` is its exit status once it has ended, `order` its place among those that failed, and
    `killed_here` says that the launcher itself ended it, so that it is nobody's cause; `is_lost`
    that the others go on without it. `name` is what messages call it.
    """

    rank: int
    status: int | None = None
    result: bytes | None = None
    failure: Failure | None = None
    order: int | None = None
    killed_here: bool = False
    is_lost: bool = False
    name: str = ""

    def __post_init__(self) -> None:
        self.name = self.name or f"rank {self.rank}"

    @property
    def is_cause(self) -> bool:
        """Whether this worker failed by itself, rather than because it lost a peer."""
        if self.failure is not None:
            return not self.failure.peer_lost
        return self.result is None and not self.killed_here


def judge(outcomes: Sequence[Outcome], interrupted: bool) -> Any:
    """What rank 0 returned; else raises for the worker that failed first.

    Raises:
        UserError, Interrupted, WorkerFailed: as `launch_local` says.
    """
    failed = [outcome for outcome in outcomes if outcome.result is None]
    failed.sort(key=lambda outcome: len(outcomes) if outcome.order is None else outcome.order)
    causes = [outcome for outcome in failed if outcome.is_cause]
    stopped = [outcome for outcome in causes if outcome.failure and outcome.failure.was_stopped]
    causes = [outcome for outcome in causes if outcome not in stopped] or stopped
    if interrupted and failed and causes == stopped:
        raise Interrupted(_text(stopped[0]) if stopped else "interrupted; the workers were killed")
    if causes and causes[0].failure is not None:
        raise _cause(causes[0], causes[0].failure, causes[1:])
    if failed:
        lines = [_line(outcome) for outcome in failed if not outcome.killed_here]
        raise WorkerFailed("\n".join(lines), failed[0].rank)
    return _load_result(outcomes[0].result)


def _load_result(packed: bytes | None) -> Any:
    assert packed is not None  # every worker has told its end
    try:
        return pickle.loads(packed)  # noqa: S301  our own worker
    except Exception as error:
        raise UserError(
            f"what the function returned on rank 0 cannot be read here: {type(error).__name__}: "
            f"{error}; next: return plain values or tensors"
        ) from error


def is_nothing(packed: bytes) -> bool:
    """Whether a result is None, which workers pack in one of two ways."""
    import cloudpickle

    return packed in (pickle.dumps(None), cloudpickle.dumps(None))


def _text(outcome: Outcome) -> str:
    return outcome.failure.text if outcome.failure is not None else how_it_ended(outcome.status)


def _line(outcome: Outcome) -> str:
    if outcome.failure is not None:
        return outcome.failure.text  # of a lost peer: it names its rank
    return f"{outcome.name} {how_it_ended(outcome.status)}"


def _cause(outcome: Outcome, failure: Failure, others: Sequence[Outcome]) -> AllfuseError:
    """The error to raise here for what a worker raised there. Its traceback goes along."""
    if failure.expected and failure.exit_code != WorkerFailed.exit_code:
        if failure.error is not None:
            error = pickle.loads(failure.error)  # noqa: S301  our own worker
            assert isinstance(error, AllfuseError)
            return error
        kind = UserError if failure.exit_code == UserError.exit_code else Interrupted
        return kind(failure.text)
    where = "before the first step" if failure.step is None else f"at step {failure.step}"
    name = "" if failure.expected else f"{failure.type}: "
    told = "" if failure.tells_where else f"{outcome.name} failed {where}: "
    lines = [f"{told}{name}{failure.text}"]
    lines += [_line(other) for other in others if other.failure is None]
    trace = "" if failure.expected else failure.trace
    failed = WorkerFailed("\n".join(lines), outcome.rank, trace, failure.exit_code)
    if trace:
        failed.add_note(f"\nThe traceback of {outcome.name}:\n{trace}")
    return failed


def how_it_ended(status: int | None) -> str:
    """An exit status as people say it.

    >>> how_it_ended(-11)
    'was killed by SIGSEGV'
    """
    if status is None:
        return "ended, nobody knows how"
    if status >= 0:
        return f"ended with exit code {status} and no word why"
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = f"signal {-status}"
    hint = "; was memory short?" if name == "SIGKILL" else ""
    return f"was killed by {name}{hint}"
