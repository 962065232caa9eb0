"""Bytes that leave hosts, against formulas and against what conservation asks."""

from __future__ import annotations

import pytest

from allfuse.cli.plan import tell_hosts
from allfuse.plan import Data, Site, as_plan
from allfuse.plan.traffic import leaving_hosts, leaving_in_pairs, leaving_to_servers
from allfuse.topology import TOPOLOGIES, Layout, Native, Topology
from allfuse.topology.hierarchy import Hierarchy
from allfuse.topology.ring import Ring

PAYLOAD = 1200


def leaving(text: str, axis: str, topology: Topology, hosts: int) -> list[int]:
    plan = as_plan(text)
    found = plan.axis(axis)
    assert isinstance(found, Data | Site)
    return leaving_hosts(plan, found, topology, PAYLOAD, hosts)


@pytest.mark.parametrize("topology", [Ring(), Native()])
@pytest.mark.parametrize(("hosts", "each"), [(2, 2), (3, 2), (4, 1)])
def test_a_ring_crosses_each_border_of_hosts_once(
    topology: Topology, hosts: int, each: int
) -> None:
    n = hosts * each
    expected = round(2 * (n - 1) / n * PAYLOAD)
    assert leaving(f"data({n})", "data", topology, hosts) == [expected] * hosts


@pytest.mark.parametrize(("hosts", "each"), [(2, 2), (3, 2)])
def test_a_hierarchy_sends_between_hosts_what_as_many_workers_would(hosts: int, each: int) -> None:
    sent = leaving(f"data({hosts * each})", "data", Hierarchy(), hosts)
    assert sum(sent) == round(2 * (hosts - 1) * PAYLOAD)


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_where_each_worker_is_a_host_all_that_it_sends_leaves_it(name: str) -> None:
    topology = TOPOLOGIES[name]()
    layout = Layout.of(4, 1)
    busiest = max(leaving("data(4)", "data", topology, 4))
    assert busiest == pytest.approx(topology.bytes_per_peer(layout, PAYLOAD), rel=0.01)


def test_groups_on_one_host_keep_to_it_and_those_across_hosts_add_up() -> None:
    plan = "site(2, every=20) * data(2)"
    assert leaving(plan, "data", Ring(), 2) == [0, 0]
    assert leaving(plan, "site", Ring(), 2) == [2 * PAYLOAD] * 2
    assert leaving(plan, "site", Ring(), 1) == [0]


@pytest.mark.parametrize(("servers", "expected"), [(2, 2 * PAYLOAD), (1, 2 * PAYLOAD)])
def test_what_goes_to_servers_is_what_workers_push_and_pull_elsewhere(
    servers: int, expected: int
) -> None:
    plan = as_plan(f"data(4, topology=central(servers={servers}), sync=asp)")
    assert leaving_to_servers(plan, PAYLOAD, 2) == [expected] * 2
    assert leaving_to_servers(plan, PAYLOAD, 1) == [0]
    alone = sum(leaving_to_servers(plan, PAYLOAD, 4))
    assert alone == 2 * 3 * PAYLOAD  # each pushes and pulls all but what its own host holds


def test_it_is_told_for_a_fusion_and_for_a_step() -> None:
    axis = as_plan("site(4, every=20)").axis("site")
    assert isinstance(axis, Site)
    facts: dict[str, object] = {}
    (line,) = tell_hosts(axis, [4000, 2000], facts)
    assert "4 kB leave the busiest host, 6 kB all 2 together, every 20 steps: 200 B a step" in line
    assert facts["site_bytes_leaving_hosts_per_step"] == [200, 100]
    assert tell_hosts(axis, [4000], {}) == []
    assert "nothing leaves a host" in tell_hosts(axis, [0, 0], {})[0]


def test_an_exchange_in_pairs_sends_as_much_there_as_back() -> None:
    plan = as_plan("site(4, topology=gossip(one_peer), sync=asp) * data(2)")
    assert leaving_in_pairs(plan, PAYLOAD, 2) == [2 * PAYLOAD] * 2  # 1 asks 2, and 3 asks 0
    assert leaving_in_pairs(plan, PAYLOAD, 4) == [2 * PAYLOAD] * 4
    assert leaving_in_pairs(plan, PAYLOAD, 1) == [0]
