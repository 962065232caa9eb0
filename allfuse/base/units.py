"""Quantities for people: bytes, counts and durations as short text."""

from __future__ import annotations

import re

SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*(k|M|G|T)?B?", re.IGNORECASE)
POWERS = {"": 0, "k": 3, "m": 6, "g": 9, "t": 12}


def parse_bytes(text: str) -> int:
    """Bytes, of a text in decimal units.

    Raises:
        ValueError: it is none.

    >>> parse_bytes("500MB"), parse_bytes("2 gb"), parse_bytes("100")
    (500000000, 2000000000, 100)
    """
    match = SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is no size; allowed: such as 500MB or 2GB")
    return int(float(match[1]) * 10 ** POWERS[(match[2] or "").lower()])


def format_bytes(count: float) -> str:
    """Decimal units, three digits.

    >>> format_bytes(5_000_000), format_bytes(999_700)
    ('5 MB', '1 MB')
    """
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(count) < 999.5 or unit == "TB":  # three digits would round up to the next unit
            return f"{count:.3g} {unit}"
        count /= 1000
    raise AssertionError("unreachable")


def format_seconds(seconds: float) -> str:
    """A duration as people say it.

    >>> format_seconds(3725)
    '1 h 02 min'
    >>> format_seconds(0.0042), format_seconds(0.9996), format_seconds(59.96)
    ('4.2 ms', '1 s', '1 min 00 s')
    """
    if seconds < 0.9995:
        return f"{seconds * 1000:.3g} ms"
    if seconds < 59.95:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"


def format_count(count: int) -> str:
    """Digits in groups of three.

    >>> format_count(1234567)
    '1,234,567'
    """
    return f"{count:,}"
