"""Training under plans that cut a model's state evenly: the numbers of one process."""

from __future__ import annotations

import os
import signal
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from test_training_split import (
    CASES,
    Case,
    alone,
    assert_fused_as_whole,
    assert_near,
    classes,
    figures,
    pairs,
    recorded,
)
from torch import Tensor, nn
from training_cases import TIGHT, Recorded, assert_equal, session, train, under

from allfuse.base.errors import PeerLost, UserError, WorkerFailed
from allfuse.job import Stop
from allfuse.launcher.local import launch_local
from allfuse.launcher.thread import launch_threads
from allfuse.link.thread import Script
from allfuse.split.parted import Parted
from allfuse.store.tensorfile import read_tensors
from allfuse.training.exporting import InTurn
from allfuse.training.loop import train_job

PLANS = ("shard(2)", "shard(4)", "data(2) * shard(2)", "tensor(2) * shard(2)")
OFTEN = {
    "shard(4)": ("uneven", "tied", "strange"),
    "data(2) * shard(2)": ("normed", "tied"),
    "tensor(2) * shard(2)": ("uneven", "tied", "convolutions"),
}


class Strange(nn.Module):
    """One row, a single number, a part that is not learned, one that a step may not use, and a
    layer that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice = nn.Linear(6, 10), nn.Linear(10, 10)
        self.row, self.scale = nn.Parameter(torch.ones(1, 10)), nn.Parameter(torch.tensor(1.5))
        self.frozen, self.unused = nn.Linear(10, 10), nn.Linear(10, 3)
        self.frozen.requires_grad_(False)
        self.last = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.twice(torch.tanh(self.twice(self.first(x) * self.row))))
        result: Tensor = self.last(self.frozen(x) * self.scale)
        return result


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.last = nn.LSTM(6, 5, batch_first=True), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.last(self.inner(x)[0][:, -1])
        return result


CASES |= {"strange": Case(Strange, (6,), (), 4), "recurrent": Case(Recurrent, (3, 6), (), 4)}


@pairs(CASES, PLANS, OFTEN)
def test_a_sharded_model_learns_what_one_process_learns(name: str, plan: str) -> None:
    if "tensor" in plan and name in ("strange", "recurrent"):
        pytest.skip("tensor(2) finds nothing to cut, or not all of it")
    result, expected = alone(name)
    results, told = recorded(CASES[name].job(), plan)
    for events in told:
        torch.testing.assert_close(figures(events), expected, **TIGHT)
    assert_near(results[0].weights, result.weights)


@pytest.mark.parametrize("changes", [{"accumulate": 3}, {"batch_size": 6}], ids=str)
def test_pieces_of_shares_and_ranks_without_samples_change_nothing(
    changes: dict[str, int],
) -> None:
    """The last batch of 44 samples is smaller than the ranks are many, or their pieces."""
    x, y = CASES["tied"].job().train
    made = CASES["tied"].job(train=(x[:44], y[:44]), stop=Stop(steps=9), **changes)
    whole = train(made, "data(1)")[0].weights
    assert_near(train(made, "shard(3)")[0].weights, whole)


def test_a_sharded_model_is_measured_and_trained_in_turn() -> None:
    """torch's own layers take a faster way where nothing is learned, past their parts."""
    x, y = CASES["tied"].job().train
    made = CASES["tied"].job(
        validation=(x[:13], y[:13]), metrics={"loss": classes}, evaluate_every=3
    )
    expected = train(made, "data(1)")[0]
    result = train(made, "shard(3)")[0]
    assert result.metrics == pytest.approx(expected.metrics, rel=1e-9)
    assert_near(result.weights, expected.weights)


