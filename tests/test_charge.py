"""The clock: bytes are those of the formulas, times are those that a hand adds up."""

from __future__ import annotations

import pytest
from test_topology import ALL, layouts

from allfuse.charge import charge
from allfuse.codec import MessageCodec
from allfuse.codec.int8 import Int8
from allfuse.link.costs import Costs, Path
from allfuse.topology import Layout, Native, Topology
from allfuse.topology.central import Central
from allfuse.topology.exchange import Exchange
from allfuse.topology.halving import Halving
from allfuse.topology.hierarchy import Hierarchy
from allfuse.topology.ring import Ring
from allfuse.topology.tree import Tree

ALPHA, BETA, GAMMA = 1e-4, 8e-8, 3e-10


def path(alpha_s: float = ALPHA, beta: float = BETA, gap_s: float = 0.0) -> Path:
    return Path(alpha_s=alpha_s, gap_s=gap_s, beta_s_per_byte=beta, shared_s_per_byte=beta)


NETWORK = Costs(inside=path(), between=path(), gamma_s_per_byte=GAMMA)
FREE_INSIDE = Costs(inside=path(0.0, 0.0), between=path(0.0), gamma_s_per_byte=0.0)
BYTES = 4_800_000
ELEMENTS = BYTES // 4


def seconds(topology: Topology, layout: Layout, costs: Costs = NETWORK, **keywords: int) -> float:
    return charge(topology, layout, costs, ELEMENTS, **{"segments": 1, **keywords}).seconds


@pytest.mark.parametrize("topology", ALL, ids=str)
def test_bytes_and_phases_are_those_declared(topology: Topology) -> None:
    for layout in layouts():
        elements = 720_720  # what all numbers of chunks here divide but 17
        found = charge(topology, layout, NETWORK, elements, segments=1)
        declared = topology.bytes_per_peer(layout, elements * 4)
        assert max(found.bytes_per_peer) == pytest.approx(declared, rel=1e-4), layout
        assert found.phases == topology.phases(layout)
        assert (found.seconds == 0) == (layout.size == 1)


@pytest.mark.parametrize("topology", ALL, ids=str)
@pytest.mark.parametrize("segments", [2, 7])
def test_segments_change_no_bytes(topology: Topology, segments: int) -> None:
    layout = Layout.of(6, 2)
    whole = charge(topology, layout, NETWORK, 1001, segments=1)
    cut = charge(topology, layout, NETWORK, 1001, segments=segments)
    assert sum(cut.bytes_per_peer) == pytest.approx(sum(whole.bytes_per_peer), rel=0.02)
    assert cut.phases == whole.phases


@pytest.mark.parametrize("n", [2, 3, 4, 8])
def test_a_ring_of_hosts_by_hand(n: int) -> None:
    each = BYTES / n
    by_hand = 2 * (n - 1) * (ALPHA + each * BETA) + (n - 1) * each * GAMMA
    assert seconds(Ring(), Layout.of(n, 1)) == pytest.approx(by_hand)


@pytest.mark.parametrize("n", [2, 4, 8])
def test_halving_by_hand(n: int) -> None:
    phases, moved = 2 * (n.bit_length() - 1), 2 * (n - 1) / n * BYTES
    by_hand = phases * ALPHA + moved * BETA + moved / 2 * GAMMA
    assert seconds(Halving(), Layout.of(n, 1)) == pytest.approx(by_hand)


def test_one_server_receives_all_and_sends_all() -> None:
    n = 5
    # All arrive at once; then they are added up one after the other.
    by_hand = 2 * ALPHA + 2 * (n - 1) * BYTES * BETA + (n - 1) * BYTES * GAMMA
    assert seconds(Central(1), Layout.of(n, 1)) == pytest.approx(by_hand)


def test_each_message_of_a_peer_keeps_it_busy() -> None:
    costs = Costs(inside=path(), between=path(0.0, 0.0, gap_s=1e-3), gamma_s_per_byte=0.0)
    n = 4
    by_hand = 2 * (n - 1) * 1e-3  # it posts n-1 receives and n-1 sends
    assert seconds(Exchange(), Layout.of(n, 1), costs) == pytest.approx(by_hand)


@pytest.mark.parametrize("hosts", [2, 4])
@pytest.mark.parametrize("each", [2, 4])
def test_what_hosts_send_sets_the_time_of_rings_and_hierarchy(hosts: int, each: int) -> None:
    n = hosts * each
    layout = Layout.of(n, each)
    dealt = Layout(tuple(str(peer % hosts) for peer in range(n)))
    unaware = charge(Native(), dealt, FREE_INSIDE, ELEMENTS, segments=1).seconds  # by rank
    wire = BYTES * BETA
    assert seconds(Hierarchy(), layout, FREE_INSIDE) == pytest.approx(
        2 * (hosts - 1) / hosts * wire
    )
    assert seconds(Ring(), layout, FREE_INSIDE) == pytest.approx(2 * (n - 1) / n * wire)
    assert unaware == pytest.approx(each * 2 * (n - 1) / n * wire)


def test_a_host_that_shares_its_card_is_as_slow_as_the_sum_of_its_streams() -> None:
    card = Path(alpha_s=0.0, gap_s=0.0, beta_s_per_byte=2 * BETA, shared_s_per_byte=BETA)
    costs = Costs(inside=path(0.0, 0.0), between=card, gamma_s_per_byte=0.0)
    alone = charge(Ring(), Layout(("a", "b")), costs, ELEMENTS, segments=1).seconds
    assert alone == pytest.approx(BYTES * 2 * BETA)  # one stream does not fill the card
    both = charge(Hierarchy(), Layout(("a", "a", "b", "b")), costs, ELEMENTS, segments=1).seconds
    assert both == pytest.approx(BYTES * BETA)  # two do


@pytest.mark.parametrize("topology", ALL, ids=str)
def test_more_bytes_take_longer(topology: Topology) -> None:
    layout = Layout.of(7, 3)
    sizes = [1, 10, 1000, 30_000, 500_000]
    times = [charge(topology, layout, NETWORK, size, segments=2).seconds for size in sizes]
    assert times == sorted(times)
    assert times[0] < times[-1]


@pytest.mark.parametrize("kind", ["binomial", "double"])
def test_segments_help_trees(kind: str) -> None:
    layout = Layout.of(8, 1)
    assert seconds(Tree(kind), layout, segments=10) < 0.75 * seconds(Tree(kind), layout)


def test_a_codec_sends_what_its_messages_weigh() -> None:
    codec: MessageCodec = Int8()
    layout, n = Layout.of(4, 1), 4
    found = charge(Central(), layout, NETWORK, ELEMENTS, encoded_bytes=codec.encoded_bytes)
    by_hand = 2 * (n - 1) * codec.encoded_bytes(ELEMENTS // n)
    assert found.bytes_per_peer == pytest.approx([by_hand] * n, rel=1e-4)
    plain = charge(Central(), layout, NETWORK, ELEMENTS)
    assert plain.seconds / found.seconds == pytest.approx(4, rel=0.1)


@pytest.mark.parametrize("topology", ALL, ids=str)
def test_it_is_a_pure_function(topology: Topology) -> None:
    first, second = (charge(topology, Layout.of(7, 3), NETWORK, 12_345, seed=1) for _ in range(2))
    assert first == second
