"""Servers, sites out of step and gossip, of models that ranks share."""

from __future__ import annotations

import functools
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from crews import run_crew, train_crew, train_crew_into
from test_training_split import CASES, assert_near
from torch import Tensor, nn
from training_cases import session, under

from allfuse.base.errors import AllfuseError
from allfuse.job import Job, Stop
from allfuse.launcher import current_world
from allfuse.split import assembly
from allfuse.split.assembly import Assembly
from allfuse.store.checkpoint import Checkpoints
from allfuse.store.tensorfile import read_tensors
from allfuse.training.loop import Result, train_job
from allfuse.training.session import Session
from allfuse.verify import Report, verify_job

STEPS = 8
SERVED = "data(2, topology=central(servers=2))"


def heavy(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def made(name: str = "mlp", **changes: Any) -> Job:
    case = CASES[name]
    return case.job(**{"optimizer": heavy, "stop": Stop(steps=STEPS), **changes})


def alone(job: Job) -> Result:
    result: Result = under("data(1)", lambda: train_job(job))[0]
    return result


@pytest.mark.parametrize("name", [pytest.param("mlp", marks=pytest.mark.slow), "tied"])
@pytest.mark.parametrize("split", ["tensor(2)", "pipe(2)", "shard(2)"])
def test_servers_of_cut_models_in_step_equal_one_process(name: str, split: str) -> None:
    """Clipped by the norm of the whole gradient, which the servers find."""
    job = made(name)
    result = train_crew(job, f"{SERVED} * {split}").result
    assert result.steps == STEPS
    assert_near(result.weights, alone(job).weights)


@pytest.mark.parametrize(
    ("outer", "split"),
    [
        ("data(2, topology=central(servers=2, replicas=1))", "pipe(2)"),
        ("site(2, every=3, topology=central(servers=2), outer=nesterov(lr=0.7))", "tensor(3)"),
        *(
            pytest.param(outer, split, marks=pytest.mark.slow)
            for outer, split in [
                ("site(2, every=3, topology=central(servers=2))", "tensor(2) * pipe(2)"),
                ("site(2, every=3, delay=1, topology=central(servers=2))", "pipe(2)"),
                ("site(2, every=4, fragments=2, topology=central(servers=2))", "shard(2)"),
            ]
        ),
        ("site(2, every=4, fragments=2, delay=1, topology=central(servers=2))", "tensor(2)"),
    ],
)
def test_what_is_in_step_comes_to_the_same_cut_and_whole(outer: str, split: str) -> None:
    x, y = CASES["mlp"].job().train
    job = made(validation=(x, y), evaluate_every=3)
    whole, cut = train_crew(job, outer), train_crew(job, f"{outer} * {split}")
    assert_near(cut.result.weights, whole.result.weights)
    measured = [
        [
            event["data"]["metrics"]["loss"]
            for event in told.all("told")
            if event["event"] == "evaluated"
        ]
        for told in (whole, cut)
    ]
    assert measured[0]
    assert measured[1] == pytest.approx(measured[0], rel=1e-9)


def test_several_replicas_of_a_cut_model_make_up_a_site(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assembly, "CHUNK_BYTES", 600)  # so that tensors travel in several parts
    outer = "site(2, every=3, topology=central(servers=1)) * data(2)"
    job = made()
    whole, cut = train_crew(job, outer), train_crew(job, f"{outer} * tensor(2)")
    assert_near(cut.result.weights, whole.result.weights)


def check(plan: str, **changes: Any) -> Report:
    """Verify on threads."""
    job = functools.partial(CASES["mlp"].job, **changes)
    return verify_job(job, plan, steps=6, threads=True)


@pytest.mark.parametrize(
    "plan",
    [
        "data(2, topology=central(servers=2), sync=asp) * tensor(2)",
        "data(2, topology=central(servers=1), sync=ssp(1)) * pipe(2)",
        "data(2, topology=central(servers=2), sync=asp) * shard(2)",
        "data(2, topology=central(servers=2), sync=asp, codec=int8) * tensor(2)",
        "data(2, topology=central(servers=2), codec=int8) * shard(2)",
        "site(2, every=2, sync=asp) * tensor(2)",
        "site(2, every=3, delay=1, sync=asp) * pipe(2)",
        "site(2, every=2, fragments=2, sync=asp) * tensor(2)",
        "site(3, every=2, topology=gossip, sync=asp) * tensor(2)",
        "site(2, every=2, topology=gossip, sync=asp) * pipe(2)",
    ],
)
def test_a_run_of_cut_models_equals_its_events_executed_by_one_process(plan: str) -> None:
    report = check(plan, optimizer=heavy)
    assert report.ok, report.lines()
    assert report.promise == "replayed"
    assert all(row.differences for row in report.rows if row.differences is not None)


@pytest.mark.parametrize(
    ("first", "then"),
    [
        (f"{SERVED} * tensor(2)", f"{SERVED} * tensor(2)"),
        ("tensor(2)", f"{SERVED} * shard(2)"),
        ("site(1, every=2, sync=asp) * tensor(2)", "data(2)"),
        *(
            pytest.param(first, then, marks=pytest.mark.slow)
            for first, then in [
                (f"{SERVED} * pipe(2)", "tensor(2)"),
                (f"{SERVED} * shard(2)", SERVED),
                ("site(1, every=2, sync=asp) * pipe(2)", "site(1, every=2, sync=asp) * tensor(2)"),
                ("pipe(2)", "site(1, every=2, sync=asp) * shard(2)"),
                (
                    "site(1, topology=gossip, sync=asp) * tensor(2)",
                    "site(1, every=2, sync=asp) * pipe(2)",
                ),
            ]
        ),
    ],
)
def test_a_run_of_cut_models_goes_on_under_another_plan(
    first: str, then: str, tmp_path: Path
) -> None:
    """Momentum of the servers, and of sites, is that of the whole model."""
    out, job = tmp_path / "run", made("tied")

    def train(plan: str, steps: int, resume: bool) -> Result:
        part = CASES["tied"].job(optimizer=heavy, stop=Stop(steps=steps), save_every=3)
        if "topology" in plan or "asp" in plan:
            return train_crew_into(out, part, plan, resume=resume).result
        result: Result = under(plan, lambda: train_job(part, out=out, resume=resume))[0]
        return result

    train(first, STEPS // 2, False)
    assert train(then, STEPS, True).steps == STEPS
    exported = read_tensors(out / "model.safetensors")
    expected = alone(job).weights
    assert_near({name: exported[name] for name in exported}, {n: expected[n] for n in exported})
    shapes = {name: tuple(value.shape) for name, value in expected.items()}
    assert shapes.items() >= {n: tuple(v.shape) for n, v in exported.items()}.items()


def test_a_loss_that_is_no_number_ends_all_ranks_of_all_groups() -> None:
    job = made(loss=lambda outputs, batch: outputs.sum() * float("nan"))
    told = train_crew(job, f"{SERVED} * tensor(2)")
    assert len(told.results) == 4
    assert all(isinstance(each, AllfuseError) for each in told.results)


@pytest.mark.parametrize("split", ["data(2)", "tensor(2)"])
def test_all_ranks_of_a_group_know_what_others_measured(split: str) -> None:
    """Else they would not agree on what is still to be measured, or saved."""
    x, y = CASES["mlp"].job().train
    job = made(validation=(x, y), evaluate_every=2)
    known: list[dict[str, Any]] = []

    def work() -> None:
        def prepare(s: Session) -> None:
            s.at_close(lambda: known.append(s.state.parts["stopping"].state_dict()))

        train_job(job, prepare=prepare)

    run_crew(work, f"site(2, every=2, topology=central(servers=1)) * {split}")
    assert len(known) == 4
    for each in known:
        del each["seconds"]
    groups = {json.dumps(each, sort_keys=True): known.count(each) for each in known}
    assert all(count % 2 == 0 for count in groups.values()), groups


def test_frozen_weights_and_counters_of_cut_models_are_in_the_checkpoint(tmp_path: Path) -> None:
    """Servers hold neither."""

    def build() -> nn.Module:
        model = nn.Sequential(
            nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 12), nn.BatchNorm1d(12), nn.Linear(12, 4)
        )
        model[0].weight.requires_grad_(False)
        return model.double()

    def job(steps: int) -> Job:
        return made(model=build, batch_statistics="local", save_every=4, stop=Stop(steps=steps))

    out = tmp_path / "run"
    plan = "site(1, every=2, sync=asp) * data(2) * tensor(2)"
    train_crew_into(out, job(4), plan)
    state = Checkpoints(out / "checkpoints").read(4)[0]
    whole = build().state_dict()
    held = state["models"]["model"]
    assert {n: v.shape for n, v in held.items()} == {n: v.shape for n, v in whole.items()}
    assert int(held["3.num_batches_tracked"]) == 4
    assert state["pieces"] == {}
    resumed = under("data(2)", lambda: train_job(job(8), out=out, resume=True))[0]
    at_once = under("data(2)", lambda: train_job(job(8)))[0]
    for name in ("0.weight", "4.weight", "3.running_mean", "3.num_batches_tracked"):
        torch.testing.assert_close(resumed.weights[name], at_once.weights[name], msg=name)


def test_groups_that_gossip_gather_their_weights_only_where_they_are_mixed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gathered: list[int] = []
    gather = Assembly.gather

    def counted(self: Assembly, *about: Any) -> Any:
        gathered.append(1)
        return gather(self, *about)

    monkeypatch.setattr(Assembly, "gather", counted)
    plan = "site(2, every=12, topology=gossip, sync=asp) * tensor(2)"
    told = train_crew(made(stop=Stop(steps=48)), plan)
    assert told.result.steps == 48
    of_each_rank = len(gathered) / 4
    assert of_each_rank < 48 / 2


def test_a_loop_of_ones_own_pushes_pieces_when_its_optimizer_steps() -> None:
    job = made(clip=None)

    def work() -> dict[str, Any]:
        with session() as s:
            model = s.model(job.model)
            optimizer = s.optimizer(heavy(model.parameters()))
            for batch in s.batches(job.train, 7, steps=STEPS):
                s.backward(job.loss(model(batch[0]), batch), last=True)
                optimizer.step()
                optimizer.zero_grad()
            return s.weights()["model"]

    told = run_crew(work, f"{SERVED} * tensor(2)")
    assert_near(told.results[0], under("data(1)", work)[0])


@pytest.mark.slow
def test_a_group_waits_for_slower_ones_longer_than_a_links_deadline() -> None:
    slow_s, timeout_s = 3.0, 2.0
    plain = made(stop=Stop(steps=3))

    def loss(outputs: Tensor, batch: Any) -> Tensor:
        world = current_world()
        assert world is not None
        if world.crew is not None and world.crew.index == 1 and world.step == 1:
            time.sleep(slow_s)
        result: Tensor = plain.loss(outputs, batch)
        return result

    told = run_crew(
        lambda: train_job(replace(plain, loss=loss)), f"{SERVED} * tensor(2)", timeout_s=timeout_s
    )
    assert told.result.steps == 3
