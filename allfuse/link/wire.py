"""The post over ZeroMQ."""

from __future__ import annotations

import errno
import ipaddress
import math
import time

import zmq

from allfuse.link.credentials import DOMAIN, Credentials
from allfuse.link.endpoint import LOOPBACK, Endpoint, host_address, transport
from allfuse.link.gate import Gate
from allfuse.link.letter import Letter
from allfuse.link.post import Caller, Desk, Post, wait_any
from allfuse.link.visitors import FAILURES, Monitor, Visitors, reason_of
from allfuse.link.wired import POLLIN, Wired

RECONNECT_S, MOST_RECONNECT_S = 0.1, 1.0
READ_AT_ONCE = 16  # messages, of which no letter came
PROBE_S, PROBES_S = 0.05, 5.0  # how often, and how long, a caller is looked for that may be lost
NAME_BYTES = 255


class Wire(Post):
    """Desks and callers over TCP.

    Beyond loopback all is encrypted, on it where `endpoint.encrypt` says so.

    Args:
        endpoint: where desks listen, and the token of the job, of which keys and passwords are
            made; None: on loopback, without a token.

    >>> post = Wire()
    >>> desk = post.desk()
    >>> caller = post.call(desk.place, "worker 0")
    >>> caller.send(Letter("beat"))
    True
    >>> desk.receive(timeout_s=10)
    [('worker 0', Letter(kind='beat', fields={}, tensors=()))]
    >>> caller.close(), desk.close()
    (None, None)
    """

    def __init__(self, endpoint: Endpoint | None = None) -> None:
        self.endpoint = endpoint or Endpoint(loopback=True)

    def desk(self, place: str = "") -> Desk:
        """Of a place only the port counts: where to listen is the endpoint's to say.

        Raises:
            OSError: the port is not free.
        """
        credentials = Credentials(self.endpoint.token, self.endpoint.encrypted)
        return WireDesk(self.endpoint, credentials, split_place(place)[1] if place else 0)

    def call(self, place: str, name: str) -> Caller:
        host, _ = split_place(place)
        encrypted = bool(self.endpoint.encrypt) or not _is_loopback(host)
        return WireCaller(place, name, Credentials(self.endpoint.token, encrypted))


class WireDesk(Wired, Desk):
    """A ROUTER. It gives word to all that connect while one of its methods runs.

    A caller that sends a frame beyond `letter.MOST_BYTES` loses its connection; what is malformed,
    or too much in sum, is refused and leaves the connection as it is.
    """

    def __init__(self, endpoint: Endpoint, credentials: Credentials, port: int) -> None:
        super().__init__(zmq.ROUTER)
        self.gate = Gate(self.context)
        self.gate.expected[DOMAIN] = credentials.expected
        self._visitors = Visitors(self.socket, self.refused)
        self.watched += [(self.gate.socket, POLLIN), (self._visitors.monitor.socket, POLLIN)]
        self._inbox: list[tuple[str, Letter]] = []
        self._lost: list[str] = []
        self._sought: dict[str, float] = {}  # callers that may be lost, and until when
        self._next_probe = 0.0
        self.socket.set(zmq.ROUTER_MANDATORY, 1)
        self.socket.set(zmq.ROUTER_HANDOVER, 1)
        self.socket.set(zmq.IPV6, int(":" in endpoint.bound))
        credentials.guard(self.socket)
        try:
            self.socket.bind(f"{transport(endpoint.bound)}:{port or '*'}")
        except zmq.ZMQError as error:
            self.close()
            raise OSError(
                error.errno, f"cannot listen on {endpoint.bound}:{port} ({error.strerror})"
            ) from None
        place = self.socket.get(zmq.LAST_ENDPOINT)
        assert isinstance(place, bytes)
        told = endpoint.told
        if ipaddress.ip_address(told).is_unspecified:
            told = host_address()
        self.place = transport(told).removeprefix("tcp://")
        self.place += ":" + place.rstrip(b"\0").decode().rpartition(":")[2]

    @property
    def patience_s(self) -> float:
        return PROBE_S if self._sought else math.inf

    def ready(self) -> bool:
        if not self._inbox:
            self._look()
        return bool(self._inbox or self._lost)

    def receive(self, timeout_s: float) -> list[tuple[str, Letter]]:
        wait_any([self], timeout_s)
        letters, self._inbox = self._inbox, []
        return letters

    def send(self, name: str, letter: Letter) -> bool:
        try:
            return self._ship(name.encode(), letter)
        except zmq.ZMQError as error:
            if error.errno == errno.EHOSTUNREACH:
                return False
            raise

    def lost(self) -> list[str]:
        """Those of whom letters still wait here come later."""
        self._look()
        unread = {name for name, _ in self._inbox}
        told = [name for name in self._lost if name not in unread]
        self._lost = [name for name in self._lost if name in unread]
        return told

    def _look(self) -> None:
        """Let callers in, read a letter if there is one, find out who is lost."""
        now = time.monotonic()
        if self.is_due(now):
            self._visitors.collect(now)
            while self.gate.attend():
                pass
        heard_all = False
        for _ in range(READ_AT_ONCE):
            if self._inbox:
                break
            frames = self._take()
            if frames is None:
                heard_all = True
                break
            self._sort(frames)
        for name in self._visitors.judge(heard_all, now):
            self._sought[name] = now + PROBES_S
        if self._sought and now >= self._next_probe:
            self._probe(now)

    def _sort(self, frames: list[zmq.Frame]) -> None:
        sender, *body = frames
        try:
            name = sender.bytes.decode()
        except UnicodeDecodeError:
            name = ""
        if not name.isprintable() or not name or not body:
            self.refused["name"] += 1
        elif len(body) == 1 and not len(body[0]):
            self._visitors.hear(int(body[0].get(zmq.SRCFD)), name)
        elif (letter := self._open(body)) is not None:
            self._inbox.append((name, letter))

    def _probe(self, now: float) -> None:
        """Look for callers of which a connection has ended: under their name there may be another.

        The end of a connection is told a little before nothing can be sent over it any more. To
        those that are there an empty frame goes, which they throw away.
        """
        self._next_probe = now + PROBE_S
        for name, until in list(self._sought.items()):
            if now >= until:
                del self._sought[name]
            try:
                self.socket.send_multipart([name.encode(), b""], zmq.NOBLOCK)
            except zmq.Again:
                continue
            except zmq.ZMQError as error:
                if error.errno != errno.EHOSTUNREACH:
                    raise
                self._sought.pop(name, None)
                self._lost.append(name)

    def close(self) -> None:
        if not self.socket.closed:
            self._visitors.close()
            self.gate.close()
            self._end()


