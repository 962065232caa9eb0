"""The console and the summary: what people read while and after a run.

One file although it is long: all of it tells the same few events of one run.
"""

from __future__ import annotations

import io
import math
import os
import pty
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest

from allfuse.base.events import Event
from allfuse.observe import Console, Progress, final_rows, final_text
from allfuse.observe.chart import Curve, braille_chart, sparkline

START = {
    "plan": "data(2)",
    "promise": "exact",
    "workers": 2,
    "device": "cpu",
    "link": "gloo",
    "threads": 1,
    "samples": 1347,
    "batch_size": 64,
    "steps_per_epoch": 22,
    "total_steps": 110,
    "parameters": 1234567,
    "resumed_step": 0,
    "out": "runs/digits",
    "choices": {"topology": "native, because gloo is there"},
}


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True

    def text(self) -> str:
        return re.sub(r"\x1b\[[?0-9;]*[A-Za-z]", "", self.getvalue())

    def cursor_is_shown(self) -> bool:
        controls = re.findall(r"\x1b\[\?25([hl])", self.getvalue())
        return not controls or controls[-1] == "h"


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("LINES", "40")
    monkeypatch.setattr("allfuse.observe.live.COST", 1e9)  # draw as often as refresh_s says
    return Terminal()


def event(name: str, step: int = 0, rank: int = 0, **data: Any) -> Event:
    return Event(name=name, time=0.1 * step, rank=rank, step=step, data=data)


def start(**changes: Any) -> Event:
    return event("start", **{**START, **changes})


def step(number: int, **changes: Any) -> Event:
    data = {
        "epoch": (number - 1) // 22,
        "loss": 2.0 / number,
        "grad_norm": 1.234,
        "lr": 3e-3,
        "samples": 64,
        "seconds": 0.1,
        "shares": [32, 32],
        "busy": [0.9, 0.75],
        "fused_bytes": 4_200_000,
    }
    return event("step", number, **{**data, **changes})


def evaluated(number: int, accuracy: float, best: bool, split: str = "validation") -> Event:
    data: dict[str, Any] = {"split": split, "metrics": {"accuracy": accuracy}, "best": best}
    return event("evaluated", number, samples=180, seconds=0.02, **data)


def end(number: int) -> Event:
    figures = {"steps": number, "seconds": 11.0, "samples": 7040, "samples_per_s": 640.0}
    return event("end", number, reason="done", fused_bytes=462e6, loss=0.05, **figures)


def plain(*events: Event) -> str:
    stream = io.StringIO()
    with Console(stream, interactive=False) as console:
        for told in events:
            console(told)
    return stream.getvalue()


@pytest.mark.parametrize(
    "figure",
    [
        "step 1/110",
        "epoch 1/5",
        "loss 2.0000",
        "grad 1.23",
        "lr 3.0e-03",
        "640 samples/s",
        "left 11 s",
        "shares 50/50 %",
        "busy 75 % to 90 %",
        "fused 4.2 MB",
    ],
)
def test_plain_step_line_has_every_figure(figure: str) -> None:
    assert figure in plain(start(), step(1))


def test_plain_lines_tell_first_and_last_step_and_skip_between() -> None:
    text = plain(start(), *(step(number) for number in range(1, 51)))
    assert re.findall(r"^step (\d+)/110", text, re.MULTILINE) == ["1", "50"]


def test_plain_lines_tell_every_evaluation_and_mark_the_best() -> None:
    text = plain(start(), step(1), evaluated(1, 0.5, True), step(2), evaluated(2, 0.4, False))
    assert "validation: accuracy 0.5000 (best so far)" in text
    assert "validation: accuracy 0.4000  180 samples" in text


def test_plain_start_says_plan_promise_data_and_choices() -> None:
    text = plain(start())
    for part in ("data(2)", "exact", "2 on cpu, linked by gloo, 1 thread each", "1,347 samples"):
        assert part in text
    assert "chose topology  native, because gloo is there" in text


@pytest.mark.parametrize(
    ("told", "line"),
    [
        (event("note", text="hello"), "hello"),
        (event("warning", rank=3, text="slow"), "rank 3: warning: slow"),
        (event("not_saved", step=0, reason="disk full"), "step 7 was not saved: disk full"),
        (event("lost", text="rank 1 is gone"), "lost: rank 1 is gone"),
        (event("stop", reason="5 epochs done"), "stopping: 5 epochs done"),
    ],
)
def test_messages_are_told_in_one_line(told: Event, line: str) -> None:
    if told.name == "not_saved":
        told = Event(name=told.name, time=0, rank=0, step=9, data={**told.data, "step": 7})
    assert line in plain(told)


