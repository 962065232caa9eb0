"""Who may come in to a socket link, and how many were sent away."""

from __future__ import annotations

import hmac

import zmq
from zmq.utils.monitor import recv_monitor_message

ZAP_PLACE = "inproc://zeromq.zap.01"
ZAP_VERSION = b"1.0"
PARTS = 6  # of a request before its credentials


class Gate:
    """Answers ZeroMQ's authentication requests (RFC 27, ZAP): one member for each listening socket.

    Made before anything listens: where nobody answers, ZeroMQ lets everybody in.

    Attributes:
        expected: credentials by the domain of a socket: user and password, or a public key.
    """

    over = False

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        self.expected: dict[bytes, tuple[bytes, ...]] = {}
        self.socket = context.socket(zmq.REP)
        self.socket.bind(ZAP_PLACE)

    def attend(self) -> bool:
        """Answer one request; whether there may be more."""
        if not int(self.socket.get(zmq.EVENTS)) & zmq.POLLIN:
            return False
        version, number, domain, _, _, mechanism, *credentials = (
            self.socket.recv_multipart(zmq.NOBLOCK) + [b""] * PARTS
        )
        expected = self.expected.get(domain, ())
        wanted = b"CURVE" if len(expected) == 1 else b"PLAIN"
        welcome = (
            version == ZAP_VERSION
            and bool(expected)
            and mechanism == wanted
            and all(map(hmac.compare_digest, expected, credentials))
        )
        code, word = (b"200", b"OK") if welcome else (b"400", b"not a member")
        self.socket.send_multipart([ZAP_VERSION, number, code, word, b"", b""])
        return True

    def close(self) -> None:
        self.socket.close(0)


class Doorman:
    """Counts who came to a listening socket and went: strangers are sent away at once."""

    over = False

    def __init__(self, socket: zmq.Socket[bytes]) -> None:
        self.watched = socket
        self.gone = 0
        self.socket = socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)

    def attend(self) -> bool:
        """Count one; whether there may be more."""
        if not int(self.socket.get(zmq.EVENTS)) & zmq.POLLIN:
            return False
        self.gone += recv_monitor_message(self.socket)["event"] == zmq.EVENT_DISCONNECTED
        return True

    def close(self) -> None:
        if not self.watched.closed:
            self.watched.disable_monitor()
        self.socket.close(0)
