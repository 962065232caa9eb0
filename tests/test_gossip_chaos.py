"""Workers that gossip as processes that are killed: the others go on, and the run can be proven."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from test_chaos import (
    SAMPLES,
    Run,
    assert_every_sample_was_used_once,
    is_alive,
    kill,
    outlive,
    start,
)

__all__ = ["start"]  # a fixture

EPOCHS = 3


def assert_verified(run: Run) -> None:
    verified = subprocess.run(
        [sys.executable, "-m", "allfuse", "verify", str(run.out)], capture_output=True, text=True
    )
    assert verified.returncode == 0, verified.stdout + verified.stderr
    assert "bit for bit" in verified.stdout


@pytest.mark.slow
@pytest.mark.parametrize("codec", ["identity", "int8"])
def test_of_workers_that_gossip_one_is_killed_and_the_run_is_executed_again(
    start: Any, codec: str
) -> None:
    run = start(f"site(4, topology=gossip(one_peer), sync=asp, codec={codec}, min=1)", EPOCHS)
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
def test_workers_that_gossip_outlive_each_other(start: Any, tmp_path: Path) -> None:
    plan = "site(4, topology=gossip, sync=asp, min=1, max=8)"
    assert_verified(outlive(start, plan, tmp_path / "job.token"))
