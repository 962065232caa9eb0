"""Topologies as pure schedules: each claim is checked on the schedule alone, for any n."""

from __future__ import annotations

import doctest
import importlib
import math
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest

from allfuse.base.errors import PlanError
from allfuse.plan import as_plan
from allfuse.topology import TOPOLOGIES, Layout, Schedule, Topology
from allfuse.topology.central import Central
from allfuse.topology.draw import draw
from allfuse.topology.gossip import GRAPHS, Gossip
from allfuse.topology.hierarchy import Hierarchy
from allfuse.topology.ring import Ring
from allfuse.topology.tree import Tree, binary, other_order

PEERS = range(1, 18)
LAYOUTS = [
    Layout.of(6, 2),
    Layout.of(7, 3),
    Layout(("b", "a", "b", "a", "c", "b")),
    Layout.of(4, 1),
    Layout.of(16, 4),
]


def variants() -> Iterator[Topology]:
    """Every topology of the table, with all arguments that change its schedule."""
    for cls in TOPOLOGIES.values():
        if cls is Gossip:
            yield from (Gossip(graph) for graph in GRAPHS)
        elif cls is Tree:
            yield from (Tree("binomial"), Tree("double"))
        else:
            yield cls()
    yield from (Central(1), Central(3))


ALL = list(variants())
EXACT = [topology for topology in ALL if topology.exact]
GOSSIP = [topology for topology in ALL if not topology.exact]


def layouts() -> Iterator[Layout]:
    yield from (Layout.of(n) for n in PEERS)
    yield from LAYOUTS


def play(schedule: Schedule, values: np.ndarray) -> np.ndarray:
    """What each peer (row) holds after the schedule, by its definition: (peers, chunks)."""
    held = values.copy()
    for phase in schedule.phases:
        before, own = held.copy(), np.ones(schedule.peers)
        for transfer in phase:
            if transfer.op == "mix":
                own[transfer.dst] -= transfer.weight
        mixed = [held[peer] * own[peer] for peer in range(schedule.peers)]
        for src, dst, start, stop, op, weight in phase:
            arrived = before[src, start:stop]
            if op in ("add", "collect"):
                held[dst, start:stop] += arrived
            elif op == "copy":
                held[dst, start:stop] = arrived
            else:
                mixed[dst][start:stop] += weight * arrived
        for transfer in phase:
            if transfer.op == "mix":
                held[transfer.dst] = mixed[transfer.dst]
    return held


@pytest.mark.parametrize("topology", EXACT, ids=str)
def test_every_value_is_summed_exactly_once_at_every_peer(topology: Topology) -> None:
    for layout in layouts():
        schedule = topology.schedule(layout)
        # Powers of a large base: a value that is missing or counted twice shows as a digit.
        own = np.array([4**peer for peer in range(layout.size)], dtype=object)
        values = np.repeat(own[:, None], schedule.chunks, axis=1)
        assert (play(schedule, values) == sum(own)).all(), layout


@pytest.mark.parametrize("topology", ALL, ids=str)
def test_bytes_and_phases_are_those_declared(topology: Topology) -> None:
    for layout in layouts():
        schedule = topology.schedule(layout)
        sent = max(schedule.bytes_sent(1000.0))
        assert sent == pytest.approx(topology.bytes_per_peer(layout, 1000.0)), layout
        assert len(schedule.phases) == topology.phases(layout), layout
        assert (layout.size == 1) == (not schedule.phases)


@pytest.mark.parametrize("topology", ALL, ids=str)
def test_no_peer_overwrites_what_it_sends_in_the_same_phase(topology: Topology) -> None:
    for layout in layouts():
        schedule = topology.schedule(layout)
        for phase in schedule.phases:
            written: dict[int, list[tuple[int, int]]] = {}
            for dst, start, stop, op in ((t.dst, t.start, t.stop, t.op) for t in phase):
                if op not in ("mix", "collect"):
                    written.setdefault(dst, []).append((start, stop))
            for mine in phase:
                assert mine.src != mine.dst
                assert 0 <= mine.start < mine.stop <= schedule.chunks
                for start, stop in written.get(mine.src, ()):
                    assert stop <= mine.start or mine.stop <= start


@pytest.mark.parametrize("topology", ALL, ids=str)
def test_turns_say_the_same_as_phases(topology: Topology) -> None:
    schedule = topology.schedule(Layout.of(7, 3), round=3, seed=5)
    for number, phase in enumerate(schedule.phases):
        told = set()
        for peer in range(schedule.peers):
            turn = schedule.turns(peer)[number]
            told |= {(peer, piece.peer, *piece[1:]) for piece in turn.sends}
            for piece in turn.receives:
                assert (piece.peer, peer, *piece[1:]) in {tuple(transfer) for transfer in phase}
        assert told == {tuple(transfer) for transfer in phase}


def mixing(topology: Topology, n: int, round: int = 0, seed: int = 0) -> np.ndarray:
    """The mixing matrix of one round: row i says what peer i's new value is made of."""
    matrix = np.eye(n)
    for phase in topology.schedule(Layout.of(n), round, seed).phases:
        for transfer in phase:
            matrix[transfer.dst, transfer.src] += transfer.weight
            matrix[transfer.dst, transfer.dst] -= transfer.weight
    return matrix