@pytest.mark.parametrize(
    "plan",
    [
        "site(2, every=3) * shard(2)",
        "site(2, every=4, outer=nesterov, codec=int8) * shard(2)",
        "data(2, codec=topk(0.2)) * shard(2)",
        "data(2, rule=vote) * shard(2)",
        "site(2, topology=gossip(ring)) * data(2) * shard(2)",
    ],
)
def test_replicas_fuse_the_rows_that_each_rank_has(plan: str) -> None:
    """Of sites each has the gradient of its whole share, as one that is whole has."""
    made = CASES["mlp"].job(clip=None, batch_size=9, stop=Stop(steps=8))
    assert_fused_as_whole(made, plan, " * shard(2)")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("data(1)", "shard(2)"),
        ("shard(2)", "data(1)"),
        ("shard(2)", "tensor(2)"),
        ("tensor(2)", "shard(3)"),
        ("shard(2)", "shard(4)"),
        ("shard(4)", "shard(4)"),
        ("data(2) * shard(2)", "shard(2) * tensor(2)"),
        ("shard(2) * tensor(2)", "data(3)"),
    ],
    ids=str,
)
def test_checkpoints_move_between_plans(before: str, after: str, tmp_path: Path) -> None:
    made, out = CASES["tied"].job(save_every=10, stop=Stop(steps=10)), tmp_path / "run"
    train(made, before, out=out)
    whole = CASES["tied"].job(save_every=10)
    result = train(whole, after, out=out, resume=True)[0]
    assert result.steps == 20
    assert_near(result.weights, alone("tied")[0].weights)
    written = read_tensors(out / "model.safetensors")
    assert_near(written, {name: result.weights[name] for name in written})


@pytest.mark.parametrize("at", range(20, 28))
def test_a_rank_that_dies_is_named_wherever_the_others_meet_it(at: int) -> None:
    def work() -> int:
        return train_job(CASES["tied"].job()).steps

    results = launch_threads(work, 2, plan="shard(2)", script=Script(kill={(1, at)}))
    error = results[0]
    assert isinstance(error, PeerLost)
    assert (error.rank, error.peer) == (0, 1)
    assert error.operation is not None
    assert error.operation.startswith(("gather ", "sum the gradients of ", "exchange losses"))


def test_a_worker_process_that_is_killed_ends_the_run(tmp_path: Path) -> None:
    def work() -> None:
        def end(s: Any, event: Any) -> None:
            if s.rank == 1 and s.steps == 3:
                os.kill(os.getpid(), signal.SIGKILL)

        try:
            train_job(CASES["mlp"].job(), prepare=lambda s: s.on("step", end))
        except PeerLost as error:
            (tmp_path / "told").write_text(f"{error.peer} {error.step} {error.operation}")
            raise

    begin = time.monotonic()
    with pytest.raises(WorkerFailed, match="rank 1 was killed by SIGKILL"):
        launch_local(work, 2, plan="shard(2)", threads=1, timeout_s=60.0)
    assert time.monotonic() - begin < 30
    peer, step, operation = (tmp_path / "told").read_text().split(maxsplit=2)
    assert (peer, step) == ("1", "3")
    assert operation.startswith("gather ")


def test_sites_of_shards_go_on_from_their_own_checkpoints(tmp_path: Path) -> None:
    plan = "site(2, every=4, outer=nesterov, codec=int8) * shard(2)"
    made, out = CASES["mlp"].job(save_every=5, stop=Stop(steps=10)), tmp_path / "run"
    train(made, plan, out=out)
    whole = CASES["mlp"].job(save_every=5, stop=Stop(steps=13))
    result = train(whole, plan, out=out, resume=True)[0]
    assert_equal(result.weights, train(whole, plan)[0].weights, exact=True)


