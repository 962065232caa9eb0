"""Roles beside the processes that torchrun started."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from allfuse.base.errors import Interrupted, PlanError, UserError, WorkerFailed
from allfuse.cli.options import run_under
from allfuse.hosting import _crew_of
from allfuse.launcher import current_world
from allfuse.launcher import joined_crew as joined
from allfuse.launcher.crewmate import WORKER, Crewmate, CrewRequest
from allfuse.launcher.token import VARIABLE
from allfuse.launcher.torchrun import JoinedWorld
from allfuse.link.thread import Hub
from allfuse.plan import as_plan
from allfuse.training.loop import train_job
from tests.crews import run_crew, small_job

PLAN = "data(4, topology=central(servers=3), sync=ssp(3))"
TOKEN, OTHER = b"0123456789abcdef", b"fedcba9876543210"


class Started(JoinedWorld):
    """A process of torchrun, with a board in place of the store."""

    def __init__(self, board: Hub, place: int, count: int, local: int) -> None:
        self.common, self.place, self.everybody = board, place, count
        self.local_rank, self.all_on_one_host = place % local, local == count
        self.meeting, self.timeout_s = "meeting", 0.2


def places(count: int, hosts: int = 1) -> list[Started]:
    board = Hub(1)
    return [Started(board, place, count, count // hosts) for place in range(count)]


def test_servers_are_spread_over_hosts_and_the_scheduler_is_with_rank_0(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29400")
    crew = _crew_of(as_plan(PLAN), None)
    worlds = places(4, hosts=2)
    found: dict[int, list[tuple[str, int]]] = {}
    for world in reversed(worlds):  # the others have said what they are when rank 0 asks
        leaders = [0, 2] if world.place == 2 else joined._leaders(world)
        if world.place == 2:
            world.common.set("first/2", b"yes")
        parts = joined._make_parts(crew, world, leaders)
        found[world.place] = [(part.role, part.index) for part in parts]
    assert found[0] == [("scheduler", 0), ("server", 0), ("server", 2)]
    assert found[2] == [("server", 1)]
    assert found[1] == found[3] == []


def test_on_one_host_only_rank_0_has_roles_beside_it() -> None:
    assert [joined._leaders(world) for world in places(3)] == [[0]] * 3


@pytest.mark.parametrize("given", [None, TOKEN])
def test_a_token_that_was_given_does_not_travel_and_one_that_was_made_does(
    given: bytes | None,
) -> None:
    worlds = places(2)
    first, second = (joined._agree_on_token(world, lambda: given) for world in worlds)
    assert first == second
    assert len(first) >= 16
    told = worlds[0].common.get("token")
    assert told is not None
    assert (first in told) == (given is None)


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        (TOKEN, OTHER, "was given one, and rank 0 another one"),
        (TOKEN, None, "was given none, and rank 0 one"),
        (None, OTHER, "was given one, and rank 0 none"),
    ],
)
def test_ranks_with_different_tokens_are_refused(
    first: bytes | None, second: bytes | None, words: str
) -> None:
    one, two = places(2)
    joined._agree_on_token(one, lambda: first)
    with pytest.raises(UserError, match=words):
        joined._agree_on_token(two, lambda: second)


def test_a_rank_with_another_plan_than_rank_0_is_refused() -> None:
    one, two = places(2)
    joined._refuse_other_plan(one, PLAN)
    joined._refuse_other_plan(two, PLAN)
    with pytest.raises(PlanError, match=r"rank 1 was given this plan, and rank 0 data\(4"):
        joined._refuse_other_plan(two, "data(4, sync=asp)")


@pytest.mark.parametrize(
    ("error", "kind"),
    [(UserError("no"), UserError), (WorkerFailed("no", rank=-1), WorkerFailed), (None, bool)],
)
def test_all_of_a_crew_hear_how_it_ends(error: Any, kind: type) -> None:
    request = CrewRequest(role=WORKER, index=0, run="", plan=PLAN, token=b"")
    board = Hub(1)
    one, two = Crewmate(request, board), Crewmate(request, board)
    assert two.end() is None
    one.tell_end(error)
    assert isinstance(two.end(), kind)
    assert error is None or str(two.end()) == "no"


def test_desks_are_encrypted_where_the_crew_spans_hosts() -> None:
    def post(address: str | None) -> Any:
        request = CrewRequest(role=WORKER, index=0, run="", plan=PLAN, token=TOKEN, address=address)
        return Crewmate(request, Hub(1)).post()

    assert not post(None).endpoint.encrypted
    beyond = post("10.0.0.1").endpoint
    assert (beyond.bound, beyond.encrypted) == ("10.0.0.1", True)


def test_a_worker_that_waits_for_others_who_are_gone_heeds_a_request_to_stop() -> None:
    events, asked = [threading.Event()], list[float]()

    def work() -> Any:
        world = current_world()
        assert world is not None
        assert world.crew is not None
        index = world.crew.index
        if index == 0:
            events[0] = world.stop_requested

        def leave(session: Any, event: Any) -> None:
            if session.steps >= 2:
                raise RuntimeError("by design")

        def prepare(session: Any) -> None:
            if index == 1:
                session.on("step", leave)

        try:
            return train_job(small_job(), prepare=prepare)
        finally:
            if index == 1:
                asked.append(time.monotonic())
                events[0].set()  # as torchrun's SIGTERM does where one has failed

    told = run_crew(work, "data(2, topology=central(servers=1), sync=ssp(1))", timeout_s=90.0)
    assert isinstance(told.crew.results[0][0], Interrupted)
    assert time.monotonic() - asked[0] < 45.0


def under_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = {"RANK": 0, "WORLD_SIZE": 4, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1}
    for name, value in facts.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.delenv(VARIABLE, raising=False)


@pytest.mark.parametrize("policy", ["continue", "restart"])
def test_under_torchrun_a_lost_worker_is_torchruns_business(
    monkeypatch: pytest.MonkeyPatch, policy: str
) -> None:
    under_torchrun(monkeypatch)
    with pytest.raises(UserError, match=f"--on-loss {policy} under torchrun: it ends all workers"):
        run_under(as_plan(PLAN), lambda: None, on_loss=policy)


def test_under_torchrun_too_nobody_may_join_without_a_secret(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    under_torchrun(monkeypatch)
    with pytest.raises(UserError, match="must know a secret, and there is none"):
        run_under(as_plan(PLAN), lambda: None, listen="127.0.0.1:7077")


JOB = """
import time
import torch
import allfuse as af


