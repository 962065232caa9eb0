"""Plans that cut the model, verified and predicted with: the numbers of the whole model."""

from __future__ import annotations

import csv
import functools
from pathlib import Path

import pytest
import torch
from prediction_helpers import make_run, write_rows
from test_verify import make_job
from torch import nn

from allfuse.base.errors import PlanError, UserError
from allfuse.launcher import current_world
from allfuse.launcher.thread import first_failure, launch_threads
from allfuse.link.thread import ThreadLink
from allfuse.plan import as_plan
from allfuse.prediction import evaluate_run, predict_file
from allfuse.verify import verify_job

PLANS = ["tensor(2)", "data(2) * tensor(2)", "tensor(3)", "data(2) * shard(2)"]


def wide() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 12), nn.Linear(12, 3)
    )


def under(plan, work):
    results = launch_threads(work, as_plan(plan).workers, plan=plan, timeout_s=20)
    failure = first_failure(results)
    if failure is not None:
        raise failure
    return results


@pytest.mark.parametrize("plan", [*PLANS, "site(2, every=2) * tensor(2)"])
def test_a_cut_model_has_the_numbers_of_its_reference(plan: str) -> None:
    job = functools.partial(make_job, model=wide, clip=0.1)
    report = verify_job(job, plan, steps=5, threads=True)
    assert report.ok, report.lines()
    assert report.worst.size > 0


def test_a_slice_that_goes_astray_is_found_with_its_step_rank_and_tensor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reduce = ThreadLink.all_reduce

    def astray(link, tensor, operation):
        work = reduce(link, tensor, operation)
        world = current_world()
        if "what goes into 0" in operation or "comes out of" not in operation:
            return work
        if world.rank == 1 and (world.step or 0) == 2:
            work.wait()
            tensor[0] += 1e-3
        return work

    monkeypatch.setattr(ThreadLink, "all_reduce", astray)
    report = verify_job(functools.partial(make_job, model=wide), "tensor(2)", steps=4, threads=True)
    assert not report.ok
    assert (report.first.what, report.first.step) == ("loss", 3)
    row = report.rows[3]
    assert (row.moment, row.weights.what, row.weights.rank) == ("3", "4.weight", 1)


@pytest.mark.parametrize(
    ("plan", "nearest"),
    [
        ("data(2, codec=int8) * tensor(2)", "data(2) * tensor(2)"),
        ("data(2, rule=median) * tensor(2)", "data(2) * tensor(2)"),
        ("site(2, every=4, fragments=2) * tensor(2)", "site(2, every=4) * tensor(2)"),
    ],
)
def test_what_the_reference_cannot_replay_beside_a_cut_is_refused(plan: str, nearest: str) -> None:
    with pytest.raises(PlanError, match="cannot replay that yet") as caught:
        verify_job(make_job, plan, threads=True)
    assert caught.value.nearest == nearest


def read(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("plan", PLANS)
def test_predictions_are_those_of_the_whole_model(plan: str, tmp_path: Path) -> None:
    run = make_run(tmp_path, hidden=12, classes=False)
    numbers = torch.randn(700, 4, generator=torch.Generator().manual_seed(0))
    source = write_rows(tmp_path / "in.csv", numbers)
    shares = []
    for name, each in (("whole", "data(1)"), ("cut", plan)):
        work = functools.partial(predict_file, run, source, tmp_path / f"{name}.csv", batch_size=64)
        shares.append(under(each, work)[0].shares)
    whole, cut = read(tmp_path / "whole.csv"), read(tmp_path / "cut.csv")
    assert len(whole) == len(cut) == sum(shares[1]) == 700
    assert len(shares[1]) == as_plan(plan).workers // as_plan(plan).replica_size
    for one, other in zip(whole, cut, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            assert float(other[name]) == pytest.approx(float(one[name]), rel=1e-4, abs=1e-5)


def test_a_bad_row_is_told_by_all_ranks_that_share_a_model(tmp_path: Path) -> None:
    run = make_run(tmp_path, hidden=12)
    source = write_rows(tmp_path / "in.csv", torch.ones(5, 4))
    source.write_text(source.read_text().replace("1.0", "x", 3))
    work = functools.partial(predict_file, run, source, tmp_path / "out.csv")
    results = launch_threads(work, 2, plan="tensor(2)", timeout_s=20)
    assert ["row 2" in str(each) for each in results] == [True, True]
    assert not (tmp_path / "out.csv").exists()


@pytest.mark.parametrize("plan", PLANS)
def test_figures_are_those_of_the_whole_model(plan: str, tmp_path: Path) -> None:
    run = make_run(tmp_path, hidden=12)
    work = functools.partial(evaluate_run, run)
    whole, cut = under("data(1)", work)[0], under(plan, work)
    for each in cut:
        assert each.samples == whole.samples
        assert each.figures == pytest.approx(whole.figures, rel=1e-5)


def test_a_model_that_cannot_be_cut_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    run = make_run(tmp_path, hidden=5)
    source = write_rows(tmp_path / "in.csv", torch.ones(5, 4))
    work = functools.partial(predict_file, run, source, tmp_path / "out.csv")
    with pytest.raises((PlanError, UserError), match="no layer of the model can be cut"):
        under("tensor(7)", work)
    assert not (tmp_path / "out.csv").exists()
