"""A picture of where two models differ: a row for each layer, a column for each kind of tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from io import BytesIO
from pathlib import Path
from typing import Any

from allfuse.base.errors import UserError
from allfuse.merge.difference import Difference
from allfuse.merge.sums import Sums
from allfuse.observe.differing import largest_first
from allfuse.store.durable import explain, replace_bytes

LIGHT, DARK = (247, 251, 255), (8, 48, 107)  # of the least distance and the largest
NOT_FINITE = "#d62728"
ROWS = 2000  # tensors in the page's table


@dataclass(frozen=True)
class Picture:
    """Which cell is of which layer and kind; `cells` has those that there are."""

    layers: list[str]
    kinds: list[str]
    cells: dict[tuple[str, str], Sums]

    @property
    def top(self) -> float:
        """The largest distance of a cell."""
        found = [sums.distance for sums in self.cells.values()]
        return max((value for value in found if math.isfinite(value)), default=0.0)


def draw(difference: Difference) -> Picture:
    """The cells of a picture, layers and kinds in the order of the tensors' names."""
    return Picture(
        [group.name for group in difference.layers()],
        [group.name for group in difference.kinds()],
        difference.cells(),
    )


def check_place(option: str, path: Path, suffixes: Sequence[str]) -> None:
    """Refuse a place that no picture can be written to, before anything is computed.

    Raises:
        UserError: another kind of file by its name, a folder that is not there, or, of a PNG, the
            package matplotlib is not installed.
    """
    if path.suffix.lower() not in suffixes:
        raise UserError(f"{option} {path}: allowed: a name that ends with {' or '.join(suffixes)}")
    if not path.parent.is_dir() or path.is_dir():
        raise UserError(f"{option} {path}: {path.parent} is no folder, or {path} is one")
    if ".png" in suffixes:
        try:
            import matplotlib.figure  # noqa: F401
        except ImportError as error:
            raise UserError(
                f"{option} {path}: the package matplotlib cannot be loaded ({error}); install it "
                "with `pip install allfuse[report]`, or write a page with --html"
            ) from error


def write_png(difference: Difference, path: Path) -> None:
    """Write the picture as a PNG, whole or not at all.

    Raises:
        UserError: it cannot be written.
    """
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

    picture = draw(difference)
    rows, columns = len(picture.layers), len(picture.kinds)
    numbers = [
        [_distance(picture.cells.get((layer, kind))) for kind in picture.kinds]
        for layer in picture.layers
    ]
    figure: Any = Figure(
        figsize=(min(4 + 0.35 * columns, 60), min(2.5 + 0.22 * rows, 60)), layout="constrained"
    )
    axes = figure.add_subplot()
    colors = LinearSegmentedColormap.from_list("distance", [_hex(0.0), _hex(1.0)])
    image = axes.imshow(numbers, aspect="auto", cmap=colors, vmin=0, vmax=picture.top or 1)
    axes.set_xticks(range(columns), picture.kinds, rotation=60, ha="right", fontsize=7)
    axes.set_yticks(range(rows), picture.layers, fontsize=7)
    axes.set_title(_title(difference), fontsize=8, wrap=True, parse_math=False)
    figure.colorbar(image, label="distance |x - y| / |x|")
    content = BytesIO()
    figure.savefig(content, format="png", dpi=120)
    _write(path, content.getvalue())


def write_html(difference: Difference, path: Path) -> None:
    """Write a page by itself, without scripts: the picture, whose cells tell their figures, and a
    table of all tensors.

    Raises:
        UserError: it cannot be written.
    """
    _write(path, page(difference).encode(errors="replace"))


def page(difference: Difference) -> str:
    """The text of the page."""
    picture = draw(difference)
    figures = list(Sums().figures())
    head = "".join(f"<th><div>{escape(kind)}</div></th>" for kind in picture.kinds)
    rows = "".join(
        f"<tr><th>{escape(layer)}</th>"
        + "".join(
            _cell(layer, kind, picture.cells.get((layer, kind)), picture.top)
            for kind in picture.kinds
        )
        + "</tr>"
        for layer in picture.layers
    )
    tensors = largest_first(difference.tensors)
    listed = "".join(
        f"<tr><th>{escape(each.name)}</th><td>{list(each.shape)}</td>"
        + "".join(f"<td>{value:.6g}</td>" for value in each.sums.figures().values())
        + "</tr>"
        for each in tensors[:ROWS]
    )
    more = f"<p>and {len(tensors) - ROWS:,} more</p>" if len(tensors) > ROWS else ""
    others = "".join(
        f"<p>{what}: {escape(', '.join(names))}</p>"
        for what, names in [
            ("only in the first", difference.only_first),
            ("only in the second", difference.only_second),
            ("of other shapes", difference.shaped),
        ]
        if names
    )
    whole = ", ".join(f"{n} {value:.6g}" for n, value in difference.whole.figures().items())
    return PAGE.format(
        title=escape(_title(difference)),
        whole=escape(whole),
        others=others,
        low=_hex(0.0),
        high=_hex(1.0),
        top=f"{picture.top:.3g}",
        head=head,
        rows=rows,
        names="".join(f"<th>{name}</th>" for name in figures),
        tensors=listed,
        more=more,
    )


def _cell(layer: str, kind: str, sums: Sums | None, top: float) -> str:
    if sums is None:
        return "<td></td>"
    told = "\n".join(f"{name} {value:.6g}" for name, value in sums.figures().items())
    distance = sums.distance
    color = _hex(distance / top if top else 0.0) if math.isfinite(distance) else NOT_FINITE
    title = escape(f"{layer}.{kind}\n{told}", quote=True)
    return f'<td style="background:{color}" title="{title}"></td>'


def _distance(sums: Sums | None) -> float:
    return math.nan if sums is None else sums.distance


def _hex(part: float) -> str:
    """A color between the lightest and the darkest."""
    mixed = (round(a + (b - a) * part) for a, b in zip(LIGHT, DARK, strict=True))
    return "#" + "".join(f"{value:02x}" for value in mixed)


def _title(difference: Difference) -> str:
    since = f", changes since {difference.base}" if difference.base else ""
    return f"{difference.first} and {difference.second}{since}"


def _write(path: Path, content: bytes) -> None:
    try:
        replace_bytes(path, content)
    except OSError as error:
        raise UserError(explain(error, path)) from error


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 13px system-ui, sans-serif; margin: 2em; color: #222; }}
table {{ border-collapse: collapse; }}
th {{ font-weight: normal; text-align: left; padding: 0 .6em 0 0; white-space: nowrap; }}
.map td {{ width: 22px; height: 16px; min-width: 22px; border: 1px solid #fff; padding: 0; }}
.map thead th {{ height: 13em; vertical-align: bottom; padding: 0; }}
.map thead th div {{ writing-mode: vertical-rl; transform: rotate(180deg); margin: auto; }}
.list td {{ text-align: right; padding: 0 .6em; font-variant-numeric: tabular-nums; }}
.key {{ display: inline-block; width: 12em; height: 1em;
  background: linear-gradient(to right, {low}, {high}); }}
</style></head><body>
<h1>{title}</h1>
<p>{whole}</p>{others}
<p>distance |x - y| / |x|: 0 <span class="key"></span> {top}</p>
<table class="map"><thead><tr><th></th>{head}</tr></thead><tbody>{rows}</tbody></table>
<h2>Tensors, largest distance first</h2>
<table class="list"><thead><tr><th>tensor</th><th>shape</th>{names}</tr></thead>
<tbody>{tensors}</tbody></table>{more}
</body></html>
"""