class Net(torch.nn.Linear):
    def forward(self, x):
        time.sleep({pause} if self.training else 0)
        return super().forward(x)


def job() -> af.Job:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 4, generator=generator)
    y = (x.sum(1) > 0).long()
    return af.Job(
        model=lambda: Net(4, 2),
        train=(x, y),
        validation=(x, y),
        loss=lambda outputs, batch: torch.nn.functional.cross_entropy(outputs, batch[1]),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        batch_size=16,
        stop=af.Stop(steps={steps}),
    )
"""


class Torchrun:
    """`allfuse train` under torchrun, with all processes that came of it."""

    def __init__(self, folder: Path, plan: str, workers: int, *, pause: float, steps: int) -> None:
        (folder / "job.py").write_text(JOB.format(pause=pause, steps=steps))
        self.out = folder / "run"
        self.mark = f"ALLFUSE_TEST_MARK={folder}".encode()
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(workers), "-m", "allfuse", "train", "job.py"]
        name, value = self.mark.decode().split("=", 1)
        self.process = subprocess.Popen(
            [*command, "--plan", plan, "--out", "run", "--json"],
            cwd=folder,
            env={**os.environ, name: value},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def mine(self) -> dict[int, tuple[int, bytes, bytes]]:
        """Parent, command and environment of each process."""
        found = {}
        for path in Path("/proc").glob("[0-9]*"):
            try:
                environment = (path / "environ").read_bytes()
                parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
                if self.mark in environment.split(b"\0"):
                    found[int(path.name)] = (
                        parent,
                        (path / "cmdline").read_bytes(),
                        environment,
                    )
            except (OSError, IndexError):
                continue
        return found

    def worker(self, rank: int) -> int:
        facts = f"RANK={rank}".encode()
        parent = self.process.pid
        (pid,) = [
            pid for pid, (of, _, env) in self.mine().items()
            if of == parent and facts in env.split(b"\0")
        ]  # fmt: skip
        return pid

    def roles(self) -> list[int]:
        """The scheduler, then servers."""
        mine = self.mine()
        (zygote,) = [pid for pid, (of, *_) in mine.items() if of == self.worker(0)]
        return sorted(pid for pid, (of, *_) in mine.items() if of == zygote)

    def until_step(self, step: int) -> None:
        events, deadline = self.out / "events.jsonl", time.monotonic() + 120
        while True:
            lines = events.read_text().splitlines() if events.exists() else []
            if any(f'"step": {step}' in line or f'"step":{step}' in line for line in lines):
                return
            assert time.monotonic() < deadline, "it did not come to that step"
            assert self.process.poll() is None, self.process.communicate()
            time.sleep(0.02)

    def end(self, timeout_s: float = 240.0) -> tuple[int, str, str]:
        """Exit code and output, once nothing is left of it."""
        try:
            out, err = self.process.communicate(timeout=timeout_s)
            deadline = time.monotonic() + 10
            while self.mine() and time.monotonic() < deadline:
                time.sleep(0.02)
            assert not self.mine()
            return self.process.returncode, out, err
        finally:
            for pid in self.mine():
                os.kill(pid, signal.SIGKILL)


@pytest.mark.slow
def test_a_plan_with_servers_trains_under_torchrun_and_leaves_nothing_behind(
    tmp_path: Path,
) -> None:
    plan = "data(2, topology=central(servers=2), sync=ssp(3))"
    run = Torchrun(tmp_path, plan, 2, pause=0.02, steps=12)
    run.until_step(2)
    assert len(run.roles()) == 3
    seen = [command for _, command, _ in run.mine().values()]
    code, out, err = run.end()
    assert code == 0, err
    told = json.loads(out.splitlines()[-1])
    assert (told["steps"], told["reason"]) == (12, "all work is done")
    assert 0 < told["validation"]["loss"] < 2
    assert (run.out / "model.safetensors").exists()
    assert not any(b"token" in command for command in seen)


SCRIPT = """
import os
import sys
from pathlib import Path
import torch
import allfuse as af

