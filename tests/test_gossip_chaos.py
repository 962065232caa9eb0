"""Workers that gossip as processes that are killed: the others go on, and the run can be proven."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from test_chaos import SAMPLES, Run, assert_every_sample_was_used_once, is_alive, kill, start

__all__ = ["start"]  # a fixture

EPOCHS = 3


def assert_verified(run: Run) -> None:
    verified = subprocess.run(
        [sys.executable, "-m", "allfuse", "verify", str(run.out)], capture_output=True, text=True
    )
    assert verified.returncode == 0, verified.stdout + verified.stderr
    assert "bit for bit" in verified.stdout


def test_of_workers_that_gossip_one_is_killed_and_the_run_is_executed_again(start: Any) -> None:
    run = start("site(4, topology=gossip(one_peer), sync=asp, min=1)", EPOCHS)
    run.until(40)
    pids = [*run.workers(), *run.roles()]
    kill(run.workers()[2])
    run.finish()
    assert len(run.events("lost")) == 1
    assert_every_sample_was_used_once(run, EPOCHS)
    (ended,) = run.events("end")
    assert ended["steps"] == EPOCHS * SAMPLES // 32
    assert not [pid for pid in pids if is_alive(pid)]
    assert_verified(run)


@pytest.mark.slow
def test_workers_that_gossip_outlive_each_other_for_a_minute(start: Any, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = f"127.0.0.1:{free.getsockname()[1]}"
    plan = "site(4, topology=gossip, sync=asp, min=1, max=8)"
    epochs, token = 30, tmp_path / "job.token"
    joined = []
    try:
        run = start(plan, epochs, "--listen", place, "--token-file", str(token))
        run.until(20)
        begin = time.monotonic()
        while time.monotonic() - begin < 60 and run.process.poll() is None:
            alive = run.workers()
            if len(alive) > 2:  # those who join need some seconds to start and to copy
                kill(alive[0])
            joined.append(
                run.allfuse("join", place, str(run.job), "--token-file", str(token), "-q")
            )
            time.sleep(6)
        run.finish()
    finally:
        for process in joined:
            process.kill()
            process.communicate()
    assert len(run.events("lost")) >= 2
    assert len(run.events("join")) >= 6
    assert_every_sample_was_used_once(run, epochs)
    assert run.events("evaluated")[-1]["metrics"]["accuracy"] > 0.97
    assert_verified(run)
