"""Events in words: what both displays and the report say about them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from allfuse.base.events import Event
from allfuse.base.units import format_count
from allfuse.observe.figures import (
    clock,
    duration,
    figure,
    metrics_text,
    percent,
    rate,
    shares_text,
    short,
    size,
)
from allfuse.observe.progress import Progress

Row = tuple[str, str]
MOST_STALENESS = 9  # values of a histogram in one line


def start_rows(start: Mapping[str, Any]) -> list[Row]:
    """What is going to happen, as pairs of label and text; what is not known is left out."""
    rows = [
        ("plan", start.get("plan")),
        ("promise", start.get("promise")),
        ("workers", _workers_text(start)),
        ("model", _model_text(start)),
        ("data", _data_text(start)),
        ("run folder", start.get("out")),
    ]
    if start.get("resumed_step"):
        rows.append(("resumed", f"after step {start['resumed_step']}"))
    return [(label, str(text)) for label, text in rows if text]


def choice_rows(start: Mapping[str, Any]) -> list[Row]:
    """What was derived rather than given, and why."""
    return [(f"chose {name}", str(text)) for name, text in (start.get("choices") or {}).items()]


def _workers_text(start: Mapping[str, Any]) -> str:
    workers = start.get("workers")
    if workers is None:
        return ""
    device = str(start.get("device") or "cpu")
    parts = [f"{workers} on {device.split(':')[0] if workers > 1 else device}"]
    if workers > 1 and start.get("link"):
        parts.append(f"linked by {start['link']}")
    threads = start.get("threads")
    if threads:
        each = " each" if workers > 1 else ""
        parts.append(f"{threads} thread{'s' if threads != 1 else ''}{each}")
    return ", ".join(parts)


def _model_text(start: Mapping[str, Any]) -> str:
    count = start.get("parameters")
    return "" if count is None else f"{format_count(count)} parameters"


def _data_text(start: Mapping[str, Any]) -> str:
    parts = []
    for key, before, after in (
        ("samples", "", " samples"),
        ("batch_size", "batches of ", ""),
        ("steps_per_epoch", "", " steps an epoch"),
        ("total_steps", "", " steps in all"),
    ):
        if start.get(key) is not None:
            parts.append(f"{before}{format_count(start[key])}{after}")
    return ", ".join(parts)


def epoch_text(progress: Progress) -> str:
    """The epoch as people count, from 1, and of how many: `epoch 3/10`; "" when not known."""
    epoch = progress.last.get("epoch")
    if epoch is None:
        return ""
    total, per_epoch = progress.total_steps, progress.start.get("steps_per_epoch")
    of = f"/{math.ceil(total / per_epoch)}" if total and per_epoch else ""
    return f"epoch {epoch + 1}{of}"


def step_line(progress: Progress) -> str:
    """Where training is: `step 120/1000  epoch 3  loss 0.4321  ...`."""
    last = progress.last
    total = progress.total_steps
    parts = [f"step {progress.step}" + (f"/{total}" if total is not None else "")]
    parts.append(epoch_text(progress))
    parts.append(f"loss {figure(progress.loss)}")
    if last.get("grad_norm") is not None:
        parts.append(f"grad {short(last['grad_norm'])}")
    if last.get("lr") is not None:
        parts.append(f"lr {last['lr']:.1e}")
    parts.append(rate(progress.speed.samples_per_s))
    if progress.seconds_left:
        parts.append(f"left {clock(progress.seconds_left)}")
    if len(last.get("shares") or ()) > 1:
        parts.append(f"shares {shares_text(last['shares'])}")
        busy = [part for part in last.get("busy") or () if part is not None]
        if busy:
            parts.append(f"busy {percent(min(busy))} to {percent(max(busy))}")
        parts.append(f"fused {size(progress.fused_bytes)}")
    return "  ".join(part for part in parts if part)


def scored_line(scored: Mapping[str, Any]) -> str:
    """How far prediction is."""
    rows, total = scored.get("rows", 0), scored.get("total_rows")
    parts = [f"scored {format_count(rows)}{f'/{format_count(total)}' if total else ''} rows"]
    parts.append(rate(scored.get("rows_per_s"), "rows"))
    if scored.get("seconds_left"):
        parts.append(f"left {clock(scored['seconds_left'])}")
    if len(scored.get("shares") or ()) > 1:
        parts.append(f"shares {shares_text(scored['shares'])}")
    return "  ".join(parts)


def compared_line(compared: Mapping[str, Any]) -> str:
    """How far a run is from its reference, at one step."""
    parts = [f"compared step {compared.get('step')}/{compared.get('steps')}  differences:"]
    parts.append(f"loss {short(compared.get('loss_difference'))}")
    parts.append(f"grad {short(compared.get('grad_norm_difference'))}")
    parts.append(f"weights {short(compared.get('weight_difference'))}")
    if compared.get("tensor"):
        parts.append(f"in {compared['tensor']}")
    return "  ".join(parts)


def evaluated_line(event: Event, progress: Progress) -> str:
    """One evaluation: `step 22/110  validation: accuracy 0.6157 (best so far)  ...`."""
    data, total = event.data, progress.total_steps
    of = f"/{total}" if total is not None else ""
    metrics = metrics_text(data.get("metrics") or {})
    best = " (best so far)" if data.get("best") else ""
    line = f"step {event.step}{of}  {data.get('split', 'validation')}: {metrics}{best}"
    if data.get("samples"):
        line += f"  {format_count(data['samples'])} samples in {duration(data.get('seconds'))}"
    return line


def message(event: Event) -> str | None:
    """The line for an event that is told as it comes; None for those that show progress."""
    data = event.data
    match event.name:
        case "note":
            text = str(data.get("text", ""))
        case "warning":
            text = f"warning: {data.get('text', '')}"
        case "lost":
            text = f"lost: {data.get('text', '')}"
        case "saved":
            text = (
                f"saved step {data.get('step')} to {data.get('path')}: {size(data.get('bytes'))}"
                f" in {duration(data.get('seconds'))}, training waited"
                f" {duration(data.get('stalled_seconds'))}"
            )
        case "not_saved":
            text = f"warning: step {data.get('step')} was not saved: {data.get('reason')}"
        case "stop":
            text = f"stopping: {data.get('reason')}"
        case "join":
            text = f"{data.get('worker')} takes part"
        case "leave":
            text = f"{data.get('worker')} has left"
        case "server_lost":
            text = f"lost: the server of shard {data.get('shard')}: {data.get('reason')}"
        case "server_restored":
            text = (
                f"a server of shard {data.get('shard')} goes on at version {data.get('sequence')}, "
                f"without the last {data.get('lost')} updates"
            )
        case "staleness":
            text = staleness_text(data.get("missed") or [])
        case _:
            return None
    return text if event.rank == 0 else f"rank {event.rank}: {text}"


def staleness_text(missed: Iterable[Sequence[int]]) -> str:
    """How many updates were made without so many others, in percent of all."""
    counts = {int(value): int(count) for value, count in missed}
    total = sum(counts.values())
    if not total:
        return "no updates"
    shown = sorted(counts.items())[:MOST_STALENESS]
    parts = [f"{value}: {percent(count / total)}" for value, count in shown]
    rest = total - sum(count for _, count in shown)
    parts += [f"more: {percent(rest / total)}"] if rest else []
    mean = sum(value * count for value, count in counts.items()) / total
    return (
        f"staleness of {format_count(total)} updates (others that each missed): "
        f"{', '.join(parts)}; mean {mean:.2f}, most {max(counts)}"
    )


def aligned(rows: list[Row]) -> list[str]:
    """Label and text in two columns."""
    width = max((len(label) for label, _ in rows), default=0)
    lines = []
    for label, text in rows:
        first, *more = text.split("\n")
        lines.append(f"{label:<{width}}  {first}".rstrip())
        lines += [f"{'':<{width}}  {line}" for line in more]
    return lines
