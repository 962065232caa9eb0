"""Training where workers hold the weights themselves and mix them in pairs, none waiting."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from crews import Told, small_job, train_crew, train_crew_into

import allfuse as af
from allfuse.base.errors import PlanError
from allfuse.launcher.thread import launch_threads
from allfuse.link.mailroom import random_faults
from allfuse.plan import as_plan
from allfuse.roles import gossiper
from allfuse.roles.book import Book
from allfuse.roles.office import BOOK
from allfuse.store.checkpoint import Checkpoints
from allfuse.topology.gossip import GRAPHS
from allfuse.training.loop import train_job
from allfuse.verify import verify_job

STEPS = 14  # of two epochs of `small_job`


def assert_all_end_with_one_model(told: Told) -> None:
    first, *others = [result.weights for result in told.results]
    for other in others:
        assert all(torch.equal(value, other[name]) for name, value in first.items())


def normalized() -> torch.nn.Module:
    return torch.nn.Sequential(
        torch.nn.Linear(8, 9), torch.nn.BatchNorm1d(9), torch.nn.Tanh(), torch.nn.Linear(9, 2)
    ).double()


@pytest.mark.parametrize("graph", list(GRAPHS))
def test_every_sample_is_used_once_and_all_end_with_one_model(graph: str) -> None:
    told = train_crew(small_job(), f"site(3, topology=gossip({graph}), sync=asp)")
    assert told.result.steps == STEPS
    units = Counter((commit["block"], commit["part"]) for commit in told.all("commit"))
    assert set(units.values()) == {1}
    assert sum(commit["rows"] for commit in told.all("commit")) == 2 * 97
    assert_all_end_with_one_model(told)


@pytest.mark.parametrize(
    ("plan", "job"),
    [
        ("site(4, topology=gossip(one_peer), sync=asp)", {}),
        ("site(3, every=2, topology=gossip(full), sync=ssp(1))", {"model": normalized}),
        (
            "site(2, topology=gossip, sync=asp)",
            {
                "optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
                "scheduler": lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 3),
                "clip": 0.5,
            },
        ),
        ("site(4, topology=gossip(ring), sync=asp, codec=int8(stochastic=true))", {}),
        ("site(3, topology=gossip(full), sync=ssp(1), codec=topk(0.1))", {"model": normalized}),
        ("site(2, every=2, topology=gossip, sync=asp, codec=sign(warm=3))", {}),
    ],
    ids=["one_peer", "norm", "adamw", "int8", "topk", "sign"],
)
def test_a_run_executed_again_in_its_own_order_is_the_same_bit_for_bit(
    plan: str, job: dict[str, Any]
) -> None:
    report = verify_job(small_job(**job), plan, steps=8, threads=True)
    assert report.ok
    assert any("bit for bit" in note and "not bit" not in note for note in report.notes)


def test_what_a_codec_does_to_exchanges_is_found_where_it_is_another_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plan = "site(3, topology=gossip, sync=asp, codec=int4)"
    assert verify_job(small_job(), plan, steps=8, threads=True).ok
    monkeypatch.setattr(gossiper, "seed_of", lambda *about: 0)  # int4 that draws, from other keys
    drawn = plan.replace("int4", "int4(stochastic=true)")
    assert not verify_job(small_job(), drawn, steps=8, threads=True).ok


def test_groups_in_step_gossip_with_each_other() -> None:
    report = verify_job(
        small_job(batch_size=16), "site(2, every=2, topology=gossip, sync=asp) * data(2)",
        steps=6, threads=True,
    )  # fmt: skip
    assert report.ok


def test_a_wrong_meeting_is_found_by_executing_the_run_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gossiper, "half_way", lambda theirs, own: torch.sub(theirs, own).mul_(0.4))
    report = verify_job(small_job(), "site(3, topology=gossip, sync=asp)", steps=8, threads=True)
    assert not report.ok


def test_lost_doubled_and_late_letters_change_nothing_of_what_is_promised(tmp_path: Path) -> None:
    faults = random_faults(7, drop=0.05, double=0.1, swap=0.1, delay=0.1, delay_s=0.02)
    job = small_job(stop=af.Stop(steps=4))
    told = train_crew(job, "site(3, topology=gossip, sync=asp)", faults)
    assert told.result.steps == 4
    units = Counter((commit["block"], commit["part"]) for commit in told.all("commit"))
    assert set(units.values()) == {1}
    assert len(units) == 12
    assert_all_end_with_one_model(told)


def test_the_book_of_a_run_holds_what_each_worker_did(tmp_path: Path) -> None:
    out = tmp_path / "run"
    train_crew_into(out, small_job(), "site(3, topology=gossip(full), sync=asp)")
    book = Book(out / BOOK)
    logs = book.logs()
    book.close()
    deeds = Counter(entry[0] for log in logs.values() for entry in log)
    assert len(logs) == 3
    assert deeds["begin"] == 3 * STEPS
    assert deeds["offered"] >= deeds["answered"] >= deeds["applied"] > 0
    assert deeds["gathered"] == 3
    assert (out / "model.safetensors").exists()


def samples_of(out: Path) -> int:
    """Rows that are told of in a run's folder."""
    events = map(json.loads, (out / "events.jsonl").read_text().splitlines())
    return sum(event["rows"] for event in events if event["event"] == "commit")


