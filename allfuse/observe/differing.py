"""Where two models differ, on a terminal: the whole, a table of layers, and one of tensors."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import TextIO, TypeVar

from rich.console import Console
from rich.table import Table
from rich.text import Text

from allfuse.base.events import Event
from allfuse.base.units import format_count
from allfuse.merge.difference import Compared, Difference
from allfuse.merge.grouping import Group
from allfuse.merge.sums import Sums
from allfuse.observe.bar import Bar
from allfuse.observe.figures import short

WIDTH = 120  # of what is no terminal
SHOWN = 20  # rows of a table, without --all
NAMED = 10  # tensors that one model lacks
LONGEST = 12  # characters of the longest bar

Each = TypeVar("Each", Group, Compared)


def print_difference(
    difference: Difference, *, everything: bool = False, file: TextIO | None = None
) -> None:
    """Print the figures of two models: the whole, and then what differs most.

    Args:
        everything: all rows instead of the first `SHOWN`.
    """
    console = Console(file=file or sys.stdout)
    if not console.is_terminal:
        console.width = WIDTH
    for line in _whole_lines(difference):
        console.print(Text(line), soft_wrap=True)
    if any(each.sums.changed for each in difference.tensors):
        layers, tensors = largest_first(difference.layers()), largest_first(difference.tensors)
        if len(layers) > 1:
            console.print(_table("layer", layers, everything))
        console.print(_table("tensor", tensors, everything))


def largest_first(items: Sequence[Each]) -> list[Each]:
    """By distance, what is not a number first; equal ones stay in their order."""

    def key(item: Each) -> tuple[bool, float]:
        distance = item.sums.distance
        return not math.isnan(distance), -distance

    return sorted(items, key=key)


def _whole_lines(difference: Difference) -> list[str]:
    whole, count = difference.whole, format_count(difference.whole.count)
    of = f", of changes since {difference.base}" if difference.base else ""
    lines = [
        f"{difference.first} and {difference.second}: {count} numbers in "
        f"{format_count(len(difference.floats))} tensors{of}"
    ]
    others = [each for each in difference.tensors if not each.is_float]
    if whole.changed:
        lines.append(f"  {', '.join(f'{name} {text}' for name, text in _texts(whole).items())}")
    else:
        lines.append("  the same numbers everywhere")
    if others:
        apart = format_count(sum(each.sums.changed > 0 for each in others))
        lines.append(f"  {apart} of {format_count(len(others))} tensors of whole numbers differ")
    for what, names in [
        (f"only in {difference.first}", difference.only_first),
        (f"only in {difference.second}", difference.only_second),
        ("of other shapes", difference.shaped),
    ]:
        if names:
            more = " ..." if len(names) > NAMED else ""
            lines.append(f"  {len(names)} {what}: {', '.join(names[:NAMED])}{more}")
    return lines


def _texts(sums: Sums) -> dict[str, str]:
    """The figures as people read them. Cosines near 1 need more digits than others."""
    return {
        "distance": short(sums.distance),
        "cosine": f"{sums.cosine:.6f}",
        "signs": _percent(sums.signs),
        "overlap": _percent(sums.overlap),
        "largest": short(sums.largest),
        "changed": _percent(sums.figures()["changed"]),
    }


def _percent(part: float) -> str:
    return f"{100 * part:.4g} %"


def _table(what: str, items: Sequence[Group | Compared], everything: bool) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column(what, no_wrap=True, overflow="ellipsis")
    for name in _texts(Sums()):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    shown = items if everything else items[:SHOWN]
    finite = [item.sums.distance for item in items if math.isfinite(item.sums.distance)]
    longest = max(finite, default=0.0)
    for item in shown:
        distance = item.sums.distance
        part = distance / longest if longest and math.isfinite(distance) else float(distance != 0)
        texts = [Text(text) for text in _texts(item.sums).values()]
        table.add_row(Text(item.name), *texts, Text("█" * round(LONGEST * part), style="cyan"))
    if len(shown) < len(items):
        table.add_row(Text(f"and {len(items) - len(shown)} more: --all"))
    return table


class DiffProgress(Bar):
    """A sink that draws a bar of the bytes that are compared, on a terminal."""

    def __call__(self, event: Event) -> None:
        if event.name == "comparing":
            self.show("comparing", total=event.data["total"])
        elif event.name == "compared_tensor":
            self.advance(event.data["bytes"])
