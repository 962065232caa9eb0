"""Training under every topology of the table: the numbers of its promise, also across processes."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from test_topology import ALL as ALL_FORMS
from test_topology import EXACT as EXACT_FORMS
from test_topology import GOSSIP
from training_cases import Recorded, assert_equal, job, network, points, train

from allfuse.base.errors import PeerLost, PlanError
from allfuse.job import Job, Stop
from allfuse.launcher.base import current_world
from allfuse.launcher.host import host_identity
from allfuse.launcher.local import launch_local
from allfuse.launcher.thread import ThreadWorld, launch_threads
from allfuse.link.thread import Hub, Script
from allfuse.plan import as_plan
from allfuse.topology import Topology
from allfuse.training.loop import Result, train_job
from allfuse.verify.verify import verify_job

# those that name servers are run by servers: tests/test_training_apart.py
EXACT = [topology for topology in EXACT_FORMS if not getattr(topology, "servers", None)]
ALL = [topology for topology in ALL_FORMS if not getattr(topology, "servers", None)]


@pytest.mark.parametrize("topology", EXACT, ids=str)
@pytest.mark.parametrize("workers", [2, 3, 5])
def test_data_parallel_training_equals_one_process(topology: Topology, workers: int) -> None:
    plan = f"data({workers}, topology={topology})"
    assert as_plan(plan).promise == "exact"
    one = train(job(accumulate=2, clip=0.5))[0]
    results = train(job(accumulate=2, clip=0.5), plan)
    for result in results:
        assert_equal(result.weights, results[0].weights, exact=True)
        assert_equal(result.weights, one.weights)
        assert result.loss == pytest.approx(one.loss)


@pytest.mark.parametrize("topology", ALL, ids=str)
@pytest.mark.parametrize("plan", ["site(3, every=2, {})", "site(2, every=3, {}) * data(2)"])
def test_verify_replays_sites(topology: Topology, plan: str) -> None:
    text = plan.format(f"topology={topology}")
    report = verify_job(functools.partial(job, stop=Stop(epochs=3)), text, steps=7, threads=True)
    assert report.ok, report.first


@pytest.mark.parametrize("topology", GOSSIP, ids=str)
def test_sites_that_gossip_end_with_one_model_and_measure_it(topology: Topology) -> None:
    recorded = [Recorded() for _ in range(3)]
    made = job(validation=points(9), evaluate_every=2, stop=Stop(steps=5))
    results = train(
        made,
        f"site(3, topology={topology})",
        prepare=lambda s: recorded[s.rank].attach(s),
    )
    for result in results:
        assert_equal(result.weights, results[0].weights, exact=True)
    told = [[event.data["metrics"] for event in each.named("evaluated")] for each in recorded]
    assert told[0] == told[1] == told[2]
    assert [event.name for event in recorded[0].named("round")] == [
        "round"
    ] * 6  # the last is exact


@pytest.mark.parametrize("topology", GOSSIP, ids=str)
def test_gossip_resumes_bit_for_bit(topology: Topology, tmp_path: Path) -> None:
    plan = f"site(3, every=2, topology={topology})"
    for steps in (3, 8):
        resumed = train(job(stop=Stop(steps=steps)), plan, out=tmp_path / "resumed", resume="auto")
    whole = train(job(stop=Stop(steps=8)), plan, out=tmp_path / "whole")
    assert_equal(resumed[0].weights, whole[0].weights, exact=True)


def test_gossip_of_gradients_is_refused_with_what_can_be() -> None:
    with pytest.raises(PlanError, match=r"site\(4, topology=gossip\)"):
        as_plan("data(4, topology=gossip)")


@pytest.mark.parametrize("topology", ["ring", "central", "tree(double)"])
def test_a_peer_lost_in_the_middle_of_a_fusion_is_named_by_all(topology: str) -> None:
    def work() -> Result:
        return train_job(job())

    for count in range(8, 26, 3):
        script = Script(kill={(1, count)})
        plan = f"data(3, topology={topology})"
        outcomes = launch_threads(work, 3, plan=plan, script=script)
        for rank in (0, 2):
            assert isinstance(outcomes[rank], PeerLost), (count, outcomes[rank])
            assert "rank 1" in str(outcomes[rank])


def test_hosts_are_found_by_what_each_rank_says(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(self: ThreadWorld, hub: Hub, rank: int, *more: Any) -> None:
        start(self, hub, rank, *more)
        self.local_size = 2
        monkeypatch.setattr(self, "host_identity", lambda: f"host {rank // 2}", raising=False)

    start = ThreadWorld.__init__
    monkeypatch.setattr(ThreadWorld, "__init__", init)
    found = launch_threads(lambda: current_world().hosts(), 4)  # type: ignore[union-attr]
    assert found == [("host 0", "host 0", "host 1", "host 1")] * 4


def test_processes_of_one_host_say_the_same() -> None:
    told = launch_local(host_identity, 2)
    assert told == host_identity()


def digits_like() -> Job:
    chance = torch.Generator().manual_seed(0)
    x = torch.randn(96, 4, generator=chance).double()
    return job(model=network, train=(x, x.sum(1, keepdim=True)), batch_size=24)


def weights_of(plan: str) -> dict[str, Any]:
    result = train_job(digits_like(), plan)
    return {name: value.tolist() for name, value in result.weights.items()}


def test_processes_train_alike() -> None:
    plans = [f"data(3, topology={topology})" for topology in EXACT]
    one = weights_of("data(1)")
    for several in launch_local(lambda: [*map(weights_of, plans)], 3):
        for name, value in one.items():
            torch.testing.assert_close(torch.tensor(several[name]), torch.tensor(value))


@pytest.mark.parametrize("rule", ["median", "trimmed(0.3)"])
def test_sites_train_by_rules_that_gather(rule: str, tmp_path: Path) -> None:
    plan = f"site(3, every=2, rule={rule}) * data(2)"
    results = train(job(), plan)
    for result in results:
        assert_equal(result.weights, results[0].weights, exact=True)
    for steps in (3, 8):
        resumed = train(job(stop=Stop(steps=steps)), plan, out=tmp_path / "run", resume="auto")
    assert_equal(resumed[0].weights, results[0].weights, exact=True)
