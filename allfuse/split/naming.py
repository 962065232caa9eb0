"""Modules in few words: equal blocks read alike, and are told once."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Line:
    """Something to say of some modules.

    Attributes:
        text: has {} where names go.
        names: for each {} the names of modules that go there.
    """

    text: str
    names: tuple[tuple[str, ...], ...]


def merged(lines: Iterable[Line]) -> list[str]:
    """Each thing once, with how many blocks it is said of. The numbers of blocks are * where it is
    clear which are meant, and are told where it is not.

    >>> cut = "{} by columns, {} by rows"
    >>> merged(Line(cut, ((f"layers.{i}.wide",), (f"layers.{i}.thin",))) for i in range(4))
    ['layers.*.wide by columns, layers.*.thin by rows  x4']
    >>> merged(Line(cut, ((f"{i}",), (f"{i + 1}",))) for i in (0, 2, 4))
    ['0 by columns, 1 by rows', '2 by columns, 3 by rows', '4 by columns, 5 by rows']
    >>> merged(Line(cut, ((f"net.{i}",), (f"net.{i + 1}",))) for i in (0, 2, 4))
    ['net.0,2,4 by columns, net.1,3,5 by rows  x3']
    """
    groups: dict[tuple[str, ...], list[Line]] = {}
    users: dict[str, set[tuple[tuple[str, ...], int]]] = {}
    for line in dict.fromkeys(lines):
        patterns = [starred(names[0]) for names in line.names]
        key = (starred(line.text), *patterns)
        groups.setdefault(key, []).append(line)
        for slot, pattern in enumerate(patterns):
            users.setdefault(pattern, set()).add((key, slot))
    told = []
    for key, said in groups.items():
        names = [
            pattern if len(users[pattern]) == 1 else spanned([n for s in said for n in s.names[at]])
            for at, pattern in enumerate(key[1:])
        ]
        told.append(key[0].format(*names) + (f"  x{len(said)}" if len(said) > 1 else ""))
    return told


def starred(text: str) -> str:
    """Text with the numbers of blocks replaced."""
    return re.sub(r"(?<![\w.])\d+(?=\.[A-Za-z_])|(?<=[A-Za-z_]\.)\d+\b", "*", text)


def alike(names: Iterable[str]) -> list[tuple[str, ...]]:
    """Names by what they read like."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(starred(name), []).append(name)
    return [tuple(dict.fromkeys(each)) for each in found.values()]


def spanned(names: Sequence[str]) -> str:
    """Names that differ in numbers, with these numbers.

    >>> spanned(["a.0.w", "a.1.w", "a.2.w", "a.5.w"]), spanned(["a.0.w.1", "a.1.w.0"])
    ('a.0-2,5.w', 'a.0.w.1, a.1.w.0')
    """
    names = list(dict.fromkeys(names))
    parts = [name.split(".") for name in names]
    columns = [list(dict.fromkeys(column)) for column in zip(*parts, strict=False)]
    if len({len(each) for each in parts}) > 1 or math.prod(map(len, columns)) != len(names):
        return ", ".join(names)
    return ".".join(c[0] if len(c) == 1 else _ranges(sorted(map(int, c))) for c in columns)


def _ranges(numbers: Sequence[int]) -> str:
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
