"""What observers write to files: events as JSON lines, TensorBoard curves, profiler traces."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from allfuse.base.errors import RunError, UserError
from allfuse.base.events import Bus, Event
from allfuse.observe import JsonLines, Profile, TensorBoard, parse_steps, read_events


def event(name: str, step: int = 0, data: dict[str, Any] | None = None) -> Event:
    return Event(name=name, time=1.5 + step, rank=0, step=step, data=data or {})


def test_observe_loads_neither_torch_nor_rich() -> None:
    script = "import sys, allfuse.observe; print({'torch', 'rich', 'tensorboard'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr


def test_events_come_back_as_they_were_written(tmp_path: Path) -> None:
    told = [
        event("start", data={"plan": "data(2)", "out": None, "choices": {"link": "gloo: ü\nline"}}),
        event("step", 1, {"loss": 0.1, "shares": [3, 4], "grad_norm": math.inf}),
        event("saved", 7, {"step": 5, "path": "x", "bytes": 10**13}),
    ]
    path = tmp_path / "run" / "events.jsonl"
    with JsonLines(path) as sink:
        for one in told:
            sink(one)
    assert list(read_events(path)) == told


def test_lines_are_strict_json_and_the_data_s_own_step_wins(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with JsonLines(path) as sink:
        sink(event("step", 1, {"loss": math.nan, "metrics": {"a": [-math.inf, (1.0, math.inf)]}}))
        sink(event("saved", 7, {"step": 5, "path": "\udcff"}))
        values = {"array": np.arange(2), "scalar": np.float32(0.5), "tensor": torch.ones(1)}
        sink(
            event(
                "step",
                8,
                {**values, "nan": torch.tensor(math.nan), "path": Path("x"), "keys": {(1, 2): 3}},
            )
        )

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    lines = [
        json.loads(line, parse_constant=refuse) for line in path.read_text().split("\n") if line
    ]
    assert lines[0]["loss"] == "nan"
    assert lines[0]["metrics"] == {"a": ["-inf", [1.0, "inf"]]}
    assert (lines[1]["step"], lines[1]["event_step"]) == (5, 7)
    assert (lines[2]["array"], lines[2]["scalar"], lines[2]["tensor"]) == ([0, 1], 0.5, [1.0])
    assert (lines[2]["nan"], lines[2]["path"], lines[2]["keys"]) == ("nan", "x", {"(1, 2)": 3})


def test_all_but_steps_reach_the_file_at_once(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    sink = JsonLines(path)
    for number in range(1, 50):
        sink(event("step", number))
    assert len(list(read_events(path))) < 49
    sink(event("note", 49, {"text": "x"}))
    assert len(list(read_events(path))) == 50
    sink.close()


def test_cut_last_line_is_left_out_and_overwritten_on_resume(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with JsonLines(path) as sink:
        sink(event("step", 1))
        sink(event("step", 2))
    path.write_bytes(path.read_bytes()[:-7])
    assert [one.step for one in read_events(path)] == [1]
    with JsonLines(path, append=True) as sink:
        sink(event("step", 3))
    assert [one.step for one in read_events(path)] == [1, 3]


@pytest.mark.parametrize("content", [b"", b"cut", b"x" * 200_000])
def test_resume_on_a_file_without_any_line_starts_it_anew(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(content)
    with JsonLines(path, append=True) as sink:
        sink(event("step", 3))
    assert [one.step for one in read_events(path)] == [3]


def test_reader_names_the_line_that_is_no_event(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text('{"event":"note","time":1,"rank":0,"step":0}\nwrong\n')
    with pytest.raises(RunError, match=r"events.jsonl:2: not an event: wrong"):
        list(read_events(path))
    with pytest.raises(RunError, match="cannot read events"):
        list(read_events(tmp_path / "none.jsonl"))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a disk that is always full")
def test_full_disk_is_told_once_and_stops_writing_only() -> None:
    told: list[str] = []
    sink = JsonLines("/dev/full", warn=told.append)
    for number in range(3):
        sink(event("note", number, {"text": "x"}))
    sink.close()
    assert len(told) == 1
    assert "No space left" in told[0]


def test_tensorboard_reads_what_was_written(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with TensorBoard(tmp_path) as sink:
        sink(event("start", data={"plan": "data(2)", "promise": "exact"}))
        for number in (1, 2):
            data = {"loss": 1 / number, "grad_norm": 3.0, "lr": 0.1, "samples": 64}
            rest = {"seconds": 0.5, "shares": [48, 16], "busy": [1.0, None], "fused_bytes": 9}
            sink(event("step", number, {**data, **rest}))
        sink(event("evaluated", 2, {"split": "test", "metrics": {"accuracy": 0.75}}))
        sink(event("end", 2))
    found = EventAccumulator(str(tmp_path)).Reload()
    assert [(one.step, one.value) for one in found.Scalars("train/loss")] == [(1, 1.0), (2, 0.5)]
    assert found.Scalars("train/samples_per_second")[0].value == 128
    assert found.Scalars("train/gradient_norm")[0].wall_time == 2.5
    assert found.Scalars("share/worker_0")[0].value == 0.75
    assert found.Scalars("test/accuracy")[0].value == 0.75
    assert "busy/worker_1" not in found.Tags()["scalars"]
    assert "run/text_summary" in found.Tags()["tensors"]


def test_tensorboard_hides_steps_that_are_done_again(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with TensorBoard(tmp_path) as sink:
        for number in (1, 2, 3):
            sink(event("step", number, {"loss": 1.0}))
    with TensorBoard(tmp_path) as sink:
        sink(event("start", 1, {"resumed_step": 1}))
        sink(event("step", 2, {"loss": 5.0}))
    found = EventAccumulator(str(tmp_path)).Reload()
    assert [(one.step, one.value) for one in found.Scalars("train/loss")] == [(1, 1.0), (2, 5.0)]


def test_missing_tensorboard_is_an_error_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match="pip install tensorboard"):
        TensorBoard(tmp_path)


def test_tensorboard_without_a_disk_is_told_once(tmp_path: Path) -> None:
    told: list[str] = []
    blocked = tmp_path / "file"
    blocked.write_text("where the folder should be")
    sink = TensorBoard(blocked / "curves", warn=told.append)
    sink(event("step", 1, {"loss": 1.0}))
    sink(event("step", 2, {"loss": 1.0}))
    sink.close()
    assert len(told) == 1


def test_profile_writes_a_trace_of_the_chosen_steps(tmp_path: Path) -> None:
    profile = Profile("2:3", tmp_path / "profile", rank=1)
    written = []
    for number in range(1, 6):
        profile.before_step(number)
        torch.ones(8) @ torch.ones(8)
        written.append(profile.after_step(number))
    path = tmp_path / "profile" / "trace-rank1.json"
    assert written == [None, None, path, None, None]
    assert profile.close() is None
    names = [one.get("name") for one in json.loads(path.read_text())["traceEvents"]]
    assert [name for name in names if str(name).startswith("step ")] == ["step 2", "step 3"]
    assert "aten::ones" in names


def test_profile_writes_what_there_is_when_training_ends_early(tmp_path: Path) -> None:
    profile = Profile("2:9", tmp_path)
    profile.before_step(2)
    torch.ones(8)
    assert profile.close() == tmp_path / "trace-rank0.json"
    assert (tmp_path / "trace-rank0.json").stat().st_size > 0


@pytest.mark.parametrize("text", ["", "10", "15:10", "0:3", "a:b", "1:2:3", "-1:4", "1.5:2"])
def test_profile_refuses_what_is_no_range(text: str) -> None:
    with pytest.raises(UserError, match="FIRST:LAST"):
        parse_steps(text)


def test_who_subscribes_while_an_event_is_told_hears_the_next_one() -> None:
    bus, heard = Bus(), []
    bus.subscribe(lambda event: bus.subscribe(lambda late: heard.append(late.name)), ["start"])
    bus.emit("start")
    assert heard == []
    bus.emit("end")
    assert heard == ["end"]
