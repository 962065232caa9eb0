"""Workers, servers and the scheduler as processes that are killed, and workers that join."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

JOB = """
import os, time
from pathlib import Path
import torch
import allfuse as af
from allfuse.launcher import current_world

SAMPLES = 1024

def job(pids="", pause=0.02, epochs=4, save_every=0):
    world = current_world()
    trains = world is not None and world.crew is not None  # and is not verified
    Path(pids, f"{os.getpid()}").touch()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(SAMPLES + 400, 8, generator=generator)
    y = (x.sum(1) > 0).long()
    def loss(outputs, batch):
        if trains and torch.is_grad_enabled():
            time.sleep(0.5 if os.path.exists(f"{pids}.slow") else pause)
        return torch.nn.functional.cross_entropy(outputs, batch[1])
    return af.Job(
        model=lambda: torch.nn.Sequential(
            torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.Linear(32, 2)
        ),
        train=(x[:SAMPLES], y[:SAMPLES]),
        validation=(x[SAMPLES:], y[SAMPLES:]),
        metrics={"accuracy": af.accuracy},
        loss=loss,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.5),
        batch_size=32,
        save_every=save_every or None,
        stop=af.Stop(epochs=epochs),
    )
"""
SAMPLES = 1024
# As in conftest: what torch's optimizers load late is loaded once for all workers and servers.
COMMAND = """
import sys
from allfuse.cli import main, options

