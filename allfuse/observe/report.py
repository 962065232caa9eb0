"""The summary after a run: a table and the curve of the loss, as text or for a terminal."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from allfuse.base.events import Event
from allfuse.base.units import format_count
from allfuse.observe.chart import braille_chart
from allfuse.observe.figures import duration, figure, metrics_text, rate, short, size
from allfuse.observe.progress import Progress
from allfuse.observe.wording import Row, aligned, start_rows

if TYPE_CHECKING:
    from rich.console import RenderableType

WIDTH = 96  # of what is drawn on a terminal that is wider
TROUBLE = ("not saved", "lost", "warnings")
MORE = 3  # lost workers that are named; the others are counted


def final_rows(source: Progress | Iterable[Event]) -> list[Row]:
    """The summary as pairs of label and text; what did not happen is left out."""
    progress = _progress(source)
    rows = [row for row in start_rows(progress.start) if row[0] not in ("data", "run folder")]
    rows += _training_rows(progress)
    for split, (step, data) in progress.evaluated.items():
        best_step, best = progress.best.get(split, (step, data))
        rows.append((split, _metrics_at(step, data)))
        if best_step != step:
            rows.append((f"best {split}", _metrics_at(best_step, best)))
    rows += _traffic_rows(progress)
    rows += _verify_rows(progress)
    rows += _scored_rows(progress)
    rows += _folder_rows(progress)
    return rows


def final_text(source: Progress | Iterable[Event], *, charts: bool = True, width: int = 80) -> str:
    """The summary as plain text.

    Args:
        source: the events of a run, in order, or what they were added up to.
        charts: draw the loss curve; needs a reader that shows Unicode.
        width: of the drawing, in characters.
    """
    progress = _progress(source)
    lines = [final_title(progress), *(f"  {line}" for line in aligned(final_rows(progress)))]
    chart = braille_chart(progress.curve.points(), width=width - 2) if charts else []
    if chart:
        lines += ["", "  training loss", *(f"  {line}" for line in chart)]
    return "\n".join(lines)


def final_table(source: Progress | Iterable[Event], *, width: int = 80) -> RenderableType:
    """The summary for a terminal of this width that rich draws on."""
    from rich import box
    from rich.console import Group
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    progress = _progress(source)
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for label, text in final_rows(progress):
        table.add_row(label, Text(text, style="yellow" if label in TROUBLE else ""))
    parts: list[RenderableType] = [table]
    chart = braille_chart(progress.curve.points(), width=min(width, WIDTH) - 4)
    if chart:
        parts += [Text(), Text("training loss", style="dim")]
        parts += [Text(line, style="cyan", no_wrap=True, overflow="crop") for line in chart]
    done = progress.state == "done" and not progress.lost
    return Panel(
        Group(*parts),
        title=Text(final_title(progress)),
        title_align="left",
        border_style="green" if done else "yellow",
        box=box.ROUNDED,
        padding=(0, 1),
        width=min(width, WIDTH),
    )


def final_title(progress: Progress) -> str:
    """What the summary is of, in a few words."""
    reason = progress.end.get("reason") or progress.stop_reason
    return f"allfuse: {reason}" if reason else f"allfuse: {progress.state}"


def _progress(source: Progress | Iterable[Event]) -> Progress:
    return source if isinstance(source, Progress) else Progress.of(source)


def _training_rows(progress: Progress) -> list[Row]:
    end = progress.end
    if not (progress.steps or end):
        return []
    steps = format_count(progress.step)
    if progress.start.get("resumed_step"):
        if not progress.steps:
            return [("steps", f"{steps}, nothing was left to do")]
        steps += f", {format_count(progress.steps)} of them since it was resumed"
    seconds = end.get("seconds", progress.elapsed_seconds)
    samples = end.get("samples", progress.samples)
    speed = end.get("samples_per_s", progress.speed.samples_per_s)
    rows = [("steps", steps), ("time", duration(seconds))]
    rows.append(("speed", f"{rate(speed)}, {format_count(samples)} samples"))
    loss = end.get("loss", progress.loss)
    if loss is not None and math.isfinite(loss):
        rows.append(("loss", figure(loss) + _fall_text(progress)))
    return rows


def _fall_text(progress: Progress) -> str:
    """Where the loss came from. A run that was resumed may have begun where nobody was looking."""
    if progress.first_loss is None or progress.steps < 2:
        return ""
    step, loss = progress.first_loss
    resumed = progress.start.get("resumed_step") or 0
    seen = not resumed or step <= resumed
    return f", from {figure(loss)} " + ("at the start" if seen else "where it was resumed")


def _metrics_at(step: int, data: Mapping[str, Any]) -> str:
    return f"{metrics_text(data.get('metrics') or {})} at step {format_count(step)}"


def _traffic_rows(progress: Progress) -> list[Row]:
    fused = progress.end.get("fused_bytes", progress.fused_bytes)
    rows = []
    if fused and progress.steps:
        each = size(fused / max(progress.steps, 1))
        rows.append(("fused", f"{size(fused)} sent by each worker, {each} per step"))
    if progress.rounds:
        text = f"{format_count(progress.rounds)} of weights, {size(progress.round_bytes)}"
        rows.append(("rounds", text))
    return rows


def _verify_rows(progress: Progress) -> list[Row]:
    worst = progress.worst
    if not worst:
        return []
    where = f" in {worst['tensor']}" if worst.get("tensor") else ""
    text = f"{short(worst.get('weight_difference'))}{where} at step {worst.get('step')}"
    return [
        ("compared", f"{progress.compared.get('step')} steps"),
        ("largest difference of weights", text),
    ]


def _scored_rows(progress: Progress) -> list[Row]:
    scored = progress.scored
    if not scored:
        return []
    rows = format_count(scored.get("rows", 0))
    return [("scored", f"{rows} rows, {rate(scored.get('rows_per_s'), 'rows')}")]


def _folder_rows(progress: Progress) -> list[Row]:
    rows = []
    if progress.saved:
        saved = progress.saved
        rows.append(("checkpoint", f"step {saved.get('step')}: {saved.get('path')}"))
    if progress.not_saved:
        missed = progress.not_saved
        rows.append(("not saved", f"step {missed.get('step')}: {missed.get('reason')}"))
    if progress.lost:
        more = len(progress.lost) - MORE
        named = [*progress.lost[:MORE], *([f"and {more} more"] if more > 0 else [])]
        rows.append(("lost", "\n".join(named)))
    if progress.warnings:
        rows.append(("warnings", format_count(progress.warnings)))
    if progress.start.get("out"):
        rows.append(("run folder", str(progress.start["out"])))
    return rows