@pytest.mark.parametrize("interactive", [False, True])
def test_missing_and_infinite_figures_are_shown(interactive: bool, terminal: Terminal) -> None:
    console = Console(terminal, interactive=interactive, refresh_s=0)
    console(start(total_steps=None, steps_per_epoch=None, samples=None, promise=None, out=None))
    console(step(1, loss=math.nan, grad_norm=math.inf, busy=None, seconds=0.0))
    console(step(2, loss=None, grad_norm=None, lr=None, busy=[None, 0.5], shares=[0, 0]))
    console(event("evaluated", 2, split="test", metrics={"loss": math.nan}, best=False))
    console(event("step", 3))
    console(end(3))
    console.close()
    assert "nan" in terminal.text()
    assert "fail" not in terminal.text()


@pytest.mark.parametrize("interactive", [False, True])
def test_scoring_and_comparing_show_how_far_they_are(interactive: bool, terminal: Terminal) -> None:
    with Console(terminal, interactive=interactive, refresh_s=0) as console:
        figures = {"total_rows": 5000, "rows_per_s": 8123.0, "seconds_left": 5.0}
        console(event("scored", rows=1200, shares=[600, 600], **figures))
    for part in ("1,200/5,000", "8,123 rows/s", "left 5 s"):
        assert part in terminal.text()
    with Console(terminal, interactive=interactive, refresh_s=0) as console:
        differences = {"loss_difference": 1e-7, "grad_norm_difference": 2e-8}
        steps = {"step": 3, "steps": 20, "weight_difference": 3e-9, "tensor": "layer.weight"}
        compared = Event(name="compared", time=0, rank=0, step=3, data={**differences, **steps})
        console(compared)
    for part in ("3/20", "1e-07", "2e-08", "3e-09", "layer.weight"):
        assert part in terminal.text()


def test_live_panel_has_every_figure(terminal: Terminal) -> None:
    with Console(terminal, refresh_s=0) as console:
        for told in (start(), step(1), step(22), evaluated(22, 0.96, True)):
            console(told)
    text = terminal.text()
    for part in ("data(2)", "exact", "22/110", "20 %", "epoch 1/5", "left 10 s", "0.0909"):
        assert part in text
    for part in ("norm 1.23", "learning rate 3.0e-03", "640 samples/s", "accuracy 0.9600"):
        assert part in text
    for part in ("★ best", "50 % of the batch", "busy 75 %", "8.4 MB sent by each worker"):
        assert part in text


def test_live_panel_gives_way_to_the_summary(terminal: Terminal) -> None:
    console = Console(terminal, refresh_s=0)
    for told in (start(), step(1), step(2), end(2)):
        console(told)
    assert "training loss" in terminal.text()
    assert terminal.getvalue().endswith("\n")
    assert terminal.cursor_is_shown()


def test_steps_between_drawings_write_nothing(terminal: Terminal) -> None:
    console = Console(terminal, refresh_s=60)
    console(start())
    before = terminal.getvalue()
    for number in range(1, 100):
        console(step(number))
    assert terminal.getvalue() == before
    console.close()


def test_live_panel_starts_no_thread(terminal: Terminal) -> None:
    before = threading.enumerate()
    with Console(terminal, refresh_s=0) as console:
        console(start())
        console(step(1))
        assert threading.enumerate() == before


def test_cursor_and_stdout_are_restored_after_an_exception(terminal: Terminal) -> None:
    before = sys.stdout
    with pytest.raises(RuntimeError), Console(terminal, refresh_s=0) as console:
        console(start())
        raise RuntimeError("in the user's loop")
    assert terminal.cursor_is_shown()
    assert sys.stdout is before


