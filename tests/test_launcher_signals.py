"""Ctrl-C, SIGTERM, kill -9: how a launch ends when it is told to, and that nothing is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from allfuse.launcher.signals import ONCE_S

PREAMBLE = """
import ctypes, os, signal, subprocess, sys, threading, time
from pathlib import Path
from allfuse.base.errors import AllfuseError, Interrupted
from allfuse.launcher.base import current_world
from allfuse.launcher.local import launch_local, warm_up

folder = Path(sys.argv[1])

def here(name):
    (folder / name).touch()

def wait_for(name):
    while not (folder / name).exists():
        time.sleep(0.01)

def launch(work, workers=2):
    try:
        print("returned", launch_local(work, workers))
    except AllfuseError as error:
        print(f"{type(error).__name__}: {error}")
        sys.exit(error.exit_code)
"""

IDLE = """
def work():  # opens no session
    here(f"ready {current_world().rank}")
    time.sleep(600)

launch(work)
"""

TRAINING = """
def work():
    world = current_world()
    for step in range(10**9):
        world.step = step
        here(f"ready {world.rank}")
        if world.stop_requested.wait(0.01):
            if world.rank == 0:
                time.sleep(0.3)  # emulated writing of a checkpoint
                here("saved")
            raise Interrupted(f"interrupted after step {step}")

launch(work)
"""

STUBBORN = """
def work():
    world = current_world()
    world.step = 0
    subprocess.Popen(["sleep", "600"])
    here(f"ready {world.rank}")
    world.stop_requested.wait()
    here(f"asked {world.rank}")
    while True:
        pass

