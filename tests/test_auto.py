"""Auto: the fastest topology by the clock, and no measuring where there is nothing to choose."""

from __future__ import annotations

import doctest
import functools
import importlib
import json
import shutil
from pathlib import Path as FilePath

import pytest
import torch
from test_codec import ALL
from test_execute import all_fine, open_link
from torch import Tensor
from training_cases import assert_equal, job, train

from allfuse.codec import CODECS, Codec, Identity, MessageCodec
from allfuse.fusion import Fuser, Fusion
from allfuse.fusion.auto import Auto, Notice, candidates, pick, settled
from allfuse.fusion.race import race
from allfuse.job import Stop
from allfuse.launcher.thread import ThreadWorld, launch_threads
from allfuse.link import Link
from allfuse.link.costs import Costs, Path
from allfuse.link.lone import LoneLink
from allfuse.link.memo import known_costs
from allfuse.link.thread import Hub
from allfuse.rule import Mean, Median
from allfuse.topology import Layout, Native, Topology
from allfuse.topology.central import Central
from allfuse.topology.exchange import Exchange
from allfuse.topology.halving import Halving
from allfuse.topology.hierarchy import Hierarchy
from allfuse.topology.ring import Ring
from allfuse.topology.tree import Tree
from allfuse.training.choosing import record_of, settle
from allfuse.training.session import Session

MEMORY = Path(alpha_s=2e-5, gap_s=5e-6, beta_s_per_byte=1e-9, shared_s_per_byte=5e-10)
ETHERNET = Path(alpha_s=2e-4, gap_s=2e-5, beta_s_per_byte=8e-8, shared_s_per_byte=8e-8)
COSTS = Costs(inside=MEMORY, between=ETHERNET, gamma_s_per_byte=2e-10)


@pytest.mark.parametrize("codec", ALL, ids=str)
def test_one_host_needs_no_measuring(codec: Codec) -> None:
    found = settled(Layout.of(8), candidates(Mean(), codec, 8))
    assert found is not None
    expected = "central" if isinstance(codec, MessageCodec) else "native"
    if str(codec) == "topk(0.05)":
        expected = "exchange"
    assert str(found.topology) == expected


def test_where_there_is_one_way_only_it_is_taken() -> None:
    only = settled(Layout.of(8, 2), [Central()])
    assert only is not None
    assert only.topology == Central()
    assert settled(Layout.of(8, 2), [Native(), Ring()]) is None
    assert settled(Layout.of(8), [Ring(), Tree()]) is None


@pytest.mark.parametrize("codec", ALL, ids=str)
def test_every_candidate_is_legal(codec: Codec) -> None:
    for topology in candidates(Mean(), codec, 8):
        assert topology.exact
        Fusion(rule=Mean(), topology=topology, codec=codec)


def test_rules_that_gather_have_topologies_that_gather() -> None:
    assert set(candidates(Median(), Identity(), 4)) == {Central(), Exchange()}


def test_several_workers_on_each_host_fuse_inside_first() -> None:
    layout = Layout.of(8, 2)
    found = pick(layout, COSTS, [Native(), Ring(), Hierarchy(), Central()], 5_000_000)
    assert found.topology == Hierarchy()
    assert found.why.startswith("hierarchy: 2.4")
    assert "for 20 MB over 4 hosts; next" in found.why


def test_small_blocks_take_few_phases_and_large_ones_few_bytes() -> None:
    layout, both = Layout.of(8, 1), [Ring(), Exchange()]
    assert pick(layout, COSTS, both, 10).topology == Exchange()
    assert pick(layout, COSTS, both, 1_000_000).topology == Ring()


def test_the_first_stays_unless_another_is_clearly_faster() -> None:
    layout = Layout.of(4, 1)
    ring, halving = (pick(layout, COSTS, [each], 10_000).seconds for each in (Ring(), Halving()))
    assert ring is not None
    assert halving is not None
    assert halving < ring  # fewer phases
    large = 10_000_000  # of which phases are a small part
    assert pick(layout, COSTS, [Ring(), Halving()], large).topology == Ring()
    assert pick(layout, COSTS, [Halving(), Ring()], large).topology == Halving()


def test_a_link_s_own_sum_is_tried_where_the_clock_cannot_tell() -> None:
    layout, large = Layout.of(4, 1), 1_000_000
    both = [Native(), Halving()]
    found = pick(layout, COSTS, both, large)
    assert (found.topology, found.rival) == (Native(), Halving())  # faster by less than MARGIN
    assert pick(layout, COSTS, [Ring(), Halving()], large).rival is None
    assert pick(layout, COSTS, [Native(), Ring()], large).rival is None  # charged alike
    assert pick(Layout.of(8, 4), COSTS, [Native(), Hierarchy()], large).rival is None  # clear


