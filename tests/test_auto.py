"""Auto: the fastest topology by the clock, and no measuring where there is nothing to choose."""

from __future__ import annotations

import dataclasses
import doctest
import importlib

import pytest

from allfuse.codec import CODECS, Codec, Identity
from allfuse.fusion import Fusion
from allfuse.fusion.auto import MARGIN, candidates, pick, pick_for, settled
from allfuse.link.costs import Costs, Path
from allfuse.rule import Mean, Median
from allfuse.topology import Layout, Native
from allfuse.topology.central import Central
from allfuse.topology.exchange import Exchange
from allfuse.topology.halving import Halving
from allfuse.topology.hierarchy import Hierarchy
from allfuse.topology.ring import Ring
from allfuse.topology.tree import Tree

MEMORY = Path(alpha_s=2e-5, gap_s=5e-6, beta_s_per_byte=1e-9, shared_s_per_byte=5e-10)
ETHERNET = Path(alpha_s=2e-4, gap_s=2e-5, beta_s_per_byte=8e-8, shared_s_per_byte=8e-8)
PLAIN = [
    cls()
    for cls in CODECS.values()
    if all(field.default is not dataclasses.MISSING for field in dataclasses.fields(cls))
]
COSTS = Costs(inside=MEMORY, between=ETHERNET, gamma_s_per_byte=2e-10)


def never() -> Costs:
    raise AssertionError("nothing needs to be measured here")


def test_one_host_comes_to_native_without_measuring() -> None:
    found = pick_for(Layout.of(8), never, candidates(Mean(), Identity()), [10, 10_000_000])
    assert {str(each.topology) for each in found.values()} == {"native"}
    assert sorted(found) == [10, 10_000_000]


def test_where_there_is_one_way_only_it_is_taken() -> None:
    only = settled(Layout.of(8, 2), [Central()])
    assert only is not None
    assert only.topology == Central()
    assert settled(Layout.of(8, 2), [Native(), Ring()]) is None
    assert settled(Layout.of(8), [Ring(), Tree()]) is None


@pytest.mark.parametrize("codec", PLAIN, ids=str)
def test_every_candidate_is_legal(codec: Codec) -> None:
    for topology in candidates(Mean(), codec):
        assert topology.exact
        Fusion(rule=Mean(), topology=topology, codec=codec)


def test_rules_that_gather_have_topologies_that_gather() -> None:
    assert set(candidates(Median(), Identity())) == {Central(), Exchange()}


def test_several_workers_on_each_host_fuse_inside_first() -> None:
    layout = Layout.of(8, 2)
    found = pick(layout, COSTS, [Native(), Ring(), Hierarchy(), Central()], 5_000_000)
    assert found.topology == Hierarchy()
    assert found.why.startswith("hierarchy: 2.4")
    assert "for 20 MB over 4 hosts; next" in found.why


def test_small_blocks_take_few_phases_and_large_ones_few_bytes() -> None:
    layout, both = Layout.of(8, 1), [Ring(), Exchange()]
    found = pick_for(layout, lambda: COSTS, both, [10, 1_000_000])
    assert found[10].topology == Exchange()
    assert found[1_000_000].topology == Ring()


def test_the_first_stays_unless_another_is_clearly_faster() -> None:
    layout = Layout.of(4, 1)
    ring, halving = (pick(layout, COSTS, [each], 10_000).seconds for each in (Ring(), Halving()))
    assert ring is not None
    assert halving is not None
    assert halving < ring  # fewer phases
    large = 10_000_000  # of which phases are a small part
    assert pick(layout, COSTS, [Ring(), Halving()], large).topology == Ring()
    assert pick(layout, COSTS, [Halving(), Ring()], large).topology == Halving()
    assert 0 < MARGIN < 0.1


def test_a_codec_shrinks_what_is_charged() -> None:
    layout = Layout.of(4, 1)
    plain = pick(layout, COSTS, [Central()], 1_000_000).seconds
    coded = pick(layout, COSTS, [Central()], 1_000_000, codec=CODECS["int8"]()).seconds
    assert plain is not None
    assert coded is not None
    assert plain / coded == pytest.approx(4, rel=0.1)


def test_many_peers_do_not_keep_the_clock_busy() -> None:
    found = pick(Layout.of(64, 8), COSTS, [Hierarchy(), Central(), Exchange()], 1_000_000)
    assert found.topology == Hierarchy()
    assert found.why.endswith("over 8 hosts")


def test_the_examples_in_docstrings_are_true() -> None:
    found = doctest.testmod(importlib.import_module("allfuse.fusion.auto"))
    assert (found.failed, found.attempted > 0) == (0, True)
