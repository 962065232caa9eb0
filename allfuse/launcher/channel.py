"""Frames of bytes between a launcher and its own workers: the length, then the body.

What is in them may be pickled: both ends are one program of one user, joined by a socket pair that
nobody else can open.
"""

from __future__ import annotations

import socket
import struct
from collections import deque

HEADER = struct.Struct("<Q")
PIECE_BYTES = 1 << 20


class Channel:
    """The launcher's end. Never blocks, so that no worker can hold up the others.

    >>> ours, theirs = socket.socketpair()
    >>> channel = Channel(ours)
    >>> channel.post(b"hello")
    >>> channel.push()
    >>> receive_frame(theirs)
    b'hello'
    >>> channel.close(), theirs.close()
    (None, None)
    """

    def __init__(self, end: socket.socket) -> None:
        end.setblocking(False)
        self.end = end
        self.closed = False
        self._outgoing: deque[memoryview] = deque()
        self._incoming = bytearray()

    def fileno(self) -> int:
        return self.end.fileno()

    @property
    def has_outgoing(self) -> bool:
        return bool(self._outgoing)

    def post(self, body: bytes) -> None:
        """Put a frame in line; `push` sends it as fast as the worker takes it."""
        self._outgoing += (memoryview(HEADER.pack(len(body))), memoryview(body))

    def push(self) -> None:
        """Send what fits. A worker that has died gets nothing more."""
        try:
            while self._outgoing:
                sent = self.end.send(self._outgoing[0])
                rest = self._outgoing[0][sent:]
                if rest:
                    self._outgoing[0] = rest
                else:
                    self._outgoing.popleft()
        except BlockingIOError:
            return
        except (BrokenPipeError, ConnectionResetError):
            self._outgoing.clear()

    def pull(self) -> list[bytes]:
        """The frames that are complete by now. Sets `closed` when there will be no more."""
        try:
            while piece := self.end.recv(PIECE_BYTES):
                self._incoming += piece
            self.closed = True
        except BlockingIOError:
            pass
        except ConnectionResetError:
            self.closed = True
        frames = []
        while len(self._incoming) >= HEADER.size:
            stop = HEADER.size + HEADER.unpack_from(self._incoming)[0]
            if len(self._incoming) < stop:
                break
            frames.append(bytes(self._incoming[HEADER.size : stop]))
            del self._incoming[:stop]
        return frames

    def close(self) -> None:
        self.end.close()


def send_frame(end: socket.socket, body: bytes) -> None:
    """The worker's end: send one frame, however long that takes."""
    end.sendall(HEADER.pack(len(body)))
    end.sendall(body)


def receive_frame(end: socket.socket) -> bytes | None:
    """The worker's end: the next frame, or None when the launcher has closed or died."""
    header = _receive_exactly(end, HEADER.size)
    return None if header is None else _receive_exactly(end, HEADER.unpack(header)[0])


def _receive_exactly(end: socket.socket, count: int) -> bytes | None:
    parts = bytearray()
    while len(parts) < count:
        try:
            piece = end.recv(min(count - len(parts), PIECE_BYTES))
        except ConnectionResetError:
            return None
        if not piece:
            return None
        parts += piece
    return bytes(parts)
