"""The post within one process, with scripted and random faults: for tests, and for threads."""

from __future__ import annotations

import heapq
import random
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from allfuse.link.frame import Malformed
from allfuse.link.letter import Letter, pack, unpack
from allfuse.link.post import Caller, Desk, End, Post, wait_any

HELD_S = 0.1  # a letter that later ones were to overtake goes by then, also if none came


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What becomes of a letter.

    Args:
        copies: how often it comes; 0: never.
        delay_s: how much later. Letters that are sent after it do not wait for it.
        behind: so many letters that the same sender sends to the same receiver overtake it.
    """

    copies: int = 1
    delay_s: float = 0.0
    behind: int = 0


Faults = Callable[[str, str, str, int], Fault]
"""The fault of a letter, by its sender, receiver and kind, and how many of these went before."""

NONE, DROP, DOUBLE, SWAP = Fault(), Fault(copies=0), Fault(copies=2), Fault(behind=1)


def scripted(script: Mapping[tuple[str, str, str, int], Fault]) -> Faults:
    """Faults of the letters that are named; desks are named by their place.

    >>> faults = scripted({("worker 0", "server 1", "push", 3): DROP})
    >>> faults("worker 0", "server 1", "push", 3).copies
    0
    """
    return lambda *letter: script.get(letter, NONE)


def random_faults(
    seed: int,
    *,
    drop: float = 0.0,
    double: float = 0.0,
    swap: float = 0.0,
    delay: float = 0.0,
    delay_s: float = 0.0,
) -> Faults:
    """Each fault with its probability, delays up to `delay_s`.

    A letter's fault depends on the seed and on which letter it is, and on nothing else: it is the
    same whatever threads do.
    """

    def draw(sender: str, receiver: str, kind: str, nth: int) -> Fault:
        chance = random.Random(f"{seed} {sender!r} {receiver!r} {kind!r} {nth}")
        dropped, doubled, late = (chance.random() < odds for odds in (drop, double, delay))
        return Fault(
            copies=0 if dropped else 1 + doubled,
            behind=chance.randint(1, 3) if chance.random() < swap else 0,
            delay_s=chance.random() * delay_s if late else 0.0,
        )

    return draw


Frames = list[bytes]


@dataclass
class Box:
    """What lies ready for one receiver: by the time when it comes, then in the order of sending."""

    coming: list[tuple[float, int, str, Frames]] = field(default_factory=list)
    sent: int = 0

    def put(self, due_s: float, sender: str, frames: Frames) -> None:
        heapq.heappush(self.coming, (due_s, self.sent, sender, frames))
        self.sent += 1

    def take(self, now_s: float) -> list[tuple[str, Frames]]:
        found = []
        while self.coming and self.coming[0][0] <= now_s:
            found.append(heapq.heappop(self.coming)[2:])
        return found


@dataclass
class Held:
    """A letter that others are to overtake: so many still, at the latest until."""

    count: int
    until_s: float
    sender: str
    copies: list[Frames]


class Mailroom(Post):
    """Desks and callers in one process, each in a thread of its own or all in one.

    Letters are packed and opened as they are for a wire, so that what cannot travel fails here too.

    Args:
        faults: see `scripted` and `random_faults`.
        clock: seconds; a test may give its own, and then lets nothing wait.

    >>> post = Mailroom(scripted({("worker", "server", "push", 0): DOUBLE}))
    >>> desk, caller = post.desk("server"), post.call("server", "worker")
    >>> caller.send(Letter("push"))
    True
    >>> [name for name, letter in desk.receive(timeout_s=0)]
    ['worker', 'worker']
    """

    def __init__(
        self,
        faults: Faults = lambda sender, receiver, kind, nth: NONE,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.faults, self.clock = faults, clock
        self.changed = threading.Condition()
        self.desks: dict[str, RoomDesk] = {}
        self.callers: dict[tuple[str, str], RoomCaller] = {}  # by place and name
        self._boxes: dict[tuple[str, str], Box] = defaultdict(Box)  # a desk's name is empty
        self._held: dict[tuple[str, str, str], list[Held]] = defaultdict(list)
        self._counts: Counter[tuple[str, str, str]] = Counter()

    def desk(self, place: str = "") -> Desk:
        """What was sent to a place before its desk opens waits there."""
        with self.changed:
            place = place or f"desk {len(self.desks)}"
            if place in self.desks and not self.desks[place].closed:
                raise OSError(f"there is a desk at {place!r}")
            self.desks[place] = RoomDesk(self, place)
            return self.desks[place]

    def call(self, place: str, name: str) -> Caller:
        with self.changed:
            caller = RoomCaller(self, place, name)
            self._boxes.pop((place, name), None)
            self.callers[place, name] = caller
            return caller

    def cut(self, name: str) -> None:
        """End the connections of all callers of a name, as the end of their process does. What they
        sent still comes, what is on its way to them does not. They are back when they send."""
        with self.changed:
            for place, other in list(self.callers):
                if other == name:
                    self._part(place, name)

    def _part(self, place: str, name: str) -> None:
        if self.callers.pop((place, name), None) is not None:
            self._boxes.pop((place, name), None)
            if place in self.desks:
                self.desks[place].parted.append(name)
            self.changed.notify_all()

    def post(self, sender: str, receiver: str, box: tuple[str, str], letter: Letter) -> None:
        """Put a letter into a box, with the faults that fall to it."""
        frames = [bytes(frame) for frame in pack(letter)]
        with self.changed:
            now_s = self.clock()
            nth = self._counts[sender, receiver, letter.kind]
            self._counts[sender, receiver, letter.kind] += 1
            fault = self.faults(sender, receiver, letter.kind, nth)
            held = self._held[(*box, sender)]
            for _ in range(fault.copies):
                if not fault.behind:
                    self._boxes[box].put(now_s + fault.delay_s, sender, frames)
            for each in held:
                each.count -= 1
            self._release((*box, sender), now_s)
            if fault.behind and fault.copies:
                until_s = now_s + fault.delay_s + HELD_S
                held.append(Held(fault.behind, until_s, sender, [frames] * fault.copies))
            self.changed.notify_all()

    def _release(self, pair: tuple[str, str, str], now_s: float) -> None:
        held = self._held[pair]
        for each in [each for each in held if each.count <= 0 or each.until_s <= now_s]:
            held.remove(each)
            for frames in each.copies:
                self._boxes[pair[:2]].put(now_s, each.sender, frames)

    def take(self, box: tuple[str, str]) -> list[tuple[str, Frames]]:
        now_s = self.clock()
        for pair in list(self._held):
            if pair[:2] == box:
                self._release(pair, now_s)
        return self._boxes[box].take(now_s)

    def next_s(self) -> float:
        """In how many seconds something comes by itself."""
        dues = [box.coming[0][0] for box in self._boxes.values() if box.coming]
        dues += [each.until_s for held in self._held.values() for each in held]
        return max(0.0, min(dues, default=float("inf")) - self.clock())


class RoomEnd(End):
    """What both ends share."""

    closed = False

    def __init__(self, room: Mailroom, box: tuple[str, str]) -> None:
        self.room, self.box = room, box
        self.refused = Counter()
        self.inbox: list[tuple[str, Letter]] = []

    def ready(self) -> bool:
        with self.room.changed:
            return self.has_something()

    def has_something(self) -> bool:
        for sender, frames in self.room.take(self.box):
            try:
                self.inbox.append((sender, unpack(frames)))
            except Malformed:
                self.refused["malformed"] += 1
        return bool(self.inbox)

    def rest(self, ends: Sequence[End], timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        rooms = [end for end in ends if isinstance(end, RoomEnd)]
        with self.room.changed:
            while not any(end.has_something() for end in rooms):
                left_s = min(deadline - time.monotonic(), self.room.next_s() + 1e-3)
                if deadline <= time.monotonic():
                    return
                self.room.changed.wait(left_s)

    def unsent_bytes(self) -> int:
        return 0

    def take_inbox(self, timeout_s: float) -> list[tuple[str, Letter]]:
        wait_any([self], timeout_s)
        letters, self.inbox = self.inbox, []
        return letters


class RoomDesk(RoomEnd, Desk):
    def __init__(self, room: Mailroom, place: str) -> None:
        super().__init__(room, (place, ""))
        self.place = place
        self.parted: list[str] = []

    def has_something(self) -> bool:
        return super().has_something() or bool(self.parted)

    def receive(self, timeout_s: float) -> list[tuple[str, Letter]]:
        return self.take_inbox(timeout_s)

    def send(self, name: str, letter: Letter) -> bool:
        if (self.place, name) not in self.room.callers:
            return False
        self.room.post(self.place, name, (self.place, name), letter)
        return True

    def lost(self) -> list[str]:
        with self.room.changed:
            self.has_something()
            unread = {name for name, _ in self.inbox}
            told = [name for name in self.parted if name not in unread]
            self.parted = [name for name in self.parted if name in unread]
        return told

    def close(self) -> None:
        """What it has not read is lost with it; what is sent from now on waits for the next one."""
        with self.room.changed:
            if not self.closed:
                self.room.take(self.box)
            self.closed = True


class RoomCaller(RoomEnd, Caller):
    def __init__(self, room: Mailroom, place: str, name: str) -> None:
        super().__init__(room, (place, name))
        self.place, self.name, self.trouble = place, name, ""

    def send(self, letter: Letter) -> bool:
        with self.room.changed:
            self.room.callers.setdefault(self.box, self)
        self.room.post(self.name, self.place, (self.place, ""), letter)
        return True

    def receive(self, timeout_s: float) -> list[Letter]:
        return [letter for _, letter in self.take_inbox(timeout_s)]

    def close(self) -> None:
        with self.room.changed:
            if not self.closed and self.room.callers.get(self.box) is self:
                self.room._part(*self.box)
            self.closed = True
