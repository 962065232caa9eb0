"""The benchmarks run to their end and say what they found in one line that a program can read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
SCRIPTS = (
    "step",
    "overhead",
    "scaling",
    "startup",
    "checkpoint",
    "allreduce",
    "socket_link",
    "push_pull",
    "network",
    "slow_link",
    "quality",
    "split",
    "loading",
    "merge",
)
KEYS = {"benchmark", "commit", "machine", "figures"}
FIGURE_KEYS = {"name", "value", "spread", "target", "better", "ok"}


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import harness

    return harness


def check_line(text: str, name: str) -> list[dict[str, Any]]:
    """The figures of a JSON line, which holds all that it must."""
    line = json.loads(text)
    assert line.keys() >= KEYS
    assert line["benchmark"] == name
    assert line["figures"]
    for figure in line["figures"]:
        assert figure.keys() >= FIGURE_KEYS
        assert figure["better"] in ("lower", "higher")
        assert (figure["ok"] is None) == (figure["target"] is None)
    figures: list[dict[str, Any]] = line["figures"]
    return figures


def test_json_line_holds_every_key_and_the_verdict(harness: ModuleType) -> None:
    figures = [
        harness.figure("slow", [1.1, 1.2, 1.3], target=1.02),
        harness.figure("scales", [1.91, 1.95], target=1.9, better="higher"),
        harness.figure("only told", [3.0]),
    ]
    text = harness.json_line("test", figures, harness.Options(quick=True), ["a peer"])
    assert "\n" not in text
    assert [figure["ok"] for figure in check_line(text, "test")] == [False, True, None]
    assert json.loads(text)["skipped"] == ["a peer"]


def test_figure_is_the_median_with_its_interquartile_range(harness: ModuleType) -> None:
    figure = harness.figure("x", [1.0, 2.0, 3.0, 4.0, 100.0])
    assert (figure.value, figure.spread) == (3.0, 2.0)


def test_turns_are_interleaved_and_every_other_round_goes_backwards(harness: ModuleType) -> None:
    order: list[str] = []
    contenders = {name: lambda name=name: order.append(name) for name in "abc"}
    turns = harness.interleave(contenders, 2, meet=lambda: order.append("-"))
    assert "".join(order) == "-a-b-c-c-b-a"
    assert [len(turns[name].wall_s) for name in "abc"] == [2, 2, 2]


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_benchmark_ends_with_its_json_line(name: str, tmp_path: Path) -> None:
    environment = dict(os.environ, TMPDIR=str(tmp_path))
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / f"{name}.py"), "--quick"],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
        cwd=BENCHMARKS.parent,
    )
    assert done.returncode == 0, done.stderr
    last = done.stdout.splitlines()[-1]
    if name == "slow_link" and not json.loads(last)["figures"]:
        pytest.skip(json.loads(last)["skipped"][0])
    check_line(last, name)


def test_command_line_of_all_refuses_an_unknown_name() -> None:
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "run_all.py"), "nonsense"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "there is no benchmark 'nonsense'; allowed: step, " in done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("up 0 1mbit", "HOSTS: received '0'"),
        ("up 08 1mbit", "HOSTS: received '08'"),
        ("up 201 1mbit", "HOSTS: received '201'"),
        ("up 2 0mbit", "RATE: received '0mbit'"),
        ("up 2 1.5.5mbit", "RATE: received '1.5.5mbit'"),
        ("up 2", "up takes HOSTS and RATE"),
        ("run abc true", "HOST: received 'abc'"),
        ("run 0", "run takes a HOST and a COMMAND"),
    ],
)
def test_emulated_hosts_refuse_what_they_cannot_be(arguments: str, said: str) -> None:
    command = ["bash", str(BENCHMARKS / "netlab.sh"), *arguments.split()]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert said in done.stderr


def test_results_keep_the_sections_of_benchmarks_that_were_not_run(
    harness: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import run_all

    monkeypatch.setattr(run_all, "RESULTS", tmp_path / "results.md")
    figures = [harness.figure("f", [1.0, 2.0], target=1.02, floor="beside")]
    found = json.loads(harness.json_line("step", figures, harness.Options(quick=True)))
    run_all.RESULTS.write_text(f"{run_all.HEAD}\n{run_all.section(found)}", encoding="utf-8")
    assert run_all.kept_sections() == {"step": run_all.section(found)}
    assert "| f | 1.5 | 0.5 | 2 | <= 1.02 | **no** | beside |" in run_all.section(found)
