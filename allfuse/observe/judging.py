"""A search for the best fusion: candidates as they are judged, and the report at the end."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from allfuse.base.events import Event

WIDTH = 100  # of what is no terminal
SHOWN = 12  # candidates of the table of all


class SearchProgress:
    """A sink that draws a bar of the candidates, and what was the best; a line for each candidate
    where it is no terminal. A context manager."""

    def __init__(self, file: TextIO | None = None) -> None:
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=Console(file=file or sys.stdout),
            transient=True,
        )
        self._task = self._bar.add_task("searching", total=None, visible=False)

    def __call__(self, event: Event) -> None:
        data, is_live = event.data, self._bar.console.is_terminal
        if event.name == "searching":
            self._bar.update(self._task, total=data["total"], visible=True)
            if not is_live:
                self._say(f"searching: {data['search']} over {data['models']} models")
        elif event.name == "judged":
            figures = f"{data['metric']} {data['figure']:.4g}, best {data['best']:.4g}"
            self._bar.update(self._task, completed=data["number"], description=figures)
            if not is_live:
                known = " (known)" if data["known"] else ""
                figure = f"{data['metric']} {data['figure']:.4g}{known}"
                self._say(f"judged {data['number']}: {data['candidate']}: {figure}")

    def _say(self, text: str) -> None:
        self._bar.console.print(Text(text), soft_wrap=True)

    def __enter__(self) -> SearchProgress:
        if self._bar.console.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar.console.is_terminal:
            self._bar.stop()


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
