"""What the live display shows of one moment."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from allfuse.base.units import format_count
from allfuse.observe.chart import sparkline
from allfuse.observe.figures import (
    clock,
    duration,
    figure,
    fractions,
    is_finite,
    metrics_text,
    percent,
    rate,
    shares_text,
    short,
    size,
)
from allfuse.observe.progress import Progress
from allfuse.observe.report import WIDTH
from allfuse.observe.wording import epoch_text, start_rows

WORKERS = 8  # shown one by one; more are summed up in a line
SHARE_WIDTH = 24  # of a worker's bar

Row = tuple[str, RenderableType]


def panel(progress: Progress) -> Panel:
    """The panel for a run as it stands."""
    table = Table.grid(padding=(0, 2), expand=True)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(ratio=1, overflow="fold")
    for label, content in _rows(progress):
        table.add_row(label, content)
    return Panel(
        table,
        title=Text(f"allfuse: {progress.state}"),
        title_align="left",
        border_style="yellow" if progress.state == "stopping" else "cyan",
        padding=(0, 1),
        width=WIDTH,
    )


def _rows(progress: Progress) -> Iterator[Row]:
    for label, text in start_rows(progress.start):
        if label in ("plan", "promise"):
            yield label, Text(text, style="bold" if label == "plan" else "")
    if progress.state == "predicting":
        yield from _scored_rows(progress.scored)
    elif progress.state == "verifying":
        yield from _compared_rows(progress)
    else:
        yield from _training_rows(progress)


def _training_rows(progress: Progress) -> Iterator[Row]:
    total = progress.total_steps
    yield "step", _bar(progress.step, total, f"{progress.step}" + (f"/{total}" if total else ""))
    times = [epoch_text(progress), f"elapsed {clock(progress.elapsed_seconds)}"]
    if progress.seconds_left:
        times.append(f"left {clock(progress.seconds_left)}")
    yield "time", Text("   ".join(part for part in times if part))
    if not progress.steps:
        return
    yield "loss", _loss(progress)
    yield "gradient", _gradient(progress.last)
    yield "speed", _speed(progress)
    for split, (step, data) in progress.evaluated.items():
        yield split, _evaluation(progress, split, step, data)
    yield from _worker_rows(progress.last)
    if progress.fused_bytes:
        last = size(progress.last.get("fused_bytes"))
        text = f"{size(progress.fused_bytes)} sent by each worker, {last} in the last step"
        yield "fused", Text(text)
    if progress.rounds:
        text = f"{format_count(progress.rounds)} of weights, {size(progress.round_bytes)}"
        yield "rounds", Text(text)


def _bar(done: float, total: float | None, text: str) -> Table:
    """A progress bar behind its figures; one that only moves when there is no total."""
    line = Table.grid(padding=(0, 2), expand=True)
    line.add_column(no_wrap=True)
    line.add_column(ratio=1)
    line.add_column(no_wrap=True, justify="right")
    bar = ProgressBar(total=total or None, completed=done, pulse=not total)
    line.add_row(Text(text, style="bold"), bar, percent(done / total) if total else "")
    return line


def _loss(progress: Progress) -> Text:
    finite = progress.loss is None or is_finite(progress.loss)
    text = Text(figure(progress.loss), style="bold" if finite else "bold red")
    text.append(f"   smoothed {figure(progress.smooth_loss)}   ", style="default not bold")
    text.append(sparkline(progress.curve.points()), style="cyan not bold")
    return text


def _gradient(last: Mapping[str, Any]) -> Text:
    norm = last.get("grad_norm")
    parts = [] if norm is None else [f"norm {short(norm)}"]
    if last.get("lr") is not None:
        parts.append(f"learning rate {last['lr']:.1e}")
    broken = norm is not None and not is_finite(norm)
    return Text("   ".join(parts), style="red" if broken else "")


def _speed(progress: Progress) -> Text:
    text = Text(rate(progress.speed.samples_per_s), style="bold")
    text.append(f"   {duration(progress.speed.seconds_per_step)} a step", style="not bold")
    return text


def _evaluation(progress: Progress, split: str, step: int, data: Mapping[str, Any]) -> Text:
    text = Text(metrics_text(data.get("metrics") or {}))
    text.append(f"   at step {step}", style="dim")
    best_step, best = progress.best.get(split, (None, None))
    if best_step == step:
        text.append("   ★ best", style="green")
    elif best is not None:
        text.append(f"\n★ best {metrics_text(best.get('metrics') or {})}", style="green")
        text.append(f"   at step {best_step}", style="dim")
    return text


def _worker_rows(last: Mapping[str, Any]) -> Iterator[Row]:
    shares = last.get("shares") or ()
    busy = last.get("busy") or [None] * len(shares)
    if len(shares) < 2:
        return
    if len(shares) > WORKERS:
        text = Text(shares_text(shares))
        known = [(part, worker) for worker, part in enumerate(busy) if part is not None]
        if known:
            least, most = min(known), max(known)
            text.append(f"   busy {percent(least[0])} (worker {least[1]}) to")
            text.append(f" {percent(most[0])} (worker {most[1]})")
        yield "workers", text
        return
    for worker, (part, at_work) in enumerate(zip(fractions(shares), busy, strict=False)):
        filled = round(part * SHARE_WIDTH)
        text = Text("█" * filled, style="cyan")
        text.append("░" * (SHARE_WIDTH - filled), style="dim")
        text.append(f"  {percent(part)} of the batch", style="default not dim")
        if at_work is not None:
            text.append(f"   busy {percent(at_work)}", style="dim")
        yield f"worker {worker}", text


def _scored_rows(scored: Mapping[str, Any]) -> Iterator[Row]:
    rows, total = scored.get("rows", 0), scored.get("total_rows")
    yield (
        "rows",
        _bar(rows, total, format_count(rows) + (f"/{format_count(total)}" if total else "")),
    )
    text = Text(rate(scored.get("rows_per_s"), "rows"), style="bold")
    if scored.get("seconds_left"):
        text.append(f"   left {clock(scored['seconds_left'])}", style="not bold")
    yield "speed", text
    yield from _worker_rows(scored)


def _compared_rows(progress: Progress) -> Iterator[Row]:
    compared, worst = progress.compared, progress.worst
    step, steps = compared.get("step", 0), compared.get("steps")
    yield "step", _bar(step, steps, f"{step}" + (f"/{steps}" if steps else ""))
    for label, key in (("loss", "loss_difference"), ("gradient", "grad_norm_difference")):
        yield label, Text(f"differs by {short(compared.get(key))}")
    where = f" in {compared['tensor']}" if compared.get("tensor") else ""
    yield "weights", Text(f"differ by {short(compared.get('weight_difference'))}{where}")
    if worst:
        where = f" in {worst['tensor']}" if worst.get("tensor") else ""
        text = f"{short(worst.get('weight_difference'))}{where} at step {worst.get('step')}"
        yield "largest", Text(text)