@pytest.mark.parametrize("topology", GOSSIP, ids=str)
def test_gossip_is_doubly_stochastic_so_the_mean_is_kept(topology: Topology) -> None:
    for n in PEERS:
        for round in range(3):
            matrix = mixing(topology, n, round, seed=1)
            assert (matrix >= -1e-12).all()
            np.testing.assert_allclose(matrix.sum(0), 1, atol=1e-12)
            np.testing.assert_allclose(matrix.sum(1), 1, atol=1e-12)


@pytest.mark.parametrize("topology", GOSSIP, ids=str)
@pytest.mark.parametrize("n", [2, 5, 8, 17])
def test_gossip_comes_together_as_fast_as_its_spectral_gap_says(topology: Topology, n: int) -> None:
    chance = np.random.default_rng(0)
    values = chance.normal(size=(n, 50))
    mean = values.mean(0)
    for round in range(6):
        schedule = topology.schedule(Layout.of(n), round, seed=2)
        after = np.hstack([play(schedule, column[:, None]) for column in values.T])
        matrix = mixing(topology, n, round, seed=2)
        rate = np.linalg.svd(matrix - 1 / n, compute_uv=False)[0]
        distance = [np.linalg.norm(v - mean) for v in (values, after)]
        assert distance[1] <= rate * distance[0] * (1 + 1e-9) + 1e-9
        np.testing.assert_allclose(after.mean(0), mean)
        values = after
    if n > 2 and isinstance(topology, Gossip) and topology.graph in ("ring", "exponential"):
        worst = np.linalg.svd(matrix - 1 / n)[2][0]  # the slowest direction: the rate is reached
        after = play(topology.schedule(Layout.of(n)), worst[:, None])
        assert np.linalg.norm(after) == pytest.approx(rate * np.linalg.norm(worst))


@pytest.mark.parametrize("n", [2, 4, 8, 16])
def test_one_peer_gossip_is_exact_after_log_n_rounds(n: int) -> None:
    values = np.arange(n, dtype=float)[:, None]
    for round in range(int(math.log2(n))):
        assert np.ptp(values) > 0
        values = play(Gossip("one_peer").schedule(Layout.of(n), round), values)
    np.testing.assert_allclose(values, (n - 1) / 2)


def test_matchings_are_drawn_anew_in_each_round_and_alike_on_all_peers() -> None:
    drawn = [Gossip("matching").schedule(Layout.of(8), round, seed=3) for round in range(5)]
    assert drawn == [Gossip("matching").schedule(Layout.of(8), round, seed=3) for round in range(5)]
    assert len({schedule.phases for schedule in drawn}) > 1
    assert drawn[0] != Gossip("matching").schedule(Layout.of(8), 0, seed=4)


@pytest.mark.parametrize("n", range(2, 18))
def test_a_peer_inside_one_of_two_trees_is_a_leaf_of_the_other(n: int) -> None:
    orders = (list(range(n)), other_order(list(range(n))))
    inside = [{order[p] for p in binary(n)[1:] if p} for order in orders]  # not the root
    assert len(inside[0] & inside[1]) <= n % 2
    below = Counter(binary(n))
    assert max(below.values()) <= 2
    assert below[0] == 1


@pytest.mark.parametrize("topology", [Ring(), Hierarchy()], ids=str)
@pytest.mark.parametrize(("hosts", "each"), [(4, 2), (3, 3), (2, 5)])
def test_a_host_sends_as_little_to_others_as_its_formula_says(
    topology: Topology, hosts: int, each: int
) -> None:
    layout = Layout.of(hosts * each, each)
    schedule = topology.schedule(layout)
    out = dict.fromkeys(layout.hosts, 0.0)
    for phase in schedule.phases:
        for src, dst, start, stop, *_ in phase:
            if layout.hosts[src] != layout.hosts[dst]:
                out[layout.hosts[src]] += (stop - start) / schedule.chunks
    n = layout.size if isinstance(topology, Ring) else hosts
    assert list(out.values()) == pytest.approx([2 * (n - 1) / n] * hosts)


def test_arguments_that_make_no_sense_are_refused() -> None:
    for text in ("tree(triple)", "gossip(rign)", "central(servers=0)"):
        with pytest.raises(PlanError):
            as_plan(f"site(4, topology={text})")
    assert str(as_plan("site(4, topology=gossip(ring))")) == "site(4, topology=gossip(graph=ring))"


def test_a_drawing_that_nobody_could_read_is_not_made() -> None:
    head, why = draw(Ring(), Layout.of(1_000_000))  # would have 2 * 10^12 transfers
    assert head == "ring, 1000000 peers: 1999998 phases; the busiest peer sends 2 x the payload"
    assert why == "  not drawn: more than 128 peers"


@pytest.mark.parametrize("name", ["draw", "layout", "schedule"])
def test_the_examples_in_docstrings_are_true(name: str) -> None:
    found = doctest.testmod(importlib.import_module(f"allfuse.topology.{name}"))
    assert found.failed == 0
    assert found.attempted > 0
