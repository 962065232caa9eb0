"""Where a socket link listens, and what its peers are told so that they find it."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import json
import socket
from dataclasses import dataclass
from typing import NamedTuple

from allfuse.link.frame import Malformed

LOOPBACK = "127.0.0.1"
KEY_LENGTH = 40  # of a CURVE key as text


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """Where a rank listens, and who may come.

    Args:
        loopback: listen on this host only.
        address: the IP address to listen on; None: loopback's, or that of the host's own network.
        advertised: what peers are told, where it is another one: behind 0.0.0.0 or a translation.
        encrypt: whether ZeroMQ's CURVE encrypts what travels; None: beyond loopback. There it must.
        token: a secret of the job. Whoever does not have it is not believed what it writes on the
            board, and not let in.

    >>> Endpoint(loopback=True).encrypted
    False
    """

    loopback: bool = False
    address: str | None = None
    advertised: str | None = None
    encrypt: bool | None = None
    token: bytes = b""

    def __post_init__(self) -> None:
        if self.encrypt is False and not self.is_local:
            raise ValueError(
                f"listening on {self.bound} in the clear; allowed: encrypt=True, or a loopback "
                "address"
            )

    @property
    def bound(self) -> str:
        return self.address or (LOOPBACK if self.loopback else host_address())

    @property
    def told(self) -> str:
        return self.advertised or self.bound

    @property
    def is_local(self) -> bool:
        return ipaddress.ip_address(self.bound).is_loopback

    @property
    def encrypted(self) -> bool:
        return not self.is_local if self.encrypt is None else self.encrypt


def host_address() -> str:
    """The host's address on the network that its traffic leaves by."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # a reserved address; nothing is sent
            return str(probe.getsockname()[0])
        except OSError:
            return socket.gethostbyname(socket.gethostname())


class Card(NamedTuple):
    """What a rank writes on the board.

    Attributes:
        address: where it listens.
        ports: the port for each peer that connects to it, by the peer's member.
        secret: random; passwords are made of it, so that they are new for each link.
        key: its public CURVE key, empty where nothing is encrypted.
    """

    address: str
    ports: dict[int, int]
    secret: str
    key: str

    def pack(self, token: bytes, key: str) -> bytes:
        """As it is written under a key of the board, signed by the token."""
        body = json.dumps(self._asdict()).encode()
        return signature(token, key, body).encode() + b"\n" + body

    def place(self, member: int) -> str:
        """Where this member connects to, as ZeroMQ writes it."""
        return f"{transport(self.address)}:{self.ports[member]}"

    def password(self, token: bytes, key: str, member: int) -> bytes:
        """By which this member is let in; `key` is that of the card."""
        return signature(token, key, f"{self.secret} {member}".encode()).encode()


def read_card(value: bytes, token: bytes, key: str) -> Card:
    """What a rank wrote under a key of the board.

    Raises:
        Malformed: it is no card, or not signed by the token.
    """
    signed, _, body = value.partition(b"\n")
    if not hmac.compare_digest(signed, signature(token, key, body).encode()):
        raise Malformed("an address that the token of this job does not sign")
    try:
        said = json.loads(body)
        ports = {int(member): int(port) for member, port in said["ports"].items()}
        key_text = str(said["key"])
        if len(key_text) not in (0, KEY_LENGTH):
            raise ValueError("a key of another length")
        return Card(str(said["address"]), ports, str(said["secret"]), key_text)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Malformed(f"an address that cannot be read ({error})") from None


def signature(token: bytes, key: str, body: bytes) -> str:
    return hmac.new(token, key.encode() + b"\0" + body, hashlib.sha256).hexdigest()


def transport(address: str) -> str:
    """An address as ZeroMQ writes it."""
    return f"tcp://[{address}]" if ":" in address else f"tcp://{address}"