def test_a_run_goes_on_from_the_mean_of_all_weights_and_uses_each_sample_once(
    tmp_path: Path,
) -> None:
    out, plan = tmp_path / "run", "site(3, topology=gossip, sync=asp)"
    first = train_crew_into(out, small_job(stop=af.Stop(steps=5)), plan).result
    assert samples_of(out) == 5 * 15
    state, _ = Checkpoints(out / "checkpoints").read(5)
    for name, value in state["models"]["model"].items():
        assert torch.equal(value, first.weights[name])
    told = train_crew_into(out, small_job(), plan, resume=True)
    assert told.result.steps == STEPS
    assert samples_of(out) == 2 * 97


def test_another_plan_goes_on_with_a_run_of_workers_that_gossip(tmp_path: Path) -> None:
    out = tmp_path / "run"
    train_crew_into(out, small_job(stop=af.Stop(steps=5)), "site(3, topology=gossip, sync=asp)")
    results = launch_threads(
        lambda: train_job(small_job(), out=out, resume=True), 1, plan="data(1)"
    )
    assert results[0].steps == STEPS
    told = train_crew_into(
        out, small_job(stop=af.Stop(epochs=3)), "site(2, topology=gossip, sync=asp)", resume=True
    )
    assert told.result.steps == 21


@pytest.mark.parametrize(
    ("plan", "why", "nearest"),
    [
        ("data(4, topology=gossip, sync=asp)", "only mixes", "site(4, topology=gossip)"),
        (
            "site(4, topology=gossip, sync=asp(scaled=true))",
            "no updates that could count less",
            "site(4, topology=gossip, sync=asp)",
        ),
        ("site(4, topology=gossip, sync=asp, rule=median)", "only sums", "rule=median"),
        ("site(4, topology=gossip, codec=int8)", "in step nobody", "codec=identity"),
        ("site(4, topology=gossip, sync=asp, codec=lowrank(2))", "two meet", "codec=int8"),
        ("site(4, topology=gossip, sync=asp, outer=nesterov)", "momenta", "site(4,"),
        (
            "site(4, every=4, topology=gossip, sync=asp, fragments=2)",
            "whole",
            "site(4, every=4, topology=gossip, sync=asp)",
        ),
        ("site(4, every=end, topology=gossip, sync=asp)", "once, at the end", "every=end"),
        ("site(4, topology=ring, sync=asp)", "needs all peers at once", "topology=central"),
    ],
)
def test_what_has_no_meaning_beside_gossip_out_of_step_is_refused(
    plan: str, why: str, nearest: str
) -> None:
    with pytest.raises(PlanError) as refused:
        as_plan(plan)
    assert why in str(refused.value)
    assert nearest in str(refused.value)