options.PRELOAD += ("torch._dynamo",)
sys.exit(main())
"""


class Run:
    """A run of the command line whose processes can be killed."""

    def __init__(self, folder: Path, plan: str, epochs: int, *more: str) -> None:
        self.folder, self.out = folder, folder / "run"
        self.pids = folder / "pids"
        self.pids.mkdir()
        self.joined: list[subprocess.Popen[str]] = []
        self.job = folder / "job.py"
        self.job.write_text(textwrap.dedent(JOB))
        self.process = self.allfuse(
            "train", str(self.job), "--plan", plan, "--out", str(self.out), "--timeout", "60",
            "--set", f"epochs={epochs}", "--set", f"pids={self.pids}", *more,
        )  # fmt: skip

    def allfuse(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", COMMAND, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def workers(self) -> list[int]:
        """The worker processes that live, the oldest first."""
        found = sorted(self.pids.iterdir(), key=lambda path: path.stat().st_mtime)
        return [int(path.name) for path in found if is_alive(int(path.name))]

    def roles(self) -> list[int]:
        """Scheduler and servers: what the launcher started besides workers."""
        zygotes = children(self.process.pid)
        return [pid for z in zygotes for pid in children(z) if not (self.pids / str(pid)).exists()]

    def events(self, name: str) -> list[dict[str, Any]]:
        path = self.out / "events.jsonl"
        if not path.exists():
            return []
        lines = [line for line in path.read_text().splitlines() if line.endswith("}")]
        return [event for event in map(json.loads, lines) if event["event"] == name]

    def until(self, count: int, name: str = "commit") -> None:
        """Wait until so many updates were ordered, or so often something else was told."""
        deadline = time.monotonic() + 300  # a process takes a minute to start where many others do
        while len(self.events(name)) < count:
            assert self.process.poll() is None, self.process.communicate()[0]
            assert time.monotonic() < deadline, f"no {name} any more"
            time.sleep(0.05)

    def exchange_workers(self, times: int, place: str, token: Path) -> None:
        """Kill the oldest worker, and wait until another one, started then, has joined.

        Training is slow meanwhile: else a machine that is would be done before.
        """
        slow = self.pids.with_suffix(".slow")
        slow.touch()
        for _ in range(times):
            kill(self.workers()[0])
            begun = len(self.events("join"))
            self.joined.append(
                self.allfuse("join", place, str(self.job), "--token-file", str(token), "-q")
            )
            self.until(begun + 1, "join")
        slow.unlink()

    def finish(self, within_s: float = 180) -> str:
        told, _ = self.process.communicate(timeout=within_s)
        assert self.process.returncode == 0, told
        return told

    def close(self) -> None:
        for pid in [*self.workers(), self.process.pid, *(each.pid for each in self.joined)]:
            kill(pid)
        for process in [self.process, *self.joined]:
            if process.stdout is not None and not process.stdout.closed:
                process.communicate()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Any]:
    runs: list[Run] = []

    def begin(plan: str, epochs: int, *more: str) -> Run:
        runs.append(Run(tmp_path, plan, epochs, *more))
        return runs[-1]

    yield begin
    for run in runs:
        run.close()


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def children(pid: int) -> list[int]:
    try:
        told = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    except OSError:
        return []
    return [int(child) for child in told.split()]


def kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def assert_every_sample_was_used_once(run: Run, epochs: int) -> None:
    commits = run.events("commit")
    units = Counter((commit["block"], commit["part"]) for commit in commits)
    assert set(units.values()) == {1}
    assert sum(commit["rows"] for commit in commits) == epochs * SAMPLES


@pytest.mark.slow
@pytest.mark.parametrize(
    "plan",
    [
        "data(3, topology=central(servers=1), sync=asp, min=1)",
        "site(3, every=6, fragments=3, outer=momentum, sync=asp, min=1)",
        "data(2, topology=central(servers=1), sync=asp, min=1) * tensor(2)",
    ],
)
def test_a_killed_worker_gives_its_work_back_and_the_others_go_on(start: Any, plan: str) -> None:
    run = start(plan, 4)
    run.until(40)
    pids = [*run.workers(), *run.roles()]
    kill(run.workers()[1])
    told = run.finish()
    assert "lost" in told
    assert len(run.events("lost")) == 1
    assert_every_sample_was_used_once(run, 4)
    (ended,) = run.events("end")
    assert ended["steps"] == 4 * SAMPLES // 32
    assert (run.out / "model.safetensors").exists()
    assert not [pid for pid in pids if is_alive(pid)]


@pytest.mark.slow
def test_in_step_the_work_of_a_killed_worker_is_done_by_the_others(start: Any) -> None:
    run = start("data(3, topology=central(servers=1), min=1)", 3)
    run.until(30)
    kill(run.workers()[0])
    killed = time.time()
    run.finish()
    assert_every_sample_was_used_once(run, 3)
    after = [commit["time"] for commit in run.events("commit") if commit["time"] > killed]
    assert after[0] - killed < 15  # 2 s and less on a quiet machine


@pytest.mark.slow
@pytest.mark.parametrize("split", ["", " * tensor(2)"])
def test_a_killed_server_and_a_killed_scheduler_are_started_again(start: Any, split: str) -> None:
    run = start(f"data(2, topology=central(servers=1), sync=asp){split}", 12)
    run.until(20)
    roles = run.roles()
    for number, pid in enumerate(roles):
        kill(pid)
        run.until(80 + 60 * number)
    run.finish()
    assert_every_sample_was_used_once(run, 12)
    (restored,) = run.events("server_restored")
    assert restored["lost"] >= 0


@pytest.mark.slow
def test_a_worker_that_hangs_does_not_hold_up_the_end(start: Any) -> None:
    run = start("data(2, topology=central(servers=1), sync=asp, min=1)", 4)
    run.until(30)
    hung = run.workers()[1]
    os.kill(hung, signal.SIGSTOP)
    run.finish()
    assert len(run.events("lost")) == 1
    assert_every_sample_was_used_once(run, 4)
    assert not is_alive(hung)


@pytest.mark.slow
def test_a_run_of_which_everything_was_killed_goes_on_under_another_plan(start: Any) -> None:
    run = start("data(2, topology=central(servers=2), sync=asp)", 6, "--set", "save_every=8")
    while not run.events("saved"):
        assert run.process.poll() is None, run.process.communicate()[0]
        time.sleep(0.1)
    for pid in [run.process.pid, *run.workers(), *run.roles()]:
        kill(pid)
    run.process.communicate()
    saved = run.events("saved")[-1]["step"]
    run.process = run.allfuse(
        "train", str(run.job), "--resume", str(run.out), "--plan", "data(2)", "--timeout", "60",
        "--set", "epochs=6", "--set", f"pids={run.pids}", "--set", "save_every=8",
    )  # fmt: skip
    run.finish()
    assert run.events("start")[-1]["resumed_step"] == saved
    assert run.events("end")[-1]["steps"] == 6 * SAMPLES // 32
    told = run.allfuse("evaluate", str(run.out), "--data", "validation", "--json")
    assert json.loads(told.communicate(timeout=120)[0])["metrics"]["accuracy"] > 0.9


def free_place() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def outlive(start: Any, plan: str, token: Path) -> Run:
    """A job of 4 workers of which 8 are killed, each followed by one that joins."""
    epochs, place = 30, free_place()
    run: Run = start(plan, epochs, "--listen", place, "--token-file", str(token))
    run.until(20)
    run.exchange_workers(8, place, token)
    run.finish(within_s=600)
    assert len(run.events("lost")) == 8
    assert len(run.events("join")) == 12
    assert_every_sample_was_used_once(run, epochs)
    assert run.events("evaluated")[-1]["metrics"]["accuracy"] > 0.97
    return run


@pytest.mark.slow
def test_a_job_outlives_workers_that_are_killed_and_join_again_and_again(
    start: Any, tmp_path: Path
) -> None:
    plan = "data(4, topology=central(servers=2), sync=asp, min=1, max=8)"
    run = outlive(start, plan, tmp_path / "job.token")
    assert (run.out / "model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize("killed", [1, 2])
def test_a_killed_server_loses_no_update_where_another_keeps_a_copy(
    start: Any, killed: int
) -> None:
    epochs = 2 + killed
    run = start("data(3, topology=central(servers=2, replicas=1), sync=asp, min=1)", epochs)
    run.until(20)
    pids = [*run.workers(), *run.roles()]
    kill(run.workers()[1])
    _, *servers = run.roles()
    for number, pid in enumerate(servers[:killed]):
        kill(pid)
        run.until(60 + 40 * number)
    run.finish()
    assert len(run.events("lost")) == 1  # the worker gives its work back
    assert_every_sample_was_used_once(run, epochs)
    restored = run.events("server_restored")
    assert sorted((event["shard"], event["lost"]) for event in restored) == [
        (shard, 0) for shard in range(killed)
    ]
    assert not [pid for pid in pids if is_alive(pid)]
    verified = run.allfuse("verify", str(run.out))
    told, _ = verified.communicate(timeout=120)
    assert verified.returncode == 0, told