def test_a_rank_that_goes_on_holds_nothing_in_the_files(tmp_path: Path) -> None:
    """What it needs of them was copied: they may be removed, or written anew."""
    made, out = CASES["mlp"].job(save_every=4, stop=Stop(steps=4)), tmp_path / "run"
    train(made, "shard(2)", out=out)
    maps: list[str] = []

    def look(s: Any) -> None:
        s.on("start", lambda *_: maps.append(Path("/proc/self/maps").read_text()))

    for steps in (6, 8):  # of another plan, and of its own
        made = CASES["mlp"].job(save_every=2, stop=Stop(steps=steps))
        result = train(made, "data(1)", out=out, resume=True, prepare=look)
        assert result[0].steps == steps
    assert len(maps) == 2
    assert not any(str(out) in text for text in maps)


@pytest.mark.parametrize("plan", ["shard(3)", "tensor(2) * shard(2)", "pipe(2)"])
def test_a_model_is_written_one_tensor_at_a_time(
    plan: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the order of the file, tied names once; each is gone before the next one comes."""
    most: list[int] = []
    alive: list[weakref.ref[Tensor]] = []
    assemble = Parted.assemble

    def watched(split: Parted, name: str, own: Tensor | None) -> Tensor | None:
        found = assemble(split, name, own)
        if found is not None:
            alive.append(weakref.ref(found))
            most.append(sum(each() is not None for each in alive))
        return found

    monkeypatch.setattr(Parted, "assemble", watched)
    out, made = tmp_path / "run", CASES["tied"].job()
    under(plan, lambda: train_job(made, out=out, keep_weights=False))
    written, expected = read_tensors(out / "model.safetensors"), alone("tied")[0].weights
    assert len(most) == len(written) == len(expected) - 1
    assert max(most) <= 2
    assert_near(written, {name: expected[name] for name in written})


def test_a_disk_that_is_full_leaves_no_rank_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill(*_: Any) -> Tensor:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(InTurn, "fill", fill)
    out = tmp_path / "run"
    results = under("shard(2)", lambda: train_job(CASES["mlp"].job(), out=out).steps)
    assert results == [20, 20]
    assert not (out / "model.safetensors").exists()


@pytest.mark.parametrize("plan", ["data(2)", "shard(2)", "tensor(2)"])
def test_a_loop_of_its_own_steps_with_the_gradient_of_the_whole_model(plan: str) -> None:
    case = CASES["mlp"]
    made = case.job()

    def work() -> list[tuple[float, float]]:
        with session(clip=0.5) as s:
            s.stepper.always_norm = True
            model = s.model(made.model, forward=lambda m, batch: m(batch[0]))
            optimizer = s.optimizer(made.optimizer(model.parameters()))
            events = Recorded()
            events.attach(s)
            for batch in s.batches(made.train, 7, steps=20):
                s.backward(classes(model(batch[0]), batch))
                optimizer.step()
                optimizer.zero_grad()
        return figures(events)

    for found in under(plan, work):
        torch.testing.assert_close(found, alone("mlp")[1], **TIGHT)


@pytest.mark.parametrize(
    "plan",
    ["shard(1, offload=true)", "shard(2, offload=true)", "data(2) * shard(2, offload=true)"],
)
def test_state_that_is_kept_by_the_host_changes_no_number(plan: str) -> None:
    result, expected = alone("tied")
    results, told = recorded(CASES["tied"].job(), plan)
    torch.testing.assert_close(figures(told[0]), expected, **TIGHT)
    assert_near(results[0].weights, result.weights)


def test_a_checkpoint_of_the_host_s_is_gone_on_from(tmp_path: Path) -> None:
    made, out = CASES["tied"].job(save_every=10, stop=Stop(steps=10)), tmp_path / "run"
    train(made, "shard(1, offload=true)", out=out)
    result = train(CASES["tied"].job(save_every=10), "shard(2, offload=true)", out=out, resume=True)
    assert_near(result[0].weights, alone("tied")[0].weights)


def test_an_optimizer_that_looks_at_whole_matrices_is_refused() -> None:
    """It would see rows."""
    made = CASES["mlp"].job(optimizer=lambda parameters: torch.optim.Adafactor(parameters))
    with pytest.raises(UserError, match="Adafactor"):
        train(made, "shard(2)")
