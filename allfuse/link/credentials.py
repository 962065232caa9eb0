"""By what a desk and its callers know each other: all of it is made of the token of the job."""

from __future__ import annotations

import zmq
from zmq.utils import z85

from allfuse.link.endpoint import signature

DOMAIN = b"post"
USER = b"caller"


class Credentials:
    """Keys, where the connection is encrypted, or else a password; the token itself never travels.

    Encrypted, ZeroMQ's CURVE proves to a caller that the desk has the token, and to the desk that
    the caller has it, and nobody between can read or change anything. In the clear only the caller
    shows what it knows.

    Args:
        token: a secret of the job; it may be empty where nothing is encrypted, and then everybody
            is let in who speaks this protocol.
    """

    def __init__(self, token: bytes, encrypted: bool) -> None:
        if encrypted and not token:
            raise ValueError("an encrypted connection without a token; next: give the job a token")
        self.encrypted = encrypted
        self._desk, self._caller = (_secret(token, role) for role in ("desk", "caller"))
        self._password = signature(token, "post", b"password").encode()

    @property
    def expected(self) -> tuple[bytes, ...]:
        """What a desk's `Gate` lets in."""
        if not self.encrypted:
            return USER, self._password
        return (z85.decode(zmq.curve_public(self._caller)),)

    def guard(self, desk: zmq.Socket[bytes]) -> None:
        """Before it listens."""
        desk.set(zmq.ZAP_DOMAIN, DOMAIN)
        if self.encrypted:
            desk.set(zmq.CURVE_SERVER, 1)
            desk.set(zmq.CURVE_SECRETKEY, self._desk)
        else:
            desk.set(zmq.PLAIN_SERVER, 1)

    def show(self, caller: zmq.Socket[bytes]) -> None:
        """Before it connects."""
        if self.encrypted:
            caller.set(zmq.CURVE_SERVERKEY, zmq.curve_public(self._desk))
            caller.set(zmq.CURVE_PUBLICKEY, zmq.curve_public(self._caller))
            caller.set(zmq.CURVE_SECRETKEY, self._caller)
        else:
            caller.set(zmq.PLAIN_USERNAME, USER)
            caller.set(zmq.PLAIN_PASSWORD, self._password)


def _secret(token: bytes, role: str) -> bytes:
    """A secret CURVE key, as text: any 32 bytes are one."""
    return z85.encode(bytes.fromhex(signature(token, "post", role.encode())))
