"""Outer optimizers over rounds of weights, in fragments at staggered steps, with a delay."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from test_verify import check
from torch import Tensor, nn
from training_cases import (
    Recorded,
    adam,
    assert_all_equal,
    assert_equal,
    job,
    mse,
    network,
    normed_network,
    points,
    session,
    train,
    under,
    weights,
)

from allfuse.base.errors import PeerLost, PlanError
from allfuse.base.tensors import share
from allfuse.fusion import Fuser, choose
from allfuse.fusion.flight import Flight
from allfuse.fusion.weights import WeightFusion, cut_fragments
from allfuse.job import Stop
from allfuse.launcher import current_world
from allfuse.launcher.thread import launch_threads
from allfuse.link.lone import LoneLink
from allfuse.link.thread import Killed
from allfuse.plan import Site, as_plan
from allfuse.split.data import as_source, plan_batches
from allfuse.store.checkpoint import Checkpoints
from allfuse.sync.outer import Average, Momentum, Nesterov, Outer
from allfuse.training.loop import train_job
from allfuse.training.rounds import Rounds


def steps(count: int, **changes: Any) -> Any:
    return job(**{"train": points(20), "stop": Stop(steps=count), **changes})


def ends(plan: str, count: int = 11, **changes: Any) -> dict[str, Tensor]:
    """Where training ends: the same on all sites."""
    results = [result.weights for result in train(steps(count, **changes), plan)]
    assert_all_equal(results)
    return results[0]


# The outer step.


@pytest.mark.parametrize("outer", [Momentum(), Momentum(lr=0.3, momentum=0.9), Nesterov()])
def test_the_outer_step_is_that_of_torch_from_the_anchor(outer: Outer) -> None:
    random = torch.Generator().manual_seed(0)
    anchor = torch.randn(50, dtype=torch.float64, generator=random)
    theirs = nn.Parameter(anchor.clone())
    optimizer = torch.optim.SGD([theirs], **outer.options())
    momentum = None
    for _ in range(4):
        fused = anchor + torch.randn(50, dtype=torch.float64, generator=random)
        anchor, momentum = outer.step(fused, anchor, momentum)
        theirs.grad = theirs.detach() - fused
        optimizer.step()
        torch.testing.assert_close(anchor, theirs.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_one_whole_step_without_momentum_is_the_average_to_the_bit(dtype: torch.dtype) -> None:
    fused, anchor = torch.randn(1000).to(dtype), (100 * torch.randn(1000)).to(dtype)
    outer = Momentum(lr=1.0, momentum=0.0)
    first, momentum = outer.step(fused, anchor, None)
    assert torch.equal(first, fused)
    assert torch.equal(outer.step(anchor, first, momentum)[0], anchor)


@pytest.mark.parametrize("pace", ["every=1", "every=3", "every=4, fragments=2, delay=1"])
@pytest.mark.parametrize("codec", ["identity", "topk(0.3)"])
@pytest.mark.parametrize("model", [network, normed_network])
def test_momentum_of_0_at_a_rate_of_1_is_averaging_to_the_bit(
    pace: str, codec: str, model: Callable[[], nn.Module]
) -> None:
    plan = f"site(2, {pace}, codec={codec}, outer={{}})"
    changes = {"model": model, "batch_size": 8}
    plain = ends(plan.format("average"), **changes)
    assert_equal(ends(plan.format("momentum(lr=1, momentum=0)"), **changes), plain, exact=True)
    other = ends(plan.format("momentum(lr=1, momentum=0.5)"), **changes)
    assert not torch.equal(other["0.weight"], plain["0.weight"])


def slow(outer: Outer, every: int, count: int, sites: int = 2) -> dict[str, Tensor]:
    """DiLoCo as its algorithm 1 reads: one process, one model a site, torch's SGD outside."""
    torch.manual_seed(0)
    shared = network()
    optimizer = torch.optim.SGD(shared.parameters(), **outer.options())
    nets = [copy.deepcopy(shared) for _ in range(sites)]
    inner = [adam(net.parameters()) for net in nets]
    source = as_source(points(20))
    batches = [b for epoch in range(9) for b in plan_batches(source, batch_size=6).batches(epoch)]
    learned = [0] * sites
    for step, indices in enumerate(batches[:count], start=1):
        for site, net in enumerate(nets):
            start, stop = share(len(indices), sites, site)
            batch = source.fetch(indices[start:stop])
            inner[site].zero_grad()
            mse(net(batch[0]), batch).backward()
            inner[site].step()
            learned[site] += stop - start
        if step % every == 0:
            own = [[p.detach() for p in net.parameters()] for net in nets]
            for place, parameter in enumerate(shared.parameters()):
                mean = sum(own[s][place] * learned[s] / sum(learned) for s in range(sites))
                parameter.grad = parameter.detach() - mean
            optimizer.step()
            for net in nets:
                net.load_state_dict(shared.state_dict())
            learned = [0] * sites
    return weights(nets[0])


