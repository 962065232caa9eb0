"""A search for the best fusion: candidates as they are judged, and the report at the end."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

from allfuse.base.events import Event
from allfuse.observe.bar import COUNTS, Bar

WIDTH = 100  # of what is no terminal
SHOWN = 12  # candidates of the table of all


class SearchProgress(Bar):
    """A sink that draws a bar of the candidates, and what was the best; a line for each candidate
    where it is no terminal."""

    columns = COUNTS

    def __call__(self, event: Event) -> None:
        data = event.data
        if event.name == "searching":
            self.show("searching", total=data["total"])
            self.log(f"searching: {data['search']} over {data['models']} models")
        elif event.name == "judged":
            figures = f"{data['metric']} {data['figure']:.4g}, best {data['best']:.4g}"
            self.show(figures, completed=data["number"])
            known = " (known)" if data["known"] else ""
            figure = f"{data['metric']} {data['figure']:.4g}{known}"
            self.log(f"judged {data['number']}: {data['candidate']}: {figure}")


def print_report(report: Mapping[str, Any], file: TextIO | None = None) -> None:
    """Print what a search found: a table of the rows that matter, then notes."""
    console = Console(file=file or sys.stdout)
    if not console.is_terminal:
        console.width = WIDTH
    numbered = (f"{number} {path}" for number, path in enumerate(report["models"], start=1))
    console.print(Text(f"models: {', '.join(numbered)}"), soft_wrap=True)
    console.print(_rows(report))
    if report["search"] == "methods":
        console.print(_all(report))
    gain = report["gain"]["test"]
    console.print(
        Text(
            f"chosen against the best single model, on test data: {_signed(gain['figure'])} "
            f"{report['metric']}{_ends(gain['interval'], signed=True)}, above 0 is better"
        ),
        soft_wrap=True,
    )
    console.print(
        Text(f"  intervals hold 95 % of resamples of the {report['units']}"), soft_wrap=True
    )
    for note in report["notes"]:
        console.print(Text(f"  note: {note}"), soft_wrap=True)
    judged = f"{report['candidates']} candidates, {report['known_before']} answers known before"
    what = report["rows"]["chosen"]["what"]
    console.print(Text(f"{report['out']}: {what} ({judged})"), soft_wrap=True)


def _rows(report: Mapping[str, Any]) -> Table:
    rows = report["rows"]
    samples = {name: rows["chosen"][name]["samples"] for name in ("validation", "test")}
    table = Table(box=None, pad_edge=False)
    table.add_column(Text(report["metric"]), no_wrap=True)
    for name, count in samples.items():
        table.add_column(f"{name} ({count:,})", no_wrap=True)
    table.add_column("what", overflow="fold")
    for name, row in rows.items():
        cells = [
            Text(f"{_number(row[data]['figure'])}{_ends(row[data]['interval'])}")
            for data in samples
        ]
        table.add_row(name, *cells, Text(row["what"]))
    return table


def _all(report: Mapping[str, Any]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("validation", no_wrap=True)
    table.add_column("what", overflow="fold")
    judged = report["judged"]
    for row in judged[:SHOWN]:
        table.add_row(_number(row["validation"]), Text(row["what"]))
    if len(judged) > SHOWN:
        table.add_row("...", Text(f"and {len(judged) - SHOWN} more, in the report"))
    return table


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.4f}"


def _signed(value: float) -> str:
    return f"{value:+.4f}"


def _ends(ends: list[float] | None, signed: bool = False) -> str:
    if ends is None:
        return ""
    low, high = (_signed(end) if signed else f"{end:.4f}" for end in ends)
    return f" [{low}, {high}]"