def test_interrupt_while_drawing_ends_the_display_and_goes_on(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    console = Console(terminal, refresh_s=0)
    console(start())

    def interrupted(progress: Progress) -> None:
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr("allfuse.observe.live.panel", interrupted)
    with pytest.raises(KeyboardInterrupt):
        console(step(1))
    assert terminal.cursor_is_shown()
    assert terminal.text().endswith("\n")


def test_failing_panel_gives_way_to_plain_lines(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(progress: Progress) -> None:
        raise TypeError("a fault of ours")

    monkeypatch.setattr("allfuse.observe.live.panel", failing)
    console = Console(terminal, refresh_s=0)
    console(start())
    console(step(1))
    console.close()
    assert "display failed (TypeError: a fault of ours); plain lines" in terminal.text()
    assert "step 1/110" in terminal.text()


def broken_pipe() -> io.TextIOWrapper:
    reading, writing = os.pipe()
    os.close(reading)
    return os.fdopen(writing, "w")


def closed_stream() -> io.TextIOWrapper:
    with open(os.devnull, "w") as stream:
        return stream


@pytest.mark.parametrize("broken", [broken_pipe, closed_stream])
@pytest.mark.parametrize("interactive", [False, True])
def test_broken_stream_does_not_stop_training(
    broken: Callable[[], io.TextIOWrapper],
    interactive: bool,
    capsys: pytest.CaptureFixture[str],
    terminal: Terminal,
) -> None:
    stream = broken()
    console = Console(stream, interactive=interactive, refresh_s=0)
    for told in (start(), step(1), step(2), end(2)):
        console(told)
    console.close()
    stream.close()
    assert capsys.readouterr().err.count("the console is silent from here") == 1
    assert console.progress.step == 2


@pytest.mark.parametrize("death", ["raise RuntimeError", "os.kill(os.getpid(), 9)"])
def test_terminal_is_usable_after_any_death(death: str) -> None:
    script = f"""
import os
from allfuse.base.events import Bus
from allfuse.observe import Console
bus = Bus()
bus.subscribe(Console(refresh_s=0))
bus.emit("start", plan="data(2)", total_steps=9)
bus.emit("step", loss=1.0, samples=1, seconds=0.1)
{death}
"""
    parent, child = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, "-c", script]
    process = subprocess.Popen(command, stdout=child, stderr=child, env=environment)
    os.close(child)
    read = b""
    while True:
        try:
            part = os.read(parent, 65536)
        except OSError:  # the other side is closed
            break
        if not part:
            break
        read += part
    os.close(parent)
    assert process.wait() in (1, -signal.SIGKILL)
    screen = read.decode()
    assert "data(2)" in screen
    assert re.findall(r"\x1b\[\?25([hl])", screen)[-1] == "h"
    assert re.sub(r"\x1b\[[?0-9;]*[A-Za-z]", "", screen).endswith("\n")


def test_time_left_is_that_of_recent_steps_and_their_pauses() -> None:
    progress = Progress.of([start(), step(1, seconds=60.0), step(2), step(3), step(4)])
    assert progress.seconds_left == pytest.approx(106 * 0.1)
    before = progress.seconds_left
    progress.update(evaluated(4, 0.5, True))
    assert progress.seconds_left is not None
    assert progress.seconds_left > before


def test_summary_has_every_result() -> None:
    told = [start(), *(step(number) for number in range(1, 111))]
    told += [evaluated(50, 0.97, True), evaluated(110, 0.95, False)]
    told += [evaluated(110, 0.96, False, split="test")]
    saved = {"step": 100, "path": "runs/digits/100", "seconds": 1.0, "stalled_seconds": 0.1}
    told += [Event(name="saved", time=11, rank=0, step=110, data=saved), end(110)]
    rows = dict(final_rows(told))
    assert rows["plan"] == "data(2)"
    assert rows["promise"] == "exact"
    assert rows["steps"] == "110"
    assert rows["time"] == "11 s"
    assert rows["speed"] == "640 samples/s, 7,040 samples"
    assert rows["loss"].startswith("0.0500, from 2.0")
    assert rows["validation"] == "accuracy 0.9500 at step 110"
    assert rows["best validation"] == "accuracy 0.9700 at step 50"
    assert rows["test"] == "accuracy 0.9600 at step 110"
    assert rows["fused"] == "462 MB sent by each worker, 4.2 MB per step"
    assert rows["checkpoint"] == "step 100: runs/digits/100"
    assert "training loss" in final_text(told)
    assert final_text(told, charts=False).isascii()


def test_resuming_keeps_the_curve_up_to_the_checkpoint() -> None:
    told = [start(), *(step(number) for number in range(1, 41)), start(resumed_step=30), step(31)]
    steps = [at for at, _ in Progress.of(told).curve.points()]
    assert steps == [float(number) for number in range(1, 32)]


def test_the_summary_of_a_resumed_run_says_where_its_loss_came_from() -> None:
    again = [start(resumed_step=30), step(31), step(32)]
    assert dict(final_rows(again))["loss"].endswith("where it was resumed")
    seen = [start(), *(step(number) for number in range(1, 41)), *again]
    first = dict(final_rows([start(), step(1), step(2)]))["loss"].partition(", ")[2]
    assert dict(final_rows(seen))["loss"].endswith(first)
    assert first.endswith("at the start")


@pytest.mark.parametrize("count", [1, 4, 5, 9, 1000, 4097])
def test_curve_keeps_its_mean_in_bounded_memory(count: int) -> None:
    curve = Curve(capacity=8)
    for number in range(count):
        curve.add(number, 1.0)
    curve.add(count, math.nan)
    assert len(curve.points()) <= 9 + 1
    assert {value for _, value in curve.points()} == {1.0}


def test_charts_fall_where_the_curve_falls() -> None:
    falling = [(float(number), 1.0 - number / 100) for number in range(100)]
    line = sparkline(falling, width=8)
    assert line == "█▇▆▅▄▃▂▁"
    chart = braille_chart(falling, width=40, height=5)
    assert {len(row) for row in chart} == {40}
    drawn = [row.split("│")[1] for row in chart[:5]]
    assert all(len(row.strip("⠀")) == pytest.approx(len(row) / 5, abs=2) for row in drawn)
    indents = [len(row) - len(row.lstrip("⠀")) for row in drawn]
    assert indents == sorted(indents)
    assert indents[0] == 0
    assert braille_chart(falling[:1]) == []
    assert braille_chart([(0.0, 1.0), (1.0, 1.0)], width=40)
