"""Who came to a socket that listens, or connects, and what became of it."""

from __future__ import annotations

from collections import Counter, defaultdict, deque

import zmq
from zmq.utils.monitor import parse_monitor_message

FAILURES = (
    zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
)
PATIENCE_S = 0.25
_OF_ANOTHER_TOKEN = (
    zmq.PROTOCOL_ERROR_ZMTP_CRYPTOGRAPHIC,
    zmq.PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH,
)


class Monitor:
    """Reads what ZeroMQ tells of the connections of a socket: pairs of event and value, in order.

    Without a limit on how many wait to be read: where there is one, ZeroMQ stands still at it.
    """

    def __init__(self, watched: zmq.Socket[bytes], events: int) -> None:
        self._watched = watched
        place = f"inproc://visitors-{id(watched)}"
        watched.monitor(place, events)
        self.socket = watched.context.socket(zmq.PAIR)
        self.socket.set(zmq.RCVHWM, 0)
        self.socket.connect(place)

    def read(self) -> list[tuple[int, int]]:
        found = []
        while int(self.socket.get(zmq.EVENTS)) & zmq.POLLIN:
            told = parse_monitor_message(self.socket.recv_multipart())
            found.append((int(told["event"]), int(told["value"])))
        return found

    def close(self) -> None:
        self._watched.disable_monitor()
        self.socket.close(0)


def reason_of(event: int, value: int) -> str:
    """Why a connection did not come about: "token" or "handshake"."""
    if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
        return "token"
    return "token" if value in _OF_ANOTHER_TOKEN else "handshake"


class Visitors:
    """Tells strangers from callers, by whether they were heard before their connection ended.

    Every caller says its name at once when it is let in. What ZeroMQ tells of connections and what
    comes over them are read from different queues: first read that (`collect`), then all letters
    (`hear`), then judge what was read first (`judge`), which waits for that for a while.
    """

    def __init__(self, socket: zmq.Socket[bytes], refused: Counter[str]) -> None:
        self.monitor = Monitor(socket, zmq.EVENT_DISCONNECTED | FAILURES)
        self.refused = refused
        self._names: dict[int, deque[str]] = defaultdict(deque)  # by file descriptor
        self._collected: list[tuple[int, int]] = []
        self._since = 0.0
        self._reasons: deque[str] = deque()

    def collect(self, now: float) -> None:
        if not self._collected:
            self._since = now
        self._collected += self.monitor.read()

    def hear(self, descriptor: int, name: str) -> None:
        """A caller has come over this connection."""
        self._names[descriptor].append(name)

    def judge(self, heard_all: bool, now: float) -> list[str]:
        """Callers whose connections have ended; strangers are counted.

        heard_all: no letter is left that could have come before what was collected.
        """
        parted: list[str] = []
        if not self._collected or not (heard_all or now - self._since > PATIENCE_S):
            return parted
        for event, value in self._collected:
            if event != zmq.EVENT_DISCONNECTED:
                self._reasons.append(reason_of(event, value))
            elif names := self._names.get(value):
                parted.append(names.popleft())
            else:
                self.refused[self._reasons.popleft() if self._reasons else "handshake"] += 1
        self._collected = []
        return parted

    def close(self) -> None:
        self.monitor.close()
