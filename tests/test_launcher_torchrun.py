"""Joining processes that torchrun started: real torchrun, tiny scripts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from allfuse.base.errors import UserError
from allfuse.launcher.torchrun import own_address
from allfuse.observe import read_events

PREAMBLE = """
import os, signal, sys, time
from pathlib import Path
import torch
import torch.distributed as dist
from allfuse.base.errors import PeerLost
from allfuse.launcher.base import current_world, entered
from allfuse.launcher.torchrun import join_torchrun

folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])

def say(*words):
    with open(folder / f"rank {rank}", "a") as file:
        print(*words, file=file)

def join(timeout_s=60.0):
    return entered(join_torchrun("data(2)", timeout_s))

def sum_of_ranks(world, name="data"):
    link = world.link(name, (0, 1), torch.device("cpu"))
    total = torch.tensor([float(rank)])
    link.all_reduce(total, "sum of ranks").wait()
    link.close()
    return int(total)
"""


def torchrun(folder: Path, body: str, **environment: str) -> subprocess.Popen[str]:
    script = folder / "script.py"
    script.write_text(PREAMBLE + textwrap.dedent(body))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", str(script), str(folder)]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
        start_new_session=True,
    )


def said(folder: Path) -> list[str]:
    return [(folder / f"rank {rank}").read_text().strip() for rank in range(2)]


@pytest.mark.slow
def test_ranks_join_again_and_again_beside_the_scripts_own_process_group(tmp_path: Path) -> None:
    body = """
    before = signal.getsignal(signal.SIGTERM)
    dist.init_process_group("gloo")
    for session in range(2):  # the second must not meet the traces of the first
        with join() as world:
            assert current_world() is world
            assert (world.kind, world.rank, world.local_size) == ("torchrun", rank, 2)
            world.form_replica((rank,), "gloo")  # there is a default group: stays the script's
            sums = [sum_of_ranks(world), sum_of_ranks(world)]
            world.board.set(f"here/{rank}/board", b"word")
            assert world.board.wait(f"here/{1 - rank}/board", 60) == b"word"
    assert dist.get_world_size() == 2
    assert signal.getsignal(signal.SIGTERM) is before
    dist.barrier()
    dist.destroy_process_group()
    say(sums, world.plan)
    """
    process = torchrun(tmp_path, body)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert said(tmp_path) == ["[1, 1] data(2)"] * 2


@pytest.mark.slow
def test_without_an_agent_rank_0_holds_the_store_and_the_script_may_use_it_too(
    tmp_path: Path,
) -> None:
    body = """
    with join() as world:
        total = sum_of_ranks(world)
        dist.init_process_group("gloo")  # at the same address
        dist.barrier()
        dist.destroy_process_group()
        say(total)
        world.board.set(f"over/{rank}", b"")
        world.board.wait("over/1", 60)  # rank 0 holds the store, so it stays until the end
    """
    script = tmp_path / "script.py"
    script.write_text(PREAMBLE + textwrap.dedent(body))
    from allfuse.launcher.local import open_store

    port = open_store().port  # free again when this returns
    started = [
        subprocess.Popen(
            [sys.executable, str(script), str(tmp_path)],
            env={
                **os.environ,
                "RANK": str(rank),
                "WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            },
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in started:
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
    assert said(tmp_path) == ["1", "1"]


def test_a_rank_that_fails_is_named_by_the_other_with_its_reason(tmp_path: Path) -> None:
    body = """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the agent's: rank 0 is to find out by itself
    with join() as world:
        link = world.link("data", (0, 1), torch.device("cpu"))
        link.step = 5
        link.all_reduce(torch.ones(1), "sum").wait()
        if rank == 1:
            raise ValueError("by design")
        try:
            link.all_reduce(torch.ones(1), "sum again").wait()
        except PeerLost as lost:
            say(lost)
            raise
    """
    process = torchrun(tmp_path, body)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "ValueError: by design" in err
    told = (tmp_path / "rank 0").read_text()
    assert "rank 0 lost rank 1 in sum again at step 5" in told
    assert "ended with ValueError: by design" in told


@pytest.mark.slow
def test_a_rank_that_is_killed_is_named_by_the_other(tmp_path: Path) -> None:
    body = """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with join() as world:
        link = world.link("data", (0, 1), torch.device("cpu"))
        if rank == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            link.all_reduce(torch.ones(1), "sum").wait()
        except PeerLost as lost:
            say(lost)
    """
    process = torchrun(tmp_path, body)
    process.communicate(timeout=120)
    assert process.returncode == 1
    told = (tmp_path / "rank 1").read_text()
    assert "rank 1 lost rank 0 in sum before the first step" in told
    assert "gave no answer to the roll call" in told


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False])
def test_a_sigterm_to_torchrun_asks_to_stop(tmp_path: Path, training: bool) -> None:
    body = f"""
    with join() as world:
        world.step = 3 if {training} else None
        (folder / f"ready {{rank}}").touch()
        try:
            stopped = world.stop_requested.wait(60)
            say("stopped after the step" if stopped else "never asked")
        except KeyboardInterrupt:
            say("interrupted")
    """
    process = torchrun(tmp_path, body)
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("ready *"))) < 2:
        assert time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert said(tmp_path) == ["stopped after the step" if training else "interrupted"] * 2


RESTARTED = """
import os, signal, torch
import allfuse as af

def die(session, event):
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and event.step == 7 and session.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)

def job():
    x = torch.arange(192.0).reshape(64, 3) / 192
    return af.Job(
        model=lambda: torch.nn.Linear(3, 1),
        train=(x, x.sum(1, keepdim=True)),
        loss=lambda outputs, batch: torch.nn.functional.mse_loss(outputs, batch[1]),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        batch_size=8,
        stop=af.Stop(steps=12),
        save_every=2,
        hooks=[af.on("step", die)],
    )
"""


@pytest.mark.slow
def test_workers_that_torchrun_starts_again_go_on_from_the_last_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "job.py").write_text(RESTARTED)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts", "1"]
    command += ["--nproc-per-node", "2", "-m", "allfuse", "train", "job.py", "--plan", "data(2)"]
    done = subprocess.run(
        [*command, "--out", "run", "--auto-resume"],
        cwd=tmp_path, capture_output=True, text=True, timeout=180, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "gave no answer to the roll call" in done.stderr
    steps = [e.step for e in read_events(tmp_path / "run" / "events.jsonl") if e.name == "step"]
    again = steps.index(7) + 1
    assert steps[:again] == [*range(1, 8)]
    assert steps[again] in (3, 5, 7)  # after the newest checkpoint that was whole
    assert steps[again:] == [*range(steps[again], 13)]


def test_the_address_that_others_reach_is_not_a_loopback_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    found = own_address("localhost")  # as a master's own name may resolve on its host
    assert found is None or not found.startswith("127.")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    assert own_address("localhost") == "127.0.0.1"
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "no-such-thing0")
    with pytest.raises(UserError, match="GLOO_SOCKET_IFNAME: received 'no-such-thing0'"):
        own_address("localhost")
