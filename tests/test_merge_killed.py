"""allfuse merge, killed at any point: the next call goes on, to the same bytes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

KILLER = """
import json, os, random, signal, sys, time
from pathlib import Path

import torch
from allfuse.cli.app import main
import allfuse.merge.engine, allfuse.merge.merge  # what a fork need not load again

kills, seed, out, command = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:]
model = out / "model.safetensors"

def start():
    child = os.fork()
    if child:
        return child
    sys.argv = ["allfuse", *command, "--out", str(out), "--quiet"]
    try:
        main()
    finally:
        os._exit(0 if model.exists() else 1)

def clear():
    for file in out.iterdir():
        file.unlink()
    out.rmdir()

begin = time.monotonic()
assert os.waitpid(start(), 0)[1] == 0
longest, whole, chance = time.monotonic() - begin, model.read_bytes(), random.Random(seed)
clear()
killed, finished, resumed = 0, 0, 0
while killed < kills or not finished:
    left = (out.parent / f".partial-{out.name}" / "journal").exists()
    child = start()
    time.sleep(chance.uniform(0, longest))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    killed += os.WIFSIGNALED(status)
    resumed += left
    if not os.WIFSIGNALED(status):
        assert status == 0, status
        assert model.read_bytes() == whole
        finished += 1
        clear()
print(json.dumps({"killed": killed, "finished": finished, "resumed": resumed}))
"""


@pytest.fixture
def models(tmp_path: Path) -> list[str]:
    """A base and two models, of 16 MB each."""
    paths = [tmp_path / f"{number}.safetensors" for number in range(3)]
    for number, path in enumerate(paths):
        chance = torch.Generator().manual_seed(number)
        weights = {f"w{n}": torch.randn(500, 2000, generator=chance) for n in range(4)}
        save_file(weights, path)
    return [str(path) for path in paths]


def kill_again_and_again(kills: int, seed: int, models: list[str], out: Path) -> dict[str, int]:
    command = ["merge", *models[1:], "--base", models[0], "--rule", "ties(density=0.3)"]
    done = subprocess.run(
        [sys.executable, "-c", KILLER, str(kills), str(seed), str(out), *command],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_a_merge_killed_at_a_few_random_points_gives_the_same_bytes(
    models: list[str], tmp_path: Path
) -> None:
    found = kill_again_and_again(2, 1, models, tmp_path / "out")
    assert found["killed"] >= 2
    assert found["finished"] >= 1


@pytest.mark.slow
def test_a_merge_killed_at_100_random_points_gives_the_same_bytes(
    models: list[str], tmp_path: Path
) -> None:
    found = kill_again_and_again(100, 2, models, tmp_path / "out")
    assert found["killed"] >= 100
    assert found["finished"] >= 5
    assert found["resumed"] >= 30


@pytest.mark.slow
def test_a_worker_that_is_killed_is_named_and_the_next_call_goes_on(tmp_path: Path) -> None:
    for number in range(2):
        weights = {f"w{n}": torch.full((1000, 5000), float(number + n)) for n in range(16)}
        save_file(weights, tmp_path / f"{number}.safetensors")
    models = [str(tmp_path / f"{number}.safetensors") for number in range(2)]
    out, journal = tmp_path / "out", tmp_path / ".partial-out" / "journal-1"
    command = [sys.executable, "-m", "allfuse", "merge", *models, "--out", str(out), "-q"]
    process = subprocess.Popen(
        [*command, "--workers", "2", "--rule", "slerp"], stderr=subprocess.PIPE, text=True
    )
    until = time.monotonic() + 60
    while not (journal.exists() and journal.read_text().count("\n") > 1):
        assert time.monotonic() < until
        assert process.poll() is None
        time.sleep(0.001)
    os.kill(holder_of(journal), signal.SIGKILL)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "rank 1 was killed by SIGKILL" in said
    assert "the same command goes on" in said
    assert not out.exists()
    done = subprocess.run([*command, "--rule", "slerp", "--json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["resumed_blocks"] > 0


def holder_of(file: Path) -> int:
    """The process that has a file open."""
    for folder in Path("/proc").glob("[0-9]*/fd"):
        try:
            if any(os.readlink(fd) == str(file) for fd in folder.iterdir()):
                return int(folder.parent.name)
        except OSError:
            continue
    raise AssertionError(f"nobody has {file} open")