launch(work)
"""


class Script:
    """A script in a session of its own, so that all that it starts can be found."""

    def __init__(self, folder: Path, body: str) -> None:
        self.folder = folder
        self.scratch = folder / "tmp"
        self.scratch.mkdir()
        path = folder / "script.py"
        path.write_text(PREAMBLE + textwrap.dedent(body))
        self.process = subprocess.Popen(
            [sys.executable, str(path), str(folder)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "TMPDIR": str(self.scratch)},
            start_new_session=True,
            # a caller that ignores Ctrl-C, as background jobs do, must not change the test
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler) and None,
        )

    def wait_for(self, *names: str) -> None:
        for name in names:
            until(lambda name=name: (self.folder / name).exists(), f"{name} of {self.say()}")

    def say(self) -> str:
        return "" if self.process.poll() is None else str(self.process.communicate())

    def send(self, number: int) -> None:
        self.process.send_signal(number)

    def send_to_group(self, number: int) -> None:
        os.killpg(self.process.pid, number)

    def end(self) -> tuple[int, str, str]:
        """Exit code and output; nothing that it started may be left a short time later."""
        out, err = self.process.communicate(timeout=60)
        self.nothing_is_left()
        return self.process.returncode, out, err

    def nothing_is_left(self) -> None:
        until(lambda: not self.members(), "the end of all processes", seconds=10)
        assert list(self.scratch.iterdir()) == []

    def members(self) -> list[int]:
        """The processes of its session that still run."""
        found = []
        for path in Path("/proc").iterdir():
            if not path.name.isdigit():
                continue
            try:
                fields = (path / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[3]) == self.process.pid and fields[0] != "Z":
                found.append(int(path.name))
        return found

    def child(self, words: str) -> int:
        """The process of its session with these words in its command."""
        for pid in self.members():
            command = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
            parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
            if words in command and parent == self.process.pid:
                return pid
        raise AssertionError(f"no {words} among {self.members()}")


def until(condition: Callable[[], Any], what: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not come within {seconds} s"
        time.sleep(0.01)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[str], Script]]:
    started: list[Script] = []

    def start(body: str) -> Script:
        started.append(Script(tmp_path, body))
        return started[-1]

    yield start
    for script in started:
        for pid in script.members():
            os.kill(pid, signal.SIGKILL)
        script.process.communicate()


@pytest.mark.parametrize("to", ["launcher", pytest.param("group", marks=pytest.mark.slow)])
def test_ctrl_c_interrupts_at_once_what_does_not_train(
    start: Callable[[str], Script], to: str
) -> None:
    script = start(IDLE)
    script.wait_for("ready 0", "ready 1")
    (script.send if to == "launcher" else script.send_to_group)(signal.SIGINT)
    code, out, err = script.end()
    assert (code, out) == (130, "Interrupted: interrupted\n")
    assert err == ""


@pytest.mark.parametrize(
    ("number", "to"),
    [
        (signal.SIGINT, "group"),
        pytest.param(signal.SIGTERM, "group", marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, "launcher", marks=pytest.mark.slow),
    ],
)
def test_training_ends_after_its_step_and_saves(
    start: Callable[[str], Script], number: int, to: str
) -> None:
    script = start(TRAINING)
    script.wait_for("ready 0", "ready 1")
    (script.send if to == "launcher" else script.send_to_group)(number)
    code, out, err = script.end()
    assert code == 130
    assert out.startswith("Interrupted: interrupted after step ")
    assert (script.folder / "saved").exists()
    assert err == ""


@pytest.mark.slow
def test_a_worker_that_waits_for_one_that_was_interrupted_is_not_waited_for(
    start: Callable[[str], Script],
) -> None:
    script = start(
        """
        def work():
            import torch
            world = current_world()
            here(f"ready {world.rank}")
            if world.rank == 0:
                world.link("data", (0, 1), torch.device("cpu"))  # in C++, for the other to come
            time.sleep(600)
        launch(work)
        """
    )
    script.wait_for("ready 0", "ready 1")
    script.send(signal.SIGINT)
    code, out, _ = script.end()
    assert (code, out) == (130, "Interrupted: interrupted\n")


def test_a_second_ctrl_c_kills_at_once_with_all_that_was_started(
    start: Callable[[str], Script],
) -> None:
    script = start(STUBBORN)
    script.wait_for("ready 0", "ready 1")
    script.send_to_group(signal.SIGINT)
    script.wait_for("asked 0", "asked 1")
    time.sleep(2 * ONCE_S)  # closer together they are one
    script.send_to_group(signal.SIGINT)
    code, out, err = script.end()
    assert (code, out) == (130, "Interrupted: interrupted; the workers were killed\n")
    assert err == ""


@pytest.mark.parametrize("who", ["launcher", pytest.param("zygote", marks=pytest.mark.slow)])
def test_a_kill_leaves_no_process_and_no_file(start: Callable[[str], Script], who: str) -> None:
    body = STUBBORN if who == "launcher" else IDLE  # also kills what the workers started
    script = start(body)
    script.wait_for("ready 0", "ready 1")
    if who == "launcher":
        script.send(signal.SIGKILL)
    else:
        os.kill(script.child("launcher.zygote"), signal.SIGKILL)
    code, out, err = script.end()
    if who == "launcher":
        assert code == -signal.SIGKILL
    else:
        assert code == 1
        assert "the process that starts workers was killed by SIGKILL" in out
    assert err == ""


@pytest.mark.slow
def test_a_launcher_that_is_killed_while_its_zygote_still_loads_leaves_nothing(
    start: Callable[[str], Script],
) -> None:
    script = start("warm_up(); here('ready'); launch_local(os.getpid, 2)")
    script.wait_for("ready")
    script.send(signal.SIGKILL)
    script.process.communicate(timeout=60)
    script.nothing_is_left()


def test_a_program_that_ends_does_not_wait_for_an_idle_zygote(
    start: Callable[[str], Script],
) -> None:
    script = start("warm_up()")
    code, out, err = script.end()
    assert (code, out, err) == (0, "", "")


@pytest.mark.slow
def test_ctrl_c_while_the_zygote_still_loads_is_not_lost(
    start: Callable[[str], Script], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "slow_to_load.py").write_text(
        "import time, pathlib\nhere = pathlib.Path(__file__).parent\n(here / 'loading').touch()\n"
        "while not (here / 'go').exists(): time.sleep(0.01)\n"
    )
    script = start(
        """
        from allfuse.launcher import local

        class Watch(local.Watch):
            def until_all_ended(self):
                here("waiting")
                super().until_all_ended()

            def _stop(self):
                super()._stop()
                here("go")

        local.Watch = Watch
        warm_up(("slow_to_load",))

        def work():
            time.sleep(600)

        launch(work)
        """
    )
    script.wait_for("loading", "waiting")
    script.send_to_group(signal.SIGINT)
    assert script.end() == (130, "Interrupted: interrupted\n", "")


@pytest.mark.slow
def test_what_is_ignored_stays_ignored_as_in_background_jobs(
    start: Callable[[str], Script],
) -> None:
    script = start(
        """
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        def work():
            here(f"ready {current_world().rank}")
            wait_for("go")
            return 5
        launch(work)
        """
    )
    script.wait_for("ready 0", "ready 1")
    script.send_to_group(signal.SIGINT)
    (script.folder / "go").touch()
    assert script.end() == (0, "returned 5\n", "")


@pytest.mark.slow
def test_a_sigterm_to_one_worker_ends_the_launch(start: Callable[[str], Script]) -> None:
    script = start(
        """
        def work():
            world = current_world()
            (folder / "pid").write_text(str(os.getpid())) if world.rank == 1 else None
            here(f"ready {world.rank}")
            time.sleep(600)
        launch(work)
        """
    )
    script.wait_for("ready 0", "ready 1")
    os.kill(int((script.folder / "pid").read_text()), signal.SIGTERM)
    code, out, _ = script.end()
    assert code == 130
    assert out.startswith("WorkerFailed: rank 1 failed before the first step: KeyboardInterrupt")
