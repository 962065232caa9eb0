"""What a process knows of the world it was started in. Knows nothing of training."""

from __future__ import annotations

import contextlib
import contextvars
import threading
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING

from allfuse.base.errors import PeerLost
from allfuse.launcher.host import host_identity

if TYPE_CHECKING:
    import torch

    from allfuse.launcher.crewmate import Crewmate
    from allfuse.launcher.generation import Lost
    from allfuse.link.base import Board, Link


BEGAN = "began"
"""Where rank 0 tells its launcher that there is a run to go on with."""


class World(ABC):
    """The ranks that were started together, as one of them sees it.

    Attributes:
        kind: who started it: "alone", "local", "torchrun" or "thread".
        rank, size: this process among all workers.
        local_rank, local_size: this process among the workers of its host.
        plan: the plan's text that the launcher was given, or None when the script says it.
        stop_requested: set when a person or the launcher asks to stop; the session agrees on the
            step at which all ranks do.
        step: where this rank is, told by the session, for reports of failures.
        has_process_groups: whether a default process group can be made (threads share one process).
        spans_process: whether all threads of this process belong to this rank.
        crew: what this process is besides, where a scheduler hands out the work; else None.
        ids: of each rank, the rank that it was started with. Messages name workers by these.
        goes_on: whether the others go on without a rank that is lost: see `regroup`.
        is_over: they need not, as one of them has done all its work.
        again: the losses after which all were started again. resumes: they had begun a run by then.
    """

    kind: str = "alone"
    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    plan: str | None = None
    step: int | None = None
    timeout_s: float = 300.0
    has_process_groups: bool = True
    spans_process: bool = False
    crew: Crewmate | None = None
    goes_on: bool = False
    is_over: bool = False
    again: tuple[Lost, ...] = ()
    resumes: bool = False
    board: Board

    def __init__(self) -> None:
        self.stop_requested = threading.Event()
        self._generation = self._newest = 0  # of those that go on after losses
        self._hosts: tuple[str, ...] = ()
        self._keys: Counter[str] = Counter()

    @abstractmethod
    def link(
        self,
        name: str,
        members: tuple[int, ...],
        device: torch.device,
        groups: Collection[tuple[int, ...]] = (),
    ) -> Link:
        """A link to these ranks; all of them must ask for it, in the same order.

        Args:
            groups: all groups of the axis, whose links then sum in the same way: ranks of different
                groups may hold the same values, and must hold the same bits.
        """

    @abstractmethod
    def form_replica(self, replica: tuple[int, ...], backend: str) -> None:
        """Make the default process group over the ranks of one replica."""

    @property
    def is_one_host(self) -> bool:
        """Whether all ranks are on this host."""
        return self.local_size == self.size

    def hosts(self) -> tuple[str, ...]:
        """The host of each rank, by any name.

        Raises:
            PeerLost: a rank did not say within the deadline.
        """
        if self.is_one_host:
            return ("here",) * self.size
        if not self._hosts:
            self.tell_host()
            self._hosts = tuple(map(self._host_of, range(self.size)))
        return self._hosts

    def new_key(self, name: str) -> str:
        """A key of the board that no session before has used. All ranks ask in the same order."""
        self._keys[name] += 1
        return f"{name}/{self._keys[name]}"

    def tell_host(self) -> None:
        """Let the others know the host of this rank, who may ask sooner than this one does."""
        self.board.set(f"host/{self.rank}", self.host_identity().encode())

    def host_identity(self) -> str:
        """The host of this rank."""
        return host_identity()

    def _host_of(self, rank: int) -> str:
        return await_word(
            self.board,
            f"host/{rank}",
            rank=self.rank,
            peer=rank,
            operation="find the hosts",
            reason="did not say which host it is on",
            timeout_s=self.timeout_s,
        ).decode()

    @property
    def ids(self) -> tuple[int, ...]:
        return tuple(range(self.size))

    def hear_of_loss(self, generation: int) -> None:
        """The launcher tells that a rank is lost, and which generation comes after it."""
        self._newest = max(self._newest, generation)

    @property
    def told_of_loss(self) -> bool:
        """Whether the launcher has told of a loss after which this rank has not regrouped."""
        return self._newest > self._generation

    def regroup(self, error: PeerLost | None) -> tuple[Lost, ...]:
        """Leave lost ranks behind: rank, size, board and links are new ones afterwards, the board
        empty. Those that were lost. All that are left must come; links made before are useless.

        Args:
            error: what this rank has noticed; None where the launcher has told of a loss.

        Raises:
            PeerLost: the ranks that are left do not go on, or did not come in time.
        """
        raise error or RuntimeError("nothing was lost")

    def sees_alone(self, devices: Sequence[str]) -> bool:
        """Whether no other process sees any of these, all that this one sees. All ranks ask."""
        return self.local_size == 1  # a launcher gives all that it starts the same

    @property
    def heeds_stop(self) -> bool:
        """Whether a session trains, which looks at `stop_requested` after each step."""
        return self.step is not None

    def ask_to_stop(self) -> None:
        """A person or a supervisor asks to stop. Training ends after its step.

        Raises:
            KeyboardInterrupt: nothing trains, or this is the second time.
        """
        if self.stop_requested.is_set() or not self.heeds_stop:
            raise KeyboardInterrupt
        self.stop_requested.set()

    @abstractmethod
    def close(self, error: BaseException | None = None) -> None:
        """Give back what the world holds; `error` is what this rank ends with. Waits for nobody."""


def await_word(
    board: Board,
    key: str,
    *,
    rank: int,
    peer: int,
    operation: str,
    reason: str,
    timeout_s: float,
) -> bytes:
    """What a peer writes on the board.

    Raises:
        PeerLost: for this reason, nothing within the deadline.
    """
    try:
        return board.wait(key, timeout_s)
    except TimeoutError:
        raise PeerLost(
            reason, rank=rank, peer=peer, operation=operation, step=None, seconds=timeout_s
        ) from None


_current: contextvars.ContextVar[World | None] = contextvars.ContextVar("world", default=None)
_of_process: list[World] = []  # threads that a worker starts belong to its world too


def current_world() -> World | None:
    """The world that the launcher of this process (or thread) set, else None."""
    return _current.get() or next(reversed(_of_process), None)


@contextlib.contextmanager
def entered(world: World) -> Iterator[World]:
    """Make this the current world of the running thread, and close it at the end.

    A world that spans the process is also that of all other threads.
    """
    token = _current.set(world)
    if world.spans_process:
        _of_process.append(world)
    error: BaseException | None = None
    try:
        yield world
    except BaseException as raised:
        error = raised
        raise
    finally:
        _current.reset(token)
        if world.spans_process:
            _of_process.remove(world)
        world.close(error)
