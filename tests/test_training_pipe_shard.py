"""Stages of a pipeline whose state is cut evenly over ranks: the numbers of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_training_pipe import (
    JOBS,
    assert_goes_on_to_the_bit,
    assert_learns_alike,
    assert_moves,
)
from test_training_split import assert_fused_as_whole, assert_near, classes, decayed
from torch import Tensor
from training_cases import session, train, under

from allfuse.base.errors import PeerLost
from allfuse.job import Stop
from allfuse.launcher.thread import launch_threads
from allfuse.link.thread import Script
from allfuse.split.shard.gather import Block
from allfuse.training.loop import train_job

SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "plan", ["pipe(2) * shard(2)", pytest.param("shard(2) * pipe(3)", marks=SLOW)]
)
@pytest.mark.parametrize(
    "name", ["mlp", "asked", *(pytest.param(n, marks=SLOW) for n in ("uneven", "tied"))]
)
def test_shards_of_stages_learn_what_one_process_learns(name: str, plan: str) -> None:
    assert_learns_alike(name, plan)


@pytest.mark.parametrize(
    "schedule",
    [
        "interleaved(3)",
        "zbv",
        *(
            pytest.param(n, marks=SLOW)
            for n in ("gpipe", "interleaved", "zero_bubble", "zero_bubble(2)")
        ),
    ],
)
def test_every_schedule_gives_the_same_numbers(schedule: str) -> None:
    """Also where a rank has several stages, which bring together what each of them needs."""
    assert_learns_alike("tied", f"pipe(2, schedule={schedule}) * shard(2)", steps=4)


@pytest.mark.parametrize(
    "plan",
    [
        "data(2) * pipe(2) * shard(2)",
        pytest.param("pipe(2, schedule=zbv) * shard(2) * tensor(2)", marks=SLOW),
        pytest.param("pipe(2) * shard(4)", marks=SLOW),
        pytest.param("pipe(4) * shard(2)", marks=SLOW),
        pytest.param("shard(2) * tensor(2) * pipe(2)", marks=SLOW),
    ],
)
def test_products_with_8_ranks_give_the_numbers_of_one_process(plan: str) -> None:
    assert_learns_alike("tied", plan, steps=4)


@pytest.mark.parametrize("changes", [{"accumulate": 2}, {"recompute": True}], ids=str)
def test_pieces_of_batches_and_blocks_that_run_again_change_nothing(changes: Any) -> None:
    assert_learns_alike("tied", "pipe(2) * shard(2)", steps=4, **changes)


def test_batches_may_be_as_long_as_they_are() -> None:
    """A new shape is followed with the whole parameters, of which nobody brings the rows. Every
    rank fills up its own share, as under data(2)."""
    made = JOBS["padded"](stop=Stop(steps=5))
    expected = train(made, "data(2)")[0].weights
    assert_near(train(made, "pipe(2) * shard(2)")[0].weights, expected)


@pytest.mark.parametrize("batch_size", [5, pytest.param(7, marks=SLOW)])
def test_ranks_with_fewer_samples_or_none_go_through_as_many_microbatches(batch_size: int) -> None:
    """Of 5 samples 4 ranks get 2, 1, 1, 1; of the last batch of 2 two get none."""
    x, y = JOBS["tied"]().train
    made = JOBS["tied"](train=(x[:42], y[:42]), batch_size=batch_size, stop=Stop(steps=9))
    whole = train(made, "data(1)")[0].weights
    assert_near(train(made, "shard(4) * pipe(2)")[0].weights, whole)


@pytest.mark.parametrize(
    "plan",
    ["site(2, every=3)", "site(2, every=4, outer=nesterov, codec=int8)", "data(2, rule=vote)"],
)
def test_replicas_fuse_the_rows_that_each_rank_has(plan: str) -> None:
    made = JOBS["mlp"](clip=None, batch_size=9, stop=Stop(steps=8))
    assert_fused_as_whole(made, f"{plan} * pipe(2) * shard(2)", " * pipe(2) * shard(2)")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param("pipe(2) * shard(2)", "data(1)", marks=SLOW),
        ("data(2)", "pipe(2) * shard(2)"),
        *(
            pytest.param(before, after, marks=SLOW)
            for before, after in [
                ("pipe(2) * shard(2)", "shard(2) * pipe(3, schedule=interleaved)"),
                ("tensor(2)", "pipe(2) * shard(2)"),
                ("pipe(2) * shard(3)", "shard(2)"),
                ("pipe(2)", "data(2) * pipe(2) * shard(2)"),
            ]
        ),
    ],
    ids=str,
)
def test_checkpoints_move_between_plans(before: str, after: str, tmp_path: Path) -> None:
    assert_moves(before, after, tmp_path)


def test_a_checkpoint_is_gone_on_from_to_the_bit(tmp_path: Path) -> None:
    assert_goes_on_to_the_bit("pipe(2) * shard(2)", tmp_path)


def test_all_ranks_know_the_figures_of_the_last_stage() -> None:
    """Of 13 samples each shard measures its own, through its own pipeline."""
    x, y = JOBS["tied"]().train
    made = JOBS["tied"](
        validation=(x[:13], y[:13]), metrics={"loss": classes}, stop=Stop(steps=3), batch_size=8
    )
    (one,) = train(made)
    for each in train(made, "pipe(2) * shard(2)"):
        assert each.metrics == pytest.approx(one.metrics, rel=1e-9)
        assert each.loss == pytest.approx(one.loss, rel=1e-9)


def held_by(plan: str) -> list[int]:
    """Bytes of the parameters that each rank has."""

    def work() -> int:
        with session() as s:
            made = JOBS["uneven"]()
            model = s.model(made.model)
            s.optimizer(decayed(model.parameters()))
            for batch in s.batches(made.train, 8, steps=1):
                s.step(batch, made.loss, forward=lambda m, b: m(b[0]))
            parameters = [p for p in model.parameters() if p.requires_grad]
            return sum(p.numel() * p.itemsize for p in parameters)

    return under(plan, work)


def test_a_rank_holds_its_rows_of_its_stage() -> None:
    whole = sum(p.nbytes for p in JOBS["uneven"]().model().parameters())  # type: ignore[operator]
    held = held_by("pipe(2) * shard(2)")
    assert sum(held) == whole
    assert max(held) < 0.4 * whole


@pytest.mark.parametrize("microbatches", [1, 3])
def test_every_microbatch_brings_blocks_together_twice_and_sums_once(
    microbatches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients are added up as rows: a rank never holds those of a whole stage."""
    counts: dict[str, int] = {"gather": 0, "reduce": 0}
    gather, reduce = Block.gather, Block.reduce

    def counted(name: str, inner: Any) -> Any:
        def call(self: Block, *args: Any) -> Any:
            counts[name] += self.link.rank == 0
            return inner(self, *args)

        return call

    monkeypatch.setattr(Block, "gather", counted("gather", gather))
    monkeypatch.setattr(Block, "reduce", counted("reduce", reduce))
    made = JOBS["mlp"](stop=Stop(steps=1))
    train(made, f"pipe(2, microbatches={microbatches}) * shard(2)")
    layers = 3
    assert counts["reduce"] == layers * microbatches
    assert counts["gather"] <= 2 * layers * microbatches


@pytest.mark.parametrize("at", [60, 75, 90])
def test_a_rank_that_dies_ends_all_and_is_named(at: int) -> None:
    results = launch_threads(
        lambda: train_job(JOBS["mlp"](stop=Stop(steps=30))),
        4,
        plan="pipe(2) * shard(2)",
        script=Script(kill={(2, at)}),
    )
    lost = [each for each in results if isinstance(each, PeerLost)]
    assert len(lost) == 3
    assert any(each.peer == 2 for each in lost)


def test_tied_weights_stay_equal_to_the_bit() -> None:
    ends: dict[tuple[int, int], Tensor] = {}

    def work() -> None:
        def prepare(s: Any) -> None:
            def look(*_: Any) -> None:
                here = s.place.shard.rank, s.place.pipe.rank
                (own,) = s.models.values()
                ends[here] = own.table.weight.detach().clone()

            s.on("step", look)

        train_job(JOBS["tied"](stop=Stop(steps=5)), prepare=prepare)

    under("pipe(2) * shard(2)", work)
    for shard in range(2):
        assert torch.equal(ends[shard, 0], ends[shard, 1])