x = torch.arange(64.0).reshape(16, 4) / 64
with af.session(plan="site(2, every=2, topology=central(servers=2), sync=ssp(1)) * data(2)") as s:
    model = s.model(lambda: torch.nn.Linear(4, 1))
    s.optimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    for batch in s.batches(x, batch_size=8, epochs=4):
        s.step(batch, lambda outputs, batch: outputs.square().mean())
torch.save(model.state_dict(), Path(sys.argv[1]) / f"weights {os.environ['RANK']}")
"""


@pytest.mark.slow
def test_groups_of_ranks_out_of_step_come_of_torchruns_ranks_and_end_with_the_same_weights(
    tmp_path: Path,
) -> None:
    import torch

    script = tmp_path / "own.py"
    script.write_text(textwrap.dedent(SCRIPT))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "4", str(script), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr
    saved = [torch.load(path) for path in sorted(tmp_path.glob("weights *"))]
    assert len(saved) == 4
    for each in saved[1:]:
        assert torch.equal(each["weight"], saved[0]["weight"])


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_worker_ends_all_under_torchrun_within_its_patience(
    tmp_path: Path, rank: int
) -> None:
    plan = "data(2, topology=central(servers=2), sync=ssp(3))"
    run = Torchrun(tmp_path, plan, 2, pause=0.05, steps=1000)
    run.until_step(4)
    os.kill(run.worker(rank), signal.SIGKILL)
    began = time.monotonic()
    code, _, err = run.end()
    assert code == 1
    assert time.monotonic() - began < 25, "torchrun kills after 30 s"
    assert ("go on with" if rank else "lost a peer in wait for") in err


@pytest.mark.slow
def test_a_killed_server_and_a_killed_scheduler_are_started_again_under_torchrun(
    tmp_path: Path,
) -> None:
    plan = "data(2, topology=central(servers=2), sync=asp)"
    run = Torchrun(tmp_path, plan, 2, pause=0.05, steps=60)
    run.until_step(4)
    scheduler, *servers = run.roles()
    os.kill(servers[-1], signal.SIGKILL)
    run.until_step(12)
    os.kill(scheduler, signal.SIGKILL)
    code, out, err = run.end()
    assert code == 0, err
    assert json.loads(out.splitlines()[-1])["steps"] == 60
    assert "another one goes on from its book" in err
