"""Worker processes that are killed with -9, or stand still: others go on, or all begin again."""

from __future__ import annotations

import functools
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_cli import allfuse
from training_cases import assert_equal, job

from allfuse.base.errors import WorkerFailed
from allfuse.job import Stop
from allfuse.launcher import current_world
from allfuse.launcher.local import launch_local
from allfuse.plan import as_plan
from allfuse.plan.loss import loss_policy
from allfuse.store.run import RunFolder
from allfuse.training.loop import Result, train_job
from allfuse.training.place import Place
from allfuse.training.session import Session


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def work(ends: dict[int, tuple[int, int]], out: Path | None = None, attempts: int = 1) -> Result:
    """Train; a worker gets a signal after a step, in the first attempts."""
    world = current_world()
    assert world is not None
    own, first = world.ids[world.rank], len(world.again) < attempts

    def end(s: Session, event: Any) -> None:
        if first and own in ends and s.steps == ends[own][0]:
            os.kill(os.getpid(), ends[own][1])

    made = job(optimizer=sgd, save_every=3, stop=Stop(steps=12))
    return train_job(made, out=out, prepare=lambda s: s.on("step", end))


def launch(plan: str, on_loss: str, function: Any, timeout_s: float = 60.0) -> Any:
    made = as_plan(plan)
    policy = loss_policy(made, on_loss)
    return launch_local(
        function, made.workers, plan=plan, threads=1, timeout_s=timeout_s, policy=policy
    )


def as_one_process() -> Result:
    return train_job(job(optimizer=sgd, stop=Stop(steps=12)))


@pytest.mark.slow
def test_the_others_go_on_after_the_first_and_then_another_are_killed(tmp_path: Path) -> None:
    ends = {0: (4, signal.SIGKILL), 2: (8, signal.SIGKILL)}
    out = tmp_path / "run"
    result = launch("data(4)", "continue", functools.partial(work, ends, out))
    assert_equal(result.weights, as_one_process().weights)
    folder = RunFolder.open(out)
    assert [each["worker"] for each in folder.record["losses"]] == [0, 2]
    assert folder.model_path.exists()


def test_one_that_stands_still_is_ended_and_left_behind() -> None:
    ends = {1: (5, signal.SIGSTOP)}
    result = launch("data(3)", "continue", functools.partial(work, ends), timeout_s=3.0)
    assert_equal(result.weights, as_one_process().weights)


def dies_while_it_meets() -> Result:
    """The second time that rank 2 is to make links, after the loss of another."""
    meet = Place.meet_again

    def die(place: Place) -> None:
        if place.world.ids[place.world.rank] == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        meet(place)

    Place.meet_again = die  # type: ignore[method-assign]  # a worker's own process
    return work({0: (4, signal.SIGKILL)})


def test_another_is_killed_while_links_are_made_again() -> None:
    result = launch("data(4)", "continue", dies_while_it_meets, timeout_s=200.0)
    assert_equal(result.weights, as_one_process().weights)


@pytest.mark.slow
def test_a_whole_site_leaves_with_the_one_that_was_killed() -> None:
    ends = {3: (5, signal.SIGKILL)}
    result = launch("site(2) * data(2)", "continue", functools.partial(work, ends))
    assert result.steps == 12


@pytest.mark.parametrize(
    "plan",
    ["data(2) * tensor(2)", pytest.param("data(2) * pipe(2)", marks=pytest.mark.slow)],
)
def test_the_replica_of_a_rank_that_was_killed_leaves_as_one(plan: str, tmp_path: Path) -> None:
    """Also the first rank's, which kept the run folder."""
    ends = {1: (5, signal.SIGKILL)}
    out = tmp_path / "run"
    result = launch(plan, "continue", functools.partial(work, ends, out))
    assert_equal(result.weights, as_one_process().weights)
    (entry,) = RunFolder.open(out).record["losses"]
    assert (entry["worker"], entry["ranks"], entry["left"]) == (1, [0, 1], 2)
    assert_equal(load_file(RunFolder.open(out).model_path), as_one_process().weights)


def test_all_are_started_again_from_the_last_checkpoint(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    ends = {1: (7, signal.SIGKILL)}
    out = tmp_path / "run"
    result = launch("data(2)", "restart", functools.partial(work, ends, out, 2))
    assert_equal(result.weights, as_one_process().weights)
    told = capfd.readouterr().err
    assert "rank 1 was killed by SIGKILL" in told
    assert "2 of 5 times" in told
    assert [each["policy"] for each in RunFolder.open(out).record["losses"]] == ["restart"] * 2


def test_what_is_killed_again_and_again_is_given_up(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(WorkerFailed, match="rank 0 was killed by SIGKILL"):
        launch("data(1)", "restart", functools.partial(work, {0: (1, signal.SIGKILL)}, None, 99))
    assert "from the beginning, 5 of 5 times" in capfd.readouterr().err


def test_with_fewer_than_min_the_launch_fails_and_names_the_first_that_was_killed() -> None:
    ends = {1: (4, signal.SIGKILL)}
    with pytest.raises(WorkerFailed, match="rank 1 was killed by SIGKILL"):
        launch("data(2, min=2)", "continue", functools.partial(work, ends))


def test_the_command_line_refuses_what_cannot_go_on(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("print('not run')\n")
    ended = allfuse("run", str(script), "--on-loss", "continue", cwd=tmp_path)
    assert ended.returncode == 2
    assert "no second replica" in ended.stderr
    assert "not run" not in ended.stdout
