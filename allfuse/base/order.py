"""The order in which people expect names."""

from __future__ import annotations

import re


def natural(name: str) -> list[tuple[int, str]]:
    """What names are ordered by: numbers in them as numbers.

    >>> sorted(["layer.10", "layer.9", "head"], key=natural)
    ['head', 'layer.9', 'layer.10']
    """
    parts = re.split(r"(\d+)", name)
    return [(int(part) if part.isdecimal() else -1, part) for part in parts]