class WireCaller(Wired, Caller):
    """A DEALER. In the clear it does not come again to a desk that refused its token."""

    def __init__(self, place: str, name: str, credentials: Credentials) -> None:
        if not 0 < len(name.encode()) <= NAME_BYTES or not name.isprintable():
            raise ValueError(f"name={name!r}; allowed: 1 to {NAME_BYTES} printable bytes")
        host, port = split_place(place)
        super().__init__(zmq.DEALER)
        self.place, self.name, self.trouble = place, name, "nobody answers"
        self._inbox: list[Letter] = []
        self._monitor = Monitor(
            self.socket, zmq.EVENT_DISCONNECTED | zmq.EVENT_HANDSHAKE_SUCCEEDED | FAILURES
        )
        self.watched.append((self._monitor.socket, POLLIN))
        self.socket.set(zmq.ROUTING_ID, name.encode())
        self.socket.set(zmq.PROBE_ROUTER, 1)  # an empty frame, by which the desk learns the name
        self.socket.set(zmq.RECONNECT_IVL, int(RECONNECT_S * 1000))
        self.socket.set(zmq.RECONNECT_IVL_MAX, int(MOST_RECONNECT_S * 1000))
        self.socket.set(zmq.IPV6, int(":" in host))
        credentials.show(self.socket)
        self.socket.connect(f"{transport(host)}:{port}")

    def ready(self) -> bool:
        for event, value in self._monitor.read() if self.is_due(time.monotonic()) else ():
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self.trouble = ""
            elif event == zmq.EVENT_DISCONNECTED:
                self.trouble = self.trouble or "the connection ended"
            else:
                self.trouble = {
                    "token": "another token",
                    "handshake": "it ends the connection: another token, or no desk",
                }[reason_of(event, value)]
        for _ in range(READ_AT_ONCE):
            if self._inbox or (frames := self._take()) is None:
                break
            if len(frames) == 1 and not len(frames[0]):
                continue
            if (letter := self._open(frames)) is not None:
                self._inbox.append(letter)
        return bool(self._inbox)

    def send(self, letter: Letter) -> bool:
        return self._ship(None, letter)

    def receive(self, timeout_s: float) -> list[Letter]:
        wait_any([self], timeout_s)
        letters, self._inbox = self._inbox, []
        return letters

    def close(self) -> None:
        if not self.socket.closed:
            self._monitor.close()
            self._end()


def split_place(place: str) -> tuple[str, int]:
    """Host and port of a place.

    >>> split_place("[::1]:7077")
    ('::1', 7077)
    """
    host, _, port = place.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise ValueError(f"place={place!r}; allowed: HOST:PORT")
    return host.removeprefix("[").removesuffix("]"), int(port)


def _is_loopback(host: str) -> bool:
    """Of a name only "localhost" is taken for it."""
    try:
        return ipaddress.ip_address(LOOPBACK if host == "localhost" else host).is_loopback
    except ValueError:
        return False