@pytest.mark.parametrize("seconds", [(2.0, 1.0), (1.0, 2.0)])
def test_what_was_faster_when_tried_is_taken_by_all_groups_and_recorded(
    seconds: tuple[float, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    layout, both, block = Layout.of(4, 1), [Native(), Halving()], torch.ones(1_000_000)
    sizes: list[int] = []

    def one_race(link: Link, _: Layout, topologies: list[Topology], sample: Tensor) -> object:
        assert topologies == both
        sizes.append(sample.nbytes)
        return seconds

    def auto(leads: bool) -> Auto:
        notice = Notice(board=board, key="costs", author=0)
        made = Auto(LoneLink(), layout, both, Identity(), "cpu", notice, leads)
        made.costs = COSTS
        return made

    monkeypatch.setattr("allfuse.fusion.auto.race", one_race)
    board = Hub(1)
    expected = both[seconds.index(min(seconds))]
    leading, following = auto(True), auto(False)
    for each in (leading, following, leading):
        assert each.settle(block).topology == each.pick(block.numel(), 4).topology == expected
    assert len(sizes) == 1
    resumed = auto(True)
    told = settle(resumed, [block], json.loads(json.dumps(record_of(leading))))
    assert (resumed.pick(block.numel(), 4).topology, len(sizes)) == (expected, 1)
    assert told == f"{expected}: tried before, for 4 MB"
    leading.settle(torch.zeros(20_000_000))  # a sum of 10 s: a part of it is tried
    assert sizes[1:] == [pytest.approx(80e6 / 50, rel=0.1)]
    assert bool((block == 1).all())


def test_a_race_tells_all_peers_the_same_seconds() -> None:
    topologies = [Native(), Ring(), Halving()]
    found = all_fine(
        launch_threads(lambda: race(open_link(), Layout.of(4), topologies, torch.zeros(1000)), 4)
    )
    assert len(set(found)) == 1
    assert len(found[0]) == 3
    assert min(found[0]) > 0


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


LAYOUT = Layout(("a", "a", "b", "b"))


def auto_on(link: Link) -> Auto:
    return Auto(link, LAYOUT, candidates(Mean(), Identity(), 4), Identity(), "cpu")


def test_all_peers_pick_the_same_and_measure_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: FilePath
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    believing = functools.partial(known_costs, holds=lambda *_: True)  # whatever else runs here
    monkeypatch.setattr("allfuse.fusion.auto.known_costs", believing)

    def work() -> tuple[list[str], bool, str]:
        auto = auto_on(open_link())
        picks = [str(auto.pick(size, 4).topology) for size in (1, 1000, 2_000_000)]
        text = settle(auto, [torch.zeros(1000)], {})
        return picks, auto.measured_s is not None, text

    first = all_fine(launch_threads(work, 4))
    assert [picks for picks, _, _ in first] == [first[0][0]] * 4
    assert all(measured for _, measured, _ in first)
    assert "The links were measured in" in first[0][2]
    again = all_fine(launch_threads(work, 4))  # remembered
    assert not any(measured for _, measured, _ in again)
    assert [picks for picks, _, _ in again] == [first[0][0]] * 4


def test_a_run_that_is_resumed_takes_the_costs_it_began_with() -> None:
    def never(*_: object) -> None:
        raise AssertionError("nothing needs to be measured here")

    fast = Costs(inside=ETHERNET, between=MEMORY, gamma_s_per_byte=0.0)
    for costs in (COSTS, fast):
        began = auto_on(LoneLink())
        began.costs = costs
        resumed = auto_on(LoneLink())
        resumed._measure = never  # type: ignore[method-assign,assignment]
        settle(resumed, [torch.zeros(100_000)], record_of(began))
        assert resumed.costs == costs
    elsewhere = Auto(LoneLink(), Layout.of(4, 1), [Ring(), Central()], Identity(), "cpu")
    elsewhere._measure = never  # type: ignore[method-assign,assignment]
    with pytest.raises(AssertionError, match="nothing needs"):  # other hosts: measured anew
        settle(elsewhere, [torch.zeros(10)], record_of(began))


def test_blocks_go_where_they_are_picked_to_and_sums_are_right() -> None:
    def work() -> tuple[list[Tensor], set[str]]:
        link = open_link()
        auto = auto_on(link)
        auto.costs = COSTS
        fuser = Fuser(Fusion(), link, LAYOUT, auto=auto)
        blocks = [torch.full((size,), float(link.rank)).double() for size in (1, 50, 300_000)]
        works = [fuser.start(block, f"block {n}") for n, block in enumerate(blocks)]
        for each in works:
            each.wait()
        names = {str(fuser.topology(block)) for block in blocks}
        fuser.close()
        return blocks, names

    for blocks, names in all_fine(launch_threads(work, 4)):
        assert all(bool((block == 6).all()) for block in blocks)
        assert len(names) > 1


@pytest.mark.parametrize(
    "plan", ["data(4)", "data(4, codec=int8)", "site(4, every=2)", "site(2, every=2) * data(2)"]
)
def test_training_over_several_hosts_chooses_tells_and_records(
    plan: str, monkeypatch: pytest.MonkeyPatch, tmp_path: FilePath
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(ThreadWorld, "hosts", lambda self: LAYOUT.hosts)
    told: list[str] = []

    def look(s: Session) -> None:
        if s.rank == 0:
            s.bus.subscribe(lambda e: told.append(str(e.data["choices"])), ["start"])

    out = tmp_path / "run"
    results = train(job(stop=Stop(steps=3)), plan, out=out, prepare=look)
    for result in results:
        assert_equal(result.weights, results[0].weights, exact=True)
    assert "over 2 hosts; next" in told[0]
    record = json.loads((out / "run.json").read_text())
    axis = plan.partition("(")[0]
    several = [[0], [1]] if "*" in plan else [[0, 1], [2, 3]]  # of one group
    assert record["links"][axis]["hosts"] == several
    shutil.rmtree(tmp_path / "cache")
    monkeypatch.setattr("allfuse.fusion.auto.known_costs", None)  # would fail if it were asked
    resumed = train(job(stop=Stop(steps=8)), plan, out=out, resume=True)
    monkeypatch.undo()
    monkeypatch.setattr(ThreadWorld, "hosts", lambda self: LAYOUT.hosts)
    assert_equal(resumed[0].weights, resumed[3].weights, exact=True)