@pytest.mark.parametrize("outer", [Momentum(), Nesterov(lr=0.7), Nesterov(lr=0.4, momentum=0.5)])
@pytest.mark.parametrize("every", [1, 4])
def test_sites_with_an_outer_optimizer_equal_a_slow_loop(outer: Outer, every: int) -> None:
    assert_equal(ends(f"site(2, every={every}, outer={outer})", 12), slow(outer, every, 12))


def test_at_the_end_the_outer_optimizer_steps_once() -> None:
    plain, stepped = ends("site(2, every=end)"), ends("site(2, every=end, outer=nesterov(lr=0.5))")
    torch.manual_seed(0)
    for name, start in weights(network()).items():
        way = plain[name] - start
        torch.testing.assert_close(stepped[name], start + 0.5 * 1.9 * way)


def test_a_round_that_the_end_cuts_short_is_averaged() -> None:
    """11 steps: rounds after 5 and 10, and one step that no round belongs to."""
    seen: list[dict[str, Tensor]] = []

    def look(s: Any) -> None:
        s.on("step", lambda s, event: seen.append(weights(s.models["model"])))

    (one, _) = train(steps(11), "site(2, every=5, outer=nesterov)", prepare=look)
    last = seen[-2:]
    for name, value in one.weights.items():
        torch.testing.assert_close(value, (last[0][name] + last[1][name]) / 2)


PLANS = [
    "site(2, every=3, outer=nesterov(lr=0.7))",
    "site(3, every=4, outer=momentum, fragments=3)",
    "site(2, every=4, outer=nesterov, fragments=3, delay=3)",
    "site(2, every=4, fragments=2, delay=1, codec=topk(0.2))",
    "site(2, every=3, outer=nesterov, fragments=2, delay=2, codec=int8) * data(2)",
    "site(2, every=2, outer=nesterov, codec=lowrank(1, warm=2))",
    "site(3, every=3, outer=momentum, rule=median, delay=1)",
    "site(2, every=end, outer=nesterov, codec=int4)",
]


