"""What goes before the bytes of a tensor on a socket link: a typed header of fixed size."""

from __future__ import annotations

import hashlib
import struct
from enum import IntEnum
from functools import lru_cache
from typing import NamedTuple

import torch

MAGIC = b"alfu"
VERSION = 1
WORDS_BYTES = 40  # of an operation's name, for people: what is compared is its hash
LAYOUT = struct.Struct(f"<4sBBBBIQQQQQ{WORDS_BYTES}s")
"""Magic, version, kind, type, stream; sender; link, operation, sequence, start, amount; words."""

STREAMS = 2  # transfers of one pair, and collectives: neither waits for the other
TRANSFERS, COLLECTIVES = range(STREAMS)

DTYPES: tuple[torch.dtype, ...] = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.complex64,
    torch.complex128,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
)
"""A type's place here is its code on the wire: append only, or raise VERSION."""

CODES = {dtype: code for code, dtype in enumerate(DTYPES)}


class Kind(IntEnum):
    """What a message is for."""

    HELLO = 0  # the first one each way
    DATA = 1  # a piece of a tensor; amount: elements of the whole; start: the piece's first byte
    CREDIT = 2  # amount: bytes that were taken out of the way, so that as many may follow
    BYE = 3  # the sender closes; nothing follows
    SEEN = 4  # answers a BYE: all before it has come
    BROKEN = 5  # the sender gave up a collective; amount: the member to blame; payload: why


class Malformed(ValueError):
    """A message that is not what this version of the protocol sends; says what was received."""


class Header(NamedTuple):
    """What a message says of itself.

    Attributes:
        link, operation: hashes of the link's name and of the operation's.
        sender: the member that sends, by its rank in the whole plan.
        sequence: of the tensor among those of its stream from this sender, from 0.

    >>> header = Header(Kind.DATA, link=7, sender=1, dtype=torch.float16, amount=3)
    >>> parse(header.pack(), link=7, sender=1) == header
    True
    """

    kind: Kind
    link: int
    sender: int
    stream: int = 0
    dtype: torch.dtype = torch.uint8
    operation: int = 0
    sequence: int = 0
    start: int = 0
    amount: int = 0
    words: str = ""

    def pack(self) -> bytes:
        return LAYOUT.pack(
            MAGIC,
            VERSION,
            self.kind,
            CODES[self.dtype],
            self.stream,
            self.sender,
            self.link,
            self.operation,
            self.sequence,
            self.start,
            self.amount,
            self.words.encode()[:WORDS_BYTES],
        )


def parse(data: bytes, link: int, sender: int) -> Header:
    """The header of a message that this member should have sent on this link.

    Raises:
        Malformed: the size, magic, version, kind, type, stream, link or sender is another.
    """
    if len(data) != LAYOUT.size:
        raise Malformed(f"a header of {len(data)} bytes; allowed: {LAYOUT.size}")
    magic, version, kind, code, stream, who, which, about, number, start, amount, words = (
        LAYOUT.unpack(data)
    )
    if magic != MAGIC:
        raise Malformed(f"a message that begins with {magic!r}; allowed: {MAGIC!r}")
    if version != VERSION:
        raise Malformed(f"version {version} of the protocol; allowed: {VERSION}, one for all ranks")
    if kind >= len(Kind) or code >= len(DTYPES) or stream >= STREAMS:
        raise Malformed(f"kind {kind}, type {code}, stream {stream}; at least one is unknown")
    if who != sender:
        raise Malformed(f"a message in the name of rank {who}")
    if which != link:
        raise Malformed("a message of another link")
    text = words.rstrip(b"\0").decode("utf-8", "replace")
    dtype = DTYPES[code]
    return Header(Kind(kind), which, who, stream, dtype, about, number, start, amount, text)


@lru_cache(maxsize=4096)
def fingerprint(text: str) -> int:
    """A hash of 64 bits, the same in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
