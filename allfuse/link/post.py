"""Letters between a desk and those that call there: what servers and the scheduler hear and say.

A letter may come twice, late, or never: a connection that ends takes with it what was on its way.
Those that come from one sender to one receiver come in their order. Nothing that is received is
unpickled; what is not as it should be is refused, counted, and changes nothing.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence

from allfuse.link.frame import Malformed
from allfuse.link.letter import Letter

__all__ = ["Caller", "Desk", "End", "Letter", "Malformed", "Post", "wait_any"]


class End(ABC):
    """One end of a connection. It belongs to one thread at a time.

    Attributes:
        refused: how many were sent away, by the reason: at a desk connections and letters, at a
            caller letters.
    """

    refused: Counter[str]

    @abstractmethod
    def ready(self) -> bool:
        """Whether there is something to receive, or somebody is lost."""

    @abstractmethod
    def rest(self, ends: Sequence[End], timeout_s: float) -> None:
        """Sleep until something happens at one of these, all of this kind, or the time is over."""

    @abstractmethod
    def close(self) -> None:
        """Give all back. What was sent still goes, where it can at once; waits for at most a
        second."""


class Desk(End):
    """Receives from many.

    Attributes:
        place: where callers find it, "HOST:PORT".
    """

    place: str

    @abstractmethod
    def receive(self, timeout_s: float) -> list[tuple[str, Letter]]:
        """Who sent what, in the order of arrival; empty when the time is over, or a caller lost."""

    @abstractmethod
    def send(self, name: str, letter: Letter) -> bool:
        """Hand over a letter to a caller; whether it is on its way. Never waits.

        False: there is no such caller (any more), or it does not read. Tensors are not copied: they
        must not be changed before the receiver has answered, or `unsent_bytes` is 0.

        Raises:
            ValueError: it cannot travel; see `letter.pack`.
        """

    @abstractmethod
    def lost(self) -> list[str]:
        """Callers whose connection has ended since this was asked last, for whatever reason."""

    @abstractmethod
    def unsent_bytes(self) -> int:
        """Of tensors that were handed over and are still read."""


class Caller(End):
    """Writes to one desk, under a name. It comes back by itself when its connection ends.

    Attributes:
        name: by which the desk knows it. A second one of the same name takes the first one's place.
        place: of the desk.
        trouble: why it is not let in, empty where it is, or nobody answers.
    """

    name: str
    place: str
    trouble: str

    @abstractmethod
    def send(self, letter: Letter) -> bool:
        """Hand over a letter, also while the desk is not there; whether it is on its way, or will
        be. Never waits.

        False: too many wait already. Tensors are not copied, as in `Desk.send`.

        Raises:
            ValueError: it cannot travel; see `letter.pack`.
        """

    @abstractmethod
    def receive(self, timeout_s: float) -> list[Letter]:
        """What came, in its order; empty when the time is over."""

    @abstractmethod
    def unsent_bytes(self) -> int:
        """Of tensors that were handed over and are still read."""


class Post(ABC):
    """Makes ends of one kind, which can reach each other."""

    @abstractmethod
    def desk(self, place: str = "") -> Desk:
        """Open a desk, where the place is empty at any that is free."""

    @abstractmethod
    def call(self, place: str, name: str) -> Caller:
        """A caller of the desk at a place, whether that is open by now or later."""


def wait_any(ends: Sequence[End], timeout_s: float) -> list[End]:
    """Those of some ends, all of one kind, that have something; empty when the time is over."""
    deadline = time.monotonic() + timeout_s
    while True:
        found = [end for end in ends if end.ready()]
        left_s = deadline - time.monotonic()
        if found or left_s <= 0 or not ends:
            return found
        ends[0].rest(ends, left_s)