@pytest.mark.parametrize("plan", PLANS)
def test_all_sites_keep_the_same_anchor_and_momentum(plan: str) -> None:
    kept: list[Any] = []

    def look(s: Any) -> None:
        s.on("end", lambda s, event: kept.append(s.rounds.capture()))

    train(steps(11), plan, prepare=look)
    assert len(kept) == as_plan(plan).workers
    first = kept[0]["fusion"]
    assert ("outer" in plan) == bool(first["momentum"])
    for other in kept[1:]:
        assert_equal(other["fusion"]["agreed"], first["agreed"], exact=True)
        assert_equal(other["fusion"]["momentum"], first["momentum"], exact=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_momentum_is_kept_in_float32_or_wider_and_buffers_are_averaged(dtype: torch.dtype) -> None:
    parameter, buffer = nn.Parameter(torch.zeros(3, dtype=dtype)), torch.zeros(2, dtype=dtype)
    fusion = WeightFusion([parameter, buffer], Fuser(choose_plain(), LoneLink()), outer=Nesterov())
    fusion.agree()
    parameter.data += 1
    buffer += 1
    fusion.read().land(fusion.outer)
    assert buffer.tolist() == [1, 1]
    torch.testing.assert_close(parameter.data, torch.full((3,), 1.33, dtype=dtype))
    (bundle,) = fusion.bundles
    assert bundle.momentum is not None
    assert bundle.momentum.dtype == torch.promote_types(dtype, torch.float32)


def choose_plain() -> Any:
    axis = Site(2)
    return choose(axis.rule, None, axis.sync, axis.codec, 2)[0]


# Fragments.


@pytest.mark.parametrize("fragments", [1, 2, 5, 12])
def test_fragments_are_of_whole_tensors_and_about_as_many_bytes(fragments: int) -> None:
    sizes = [512, 8, 4096, 64, 4096, 64, 4096, 64, 1024, 16, 4096, 64]
    cut = cut_fragments(sizes, fragments)
    assert sorted(number for held in cut for number in held) == list(range(len(sizes)))
    totals = [sum(sizes[number] for number in held) for held in cut]
    assert max(totals) <= sum(sizes) / fragments + max(sizes)
    assert cut_fragments(sizes[:6], fragments) == [[n for n in held if n < 6] for held in cut]


def test_layers_of_one_size_are_cut_in_strides_over_depth() -> None:
    assert cut_fragments([100] * 9, 3) == [[0, 3, 6], [1, 4, 7], [2, 5, 8]]


@pytest.mark.parametrize(("every", "fragments"), [(1, 1), (6, 1), (6, 4), (7, 3), (5, 5)])
def test_each_fragment_has_one_round_in_each_h_steps(every: int, fragments: int) -> None:
    made: dict[int, list[tuple[int, int]]] = {}

    def work() -> None:
        with session() as s:
            for step in range(1, 5 * every + 1):
                for fragment, number in s.rounds.starting(step):
                    made.setdefault(fragment, []).append((step, number))

    under(f"site(2, every={every}, fragments={fragments})", work)
    assert sorted(made) == list(range(fragments))
    firsts = []
    for rounds in made.values():
        seen = sorted(set(rounds))  # of both ranks
        assert [number for _, number in seen] == list(range(5))
        assert all(later - step == every for (step, _), (later, _) in pairwise(seen))
        firsts.append(seen[0][0])
    assert len(set(firsts)) == fragments
    assert max(firsts) == every


def test_every_tensor_travels_once_in_each_h_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    carry = Flight.carry
    sent: list[tuple[int, list[str]]] = []

    def note(self: Flight, told: Any) -> None:
        world = current_world()
        assert world is not None
        if world.rank == 0:
            names = [name for load in self.loads for name in load.bundle.names]
            sent.append((world.step or 0, names))
        carry(self, told)

    monkeypatch.setattr(Flight, "carry", note)
    train(steps(12), "site(2, every=4, fragments=3)")
    assert [step for step, _ in sent][:6] == [1, 2, 4, 5, 6, 8]
    for first in (0, 3, 6):
        names = [name for _, names in sent[first : first + 3] for name in names]
        assert sorted(names) == ["0.bias", "0.weight", "2.bias", "2.weight"]


def test_one_fragment_without_a_delay_is_the_plan_without_either() -> None:
    plain = as_plan("site(2, every=3, outer=nesterov)")
    assert as_plan("site(2, every=3, outer=nesterov, fragments=1, delay=0)") == plain
    assert str(plain) == "site(2, every=3, outer=nesterov)"


def test_more_fragments_than_tensors_are_refused() -> None:
    with pytest.raises(PlanError, match=r"whole tensors, and there are 4; nearest.*fragments=4"):
        train(steps(4), "site(2, every=6, fragments=5)")


# Delays.


def test_what_was_started_lands_delay_steps_later_mixed_half_and_half() -> None:
    """Nobody learns here; each site writes the step and its rank into its weight."""

    def work() -> dict[int, float]:
        with session() as s:
            net = s.model(lambda: nn.Linear(4, 1, bias=False).double())
            s.optimizer(torch.optim.SGD(net.parameters(), lr=0.0))
            found = {}
            for batch in s.batches(points(12), 6, steps=9):
                s.step(batch, mse, forward=lambda model, batch: model(batch[0]))
                found[s.steps] = float(net.weight.detach()[0, 0])
                with torch.no_grad():
                    net.weight.fill_(10.0 * (s.steps + 1) + s.rank)
            return found

    for rank, found in enumerate(under("site(2, every=3, delay=2)", work)):
        expected = {step: 10.0 * step + rank for step in range(2, 10)}
        expected[5] = (expected[5] + 30.5) / 2  # of what the sites held after step 3
        expected[8] = (expected[8] + 60.5) / 2
        assert {step: value for step, value in found.items() if step > 1} == expected


def test_training_goes_on_while_a_fragment_is_carried(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is carried waits for the step after: only in the background that comes about."""
    went_on, carry = [threading.Event(), threading.Event()], Flight.carry

    def wait(self: Flight, told: Any) -> None:
        assert went_on[self.fuser.link.rank].wait(20)
        carry(self, told)

    monkeypatch.setattr(Flight, "carry", wait)

    def look(s: Any) -> None:
        s.on("step", lambda s, event: went_on[s.rank].set() if event.step == 4 else None)

    results = train(steps(6), "site(2, every=3, delay=2)", prepare=look)
    assert_all_equal([result.weights for result in results])


def test_a_peer_that_dies_while_a_fragment_is_carried_is_lost_to_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    carry = Flight.carry

    def die(self: Flight, told: Any) -> None:
        if self.fuser.link.rank == 1 and self.round == 1:
            raise Killed("rank 1 in the middle of a fusion")
        carry(self, told)

    monkeypatch.setattr(Flight, "carry", die)
    plan = "site(3, every=3, delay=2, fragments=2, outer=nesterov)"
    outcomes = launch_threads(lambda: train_job(steps(20)), 3, plan=plan, timeout_s=20)
    assert isinstance(outcomes[1], Killed)
    for rank in (0, 2):
        lost = outcomes[rank]
        assert isinstance(lost, PeerLost), lost
        assert "fuse weights" in str(lost)
        assert lost.seconds is not None
        assert lost.seconds < 15


def test_a_wish_to_stop_comes_with_what_lands() -> None:
    def work() -> int:
        with session() as s:
            s.optimizer(adam(s.model(network).parameters()))
            for batch in s.batches(points(60), 6, 3):
                s.step(batch, mse)
                if s.steps == 2 and s.rank == 3:
                    s.stop("one of four is tired")
            return s.steps

    assert under("site(2, every=4, delay=2) * data(2)", work) == [6] * 4
    assert under("site(4, every=6, fragments=2, delay=1)", work) == [4] * 4


@pytest.mark.parametrize(
    "plan",
    [
        "site(2, every=4, outer=nesterov, fragments=2, delay=3)",
        "site(2, every=end, outer=nesterov)",
        "site(2, every=4, outer=nesterov)",
    ],
)
def test_what_is_measured_last_is_what_training_ends_with(plan: str) -> None:
    results = train(steps(6, validation=points(7)), plan)
    net, (x, y) = network(), points(7)
    net.load_state_dict(results[0].weights)
    with torch.no_grad():
        assert results[0].metrics["loss"] == pytest.approx(float(mse(net(x), (x, y))), rel=1e-12)
    assert results[0].metrics == results[1].metrics


@pytest.mark.parametrize("codec", ["topk(0.2)", "int4", "lowrank(1)"])
def test_a_round_that_lands_late_loses_nothing_of_what_a_codec_has_not_sent(codec: str) -> None:
    """The mean of the weights and what was not sent add up to the same before and after."""
    site = as_plan(f"site(2, codec={codec})").axes[0]
    assert isinstance(site, Site)

    def work() -> list[Tensor]:
        world = current_world()
        assert world is not None
        fusion, _ = choose(site.rule, None, site.sync, site.codec, 2)
        fuser = Fuser(fusion, world.link("site", (0, 1), torch.device("cpu")))
        weight = nn.Parameter(torch.zeros(8, 8, dtype=torch.float64))
        fusion = WeightFusion([weight], fuser)
        fusion.agree()
        (bundle,) = fusion.bundles
        random, told = torch.Generator().manual_seed(world.rank), []
        for number in range(4):
            weight.data += torch.randn(8, 8, dtype=torch.float64, generator=random)
            for late in (True, False):
                told.append(weight.detach() / 2 + bundle.memory.residual.view(8, 8))
                if late:
                    flight = fusion.read(round=number, late=True)
                    flight.carry([0.5, 0.5])
                    flight.land(Average(), 0.5)
        fuser.close()
        return told

    one, other = under("data(2)", work)
    for before, after in zip(range(0, 8, 2), range(1, 8, 2), strict=True):
        torch.testing.assert_close(one[before] + other[before], one[after] + other[after])
    assert not torch.equal(one[0], one[1])


# Checkpoints.


def under_way(folder: Path, step: int) -> list[Any]:
    held = Checkpoints(folder / "checkpoints").read(step, rank=0)[0]
    departed: list[Any] = held["rounds"]["departed"]
    return departed


@pytest.mark.parametrize("plan", PLANS)
def test_a_run_that_is_resumed_wherever_it_was_is_bit_equal(plan: str, tmp_path: Path) -> None:
    for count in (1, 3, 5, 6, 8, 11):
        resumed = train(steps(count), plan, out=tmp_path / "run", resume="auto")
        delayed = "delay=3" in plan and count > 3
        assert bool(under_way(tmp_path / "run", count)) or not delayed
    assert_equal(resumed[0].weights, ends(plan), exact=True)
    assert_all_equal([result.weights for result in resumed])


def resumed_as(plan: str, out: Path) -> list[tuple[dict[str, Tensor], dict[str, Any]]]:
    """Of each rank, weights and rounds where it goes on under a plan, before it saves."""
    found = {}

    def look(s: Any) -> None:
        def note(s: Any, event: Any) -> None:
            found[s.rank] = (weights(s.models["model"]), s.rounds.capture())
            s.stop("that was all")

        s.on("start", note)

    train(steps(30), plan, out=out, resume=True, prepare=look)
    return [found[rank] for rank in sorted(found)]


def test_the_outer_momentum_goes_on_under_another_number_of_sites(tmp_path: Path) -> None:
    train(steps(8), "site(2, every=3, outer=nesterov)", out=tmp_path / "run")
    held = Checkpoints(tmp_path / "run" / "checkpoints").read(8, rank=0)[0]["rounds"]["fusion"]
    for own, rounds in resumed_as("site(3, every=2, outer=momentum)", tmp_path / "run"):
        assert_equal(rounds["fusion"]["momentum"], held["momentum"], exact=True)
        assert_equal(rounds["fusion"]["agreed"], held["agreed"], exact=True)
        assert not torch.equal(own["0.weight"], held["agreed"]["0.weight"].view(8, 4))


@pytest.mark.parametrize("plan", ["site(2, every=5, {})", "site(3, every=5, fragments=4, {})"])
def test_at_another_pace_what_was_under_way_lands_at_once(plan: str, tmp_path: Path) -> None:
    outer = "outer=momentum(lr=0.5, momentum=0)"
    folder = tmp_path / "run"
    train(steps(6), f"site(2, every=4, fragments=2, delay=3, {outer})", out=folder)
    read = Checkpoints(folder / "checkpoints").read
    held = [read(6, rank=rank)[0] for rank in (0, 1)]
    departed = held[0]["rounds"]["departed"]
    values = {name: value for each in departed for name, value in each["values"].items()}
    assert len(departed) == 2
    assert values.keys() <= held[0]["models"]["model"].keys()
    resumed = resumed_as(plan.format(outer), folder)
    for rank, (own, rounds) in enumerate(resumed):
        assert rounds["departed"] == []
        for name, value in own.items():
            models = [state["models"]["model"][name] for state in held]
            before = models[rank] if len(resumed) == 2 else (models[0] + models[1]) / 2
            fused = values.get(name)
            if fused is not None:
                anchor = held[0]["rounds"]["fusion"]["agreed"][name]
                agreed = (anchor + fused) / 2
                torch.testing.assert_close(rounds["fusion"]["agreed"][name], agreed)
                before = (before + agreed.view_as(before)) / 2
            torch.testing.assert_close(value, before)


@pytest.mark.parametrize("outer", ["average", "nesterov"])
def test_sites_go_on_from_any_plan_and_any_plan_from_them(outer: str, tmp_path: Path) -> None:
    plans = [
        "data(2)",
        f"site(2, every=2, outer={outer})",
        f"site(2, every=4, outer={outer}, fragments=3, delay=2, codec=topk(0.2))",
        f"site(3, every=4, outer={outer}, fragments=3, delay=2, codec=int8)",
        "site(4, topology=gossip)",
        f"site(2, every=3, outer={outer}, delay=2) * data(2)",
        "data(1)",
    ]
    for number, plan in enumerate(plans, start=1):
        results = train(steps(5 * number), plan, out=tmp_path / "run", resume="auto")
        assert_all_equal([result.weights for result in results])
    net, (x, y) = network(), points(20)
    net.load_state_dict(results[0].weights)
    assert float(mse(net(x).detach(), (x, y))) < 0.5


# verify.


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


@pytest.mark.parametrize("plan", PLANS)
def test_verify_replays_outer_steps_fragments_and_delays(plan: str) -> None:
    report = check(plan, steps=11)
    assert report.ok, report.lines()
    assert report.promise == "replayed"
    plain = check(plan, steps=11, model=perceptron)  # nothing in it blows rounding up
    assert plain.ok, plain.lines()
    assert max(row.weights.size for row in plain.rows if row.weights is not None) < 1e-9


def test_a_forgotten_momentum_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    step = Outer.step
    monkeypatch.setattr(Outer, "step", lambda self, f, anchor, kept: step(self, f, anchor, None))
    report = check("site(2, every=3, outer=nesterov)", steps=7)
    assert report.first is not None
    assert report.first.step == 6


def test_a_stepped_buffer_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("allfuse.fusion.flight.Parameter", Tensor)
    report = check("site(2, every=3, outer=nesterov)", steps=4)
    assert report.first is not None
    assert set(report.wrong) >= {"norm.running_mean", "norm.running_var"}


@pytest.mark.parametrize(
    ("change", "step"),
    [
        (lambda patch: patch.setattr("allfuse.training.rounds.OWN_SHARE", 0.4), 4),
        (lambda patch: patch.setattr(Rounds, "_land", never(Rounds._land)), 4),
        (lambda patch: patch.setattr(WeightFusion, "read", careless(WeightFusion.read)), 8),
        (lambda patch: None, None),
    ],
    ids=("mixed otherwise", "never", "what was not sent is sent twice", "nothing planted"),
)
def test_what_lands_otherwise_is_found(
    monkeypatch: pytest.MonkeyPatch, change: Callable[[pytest.MonkeyPatch], None], step: int | None
) -> None:
    change(monkeypatch)
    first = check("site(2, every=4, fragments=2, delay=2, codec=topk(0.2))", steps=9).first
    assert (None if first is None else first.step) == step


def never(land: Callable[[Rounds], None]) -> Callable[[Rounds], None]:
    return lambda self: self._departed.clear() if self.steps_since < 9 else land(self)


def careless(read: Callable[..., Flight]) -> Callable[..., Flight]:
    return lambda *arguments, late=False, **others: read(*arguments, **others)


# What has no meaning.


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("site(2, every=3, delay=3)", "delay is below every=3; nearest.*delay=2"),
        ("site(2, every=3, fragments=4)", "once in 3 steps; nearest.*fragments=3"),
        ("site(2, every=end, fragments=2)", "are fused whole and waited for"),
        ("site(2, every=end, delay=1)", "are fused whole and waited for"),
        ("site(2, every=3, fragments=0)", "a whole number from 1"),
        ("site(2, every=3, delay=-1)", "a whole number of steps from 0"),
        ("site(2, every=3, delay=soon)", "a whole number of steps from 0"),
        (
            "site(2, every=4, fragments=2, delay=2, topology=central(servers=1))",
            "every / fragments, 4 / 2; nearest.*delay=1",
        ),
        ("site(2, topology=gossip, outer=nesterov)", "their momenta would go apart"),
        ("site(2, every=3, topology=gossip, fragments=2)", "mixes whole models"),
    ],
)
def test_what_has_no_meaning_is_refused_in_words(text: str, why: str) -> None:
    with pytest.raises(PlanError, match=why) as caught:
        as_plan(text)
    assert as_plan(caught.value.nearest)


def test_a_plan_says_in_words_when_what_is_fused_and_lands() -> None:
    (axis,) = as_plan("site(4, every=50, outer=nesterov(lr=0.7), fragments=5, delay=3)").axes
    text = axis.explain()
    for part in ("every 50 steps", "in 5 fragments", "3 steps later", "outer optimizer nesterov"):
        assert part in text


def test_rounds_tell_how_many_bytes_a_fragment_has() -> None:
    def work() -> list[int]:
        recorded = Recorded()
        with session() as s:
            recorded.attach(s)
            net = s.model(network)
            s.optimizer(adam(net.parameters()))
            for batch in s.batches(points(24), 6, steps=8):
                s.step(batch, mse)
        return [event.data["bytes"] for event in recorded.named("round")]

    whole = sum(p.nbytes for p in network().parameters())
    for told in under("site(2, every=4, fragments=2)", work):
        assert len(told) == 5  # two rounds of each, and the end
        assert sum(told[:2]) == sum(told[2:4]) == told[4] == whole
