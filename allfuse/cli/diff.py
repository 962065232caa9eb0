"""allfuse diff: where two models on disk differ."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from allfuse.base.errors import UserError
from allfuse.cli.options import DebugOption, JsonOption, QuietOption, print_json

if TYPE_CHECKING:
    from allfuse.merge.difference import Difference


def diff(
    first: Annotated[Path, typer.Argument(help="A model, in any form that can be fused.")],
    second: Annotated[Path, typer.Argument(help="Another one.")],
    base: Annotated[
        Path | None,
        typer.Option(metavar="MODEL", help="Compare what each changed since this one."),
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Show all tensors, not only those that differ most.")
    ] = False,
    html: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write a page: a map of layers, and all tensors."),
    ] = None,
    png: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the map as a picture.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(metavar="N", help="Threads; by default the number of cores.")
    ] = None,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Show where two models on disk differ: distance, cosine, signs, overlap, tensor by tensor.

    allfuse diff runs/a runs/b --base base --html differences.html
    """
    if threads is not None and threads < 1:
        raise UserError(f"--threads {threads}: allowed: 1 or more")
    if html is not None or png is not None:
        from allfuse.observe.heatmap import check_place

        if html is not None:
            check_place("--html", html, (".html", ".htm"))
        if png is not None:
            check_place("--png", png, (".png",))
    from allfuse.merge.difference import compare

    found = _watched(
        lambda tell: compare(first, second, base, threads=threads, tell=tell), quiet, as_json
    )
    _draw(found, html, png)
    if as_json:
        print_json({"ok": True, "command": "diff", **_plain(found)})
        return
    from allfuse.observe.differing import print_difference

    print_difference(found, everything=everything)
    for path in (html, png):
        if path is not None:
            print(f"written: {path}")


def _watched(work: Callable[[Any], Difference], quiet: bool, to_stderr: bool) -> Difference:
    if quiet:
        return work(lambda name, **data: None)
    from allfuse.base.events import Bus
    from allfuse.observe.differing import DiffProgress

    bus = Bus()
    with DiffProgress(sys.stderr if to_stderr else sys.stdout) as progress:
        bus.subscribe(progress)
        return work(bus.emit)


def _draw(found: Difference, html: Path | None, png: Path | None) -> None:
    if html is None and png is None:
        return
    from allfuse.observe.heatmap import write_html, write_png

    if html is not None:
        write_html(found, html)
    if png is not None:
        write_png(found, png)


def _plain(found: Difference) -> dict[str, Any]:
    """The figures as plain data, what differs most first."""
    from allfuse.observe.differing import largest_first

    return {
        "first": found.first,
        "second": found.second,
        "base": found.base,
        "same": found.same,
        "numbers": found.whole.count,
        "whole": found.whole.figures(),
        "layers": [
            {"name": layer.name, "tensors": layer.tensors, **layer.sums.figures()}
            for layer in largest_first(found.layers())
        ],
        "tensors": [
            {
                "name": each.name,
                "shape": list(each.shape),
                "dtypes": list(each.dtypes),
                **each.sums.figures(),
            }
            for each in largest_first(found.tensors)
        ],
        "only_first": found.only_first,
        "only_second": found.only_second,
        "shaped": found.shaped,
        "seconds": found.seconds,
    }
