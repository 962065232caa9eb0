"""Rules: their mathematical claims, on one block and between peers."""

from __future__ import annotations

import itertools

import pytest
import torch
from test_execute import all_fine, open_link
from torch import Tensor, nn

from allfuse.base.errors import PlanError
from allfuse.fusion import Fuser, Fusion, choose
from allfuse.fusion.weights import WeightFusion
from allfuse.launcher.thread import launch_threads
from allfuse.plan import Site, as_plan
from allfuse.rule import RULES, GatherRule, Mean, Rule
from allfuse.rule.clipped import Clipped
from allfuse.rule.median import Median
from allfuse.rule.model_stock import ModelStock
from allfuse.rule.ties import Ties
from allfuse.rule.trimmed import Trimmed
from allfuse.rule.whole import fuse_whole, sift_whole
from allfuse.topology.central import Central

ROBUST: list[GatherRule] = [Median(), Trimmed(0.25), Trimmed(0.4)]


def drawn(n: int, size: int = 200) -> Tensor:
    return torch.randn(n, size, generator=torch.Generator().manual_seed(n)).double()


def ones(n: int) -> Tensor:
    return torch.ones(n, dtype=torch.float64)


@pytest.mark.parametrize("n", range(1, 10))
def test_the_median_is_numpys(n: int) -> None:
    values = drawn(n)
    torch.testing.assert_close(Median().fuse(values, ones(n)), values.quantile(0.5, dim=0))


@pytest.mark.parametrize("rule", ROBUST, ids=str)
@pytest.mark.parametrize("weights", [(1, 2, 3), (3, 1, 1, 2), (1, 1, 5, 1)])
def test_a_weight_counts_like_as_many_peers(rule: GatherRule, weights: tuple[int, ...]) -> None:
    values = drawn(len(weights))
    copies = values.repeat_interleave(torch.tensor(weights), dim=0)
    expected = rule.fuse(copies, ones(len(copies)))
    got = rule.fuse(values, torch.tensor(weights, dtype=torch.float64))
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("cut", [0.0, 0.1, 0.25, 1 / 3, 0.45])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 7, 12])
def test_the_trimmed_mean_equals_a_slow_reference(cut: float, n: int) -> None:
    values, fine = drawn(n, 20), 60
    many = values.repeat_interleave(fine, dim=0).sort(dim=0).values  # every peer as 60 of weight 1
    out = round(cut * n * fine)
    expected = many[out : len(many) - out].mean(0)
    torch.testing.assert_close(Trimmed(cut).fuse(values, ones(n)), expected)


def test_nothing_trimmed_is_the_mean_and_nearly_all_is_the_median() -> None:
    values, weights = drawn(5), torch.tensor([1.0, 2, 3, 4, 5], dtype=torch.float64)
    mean = (values * weights[:, None]).sum(0) / weights.sum()
    torch.testing.assert_close(Trimmed(0.0).fuse(values, weights), mean)
    middle = Median().fuse(values, ones(5))
    torch.testing.assert_close(Trimmed(0.4999).fuse(values, ones(5)), middle)


@pytest.mark.parametrize("rule", ROBUST, ids=str)
@pytest.mark.parametrize("garbage", [1e30, -1e30, float("inf"), float("nan")])
def test_one_corrupt_peer_of_five_is_ignored(rule: GatherRule, garbage: float) -> None:
    values = drawn(5)
    for bad in range(5):
        spoiled = values.clone()
        spoiled[bad] = garbage
        honest = values[[i for i in range(5) if i != bad]]
        got = rule.fuse(spoiled, ones(5))
        assert (got >= honest.amin(0) - 1e-12).all()
        assert (got <= honest.amax(0) + 1e-12).all()


@pytest.mark.parametrize("rule", ROBUST, ids=str)
def test_the_order_of_peers_and_those_without_weight_do_not_matter(rule: GatherRule) -> None:
    values, weights = drawn(4), torch.tensor([1.0, 2.0, 0.0, 3.0], dtype=torch.float64)
    expected = rule.fuse(values[[0, 1, 3]], weights[[0, 1, 3]])
    for order in itertools.permutations(range(4)):
        places = list(order)
        torch.testing.assert_close(rule.fuse(values[places], weights[places]), expected)


@pytest.mark.parametrize("rule", ROBUST, ids=str)
@pytest.mark.parametrize("servers", [None, 1, 2])
@pytest.mark.parametrize("n", [2, 3, 5, 8])
def test_between_peers_it_is_the_same_and_all_end_equal(
    rule: GatherRule, servers: int | None, n: int
) -> None:
    weights = [float(1 + rank % 3) for rank in range(n)]

    def work() -> Tensor:
        link = open_link()
        fuser = Fuser(Fusion(rule=rule, topology=Central(servers)), link)
        own = [drawn(n)[link.rank].clone(), torch.full((3, 2), float(link.rank)).double()]
        WeightFusion(own, fuser).fuse(weights)
        fuser.close()
        return torch.cat([tensor.reshape(-1) for tensor in own])

    results = all_fine(launch_threads(work, n))
    ranks = torch.arange(float(n), dtype=torch.float64)[:, None].expand(-1, 6)
    values = torch.cat([drawn(n), ranks], dim=1)
    expected = rule.fuse(values, torch.tensor(weights, dtype=torch.float64))
    for result in results:
        assert torch.equal(result, results[0])
        torch.testing.assert_close(result, expected)


def variants() -> list[Rule]:
    """Every rule of the table that fuses values as they are."""
    found = [rule for rule in RULES.values() if not rule.of_changes]
    return [rule(1.0) if rule is Clipped else rule() for rule in found]


OF_CHANGES: list[Rule] = [Ties(), Ties(density=0.4), ModelStock()]


@pytest.mark.parametrize("rule", OF_CHANGES, ids=str)
def test_rules_of_changes_are_for_sites_where_values_meet(rule: Rule) -> None:
    as_plan(f"site(3, every=4, rule={rule})").validate_executable()
    as_plan(f"site(3, every=4, rule={rule}, topology=central)")
    with pytest.raises(PlanError, match="topology=central"):
        as_plan(f"site(3, rule={rule}, topology=ring)")
    with pytest.raises(PlanError, match=r"site\(3, every=20, rule="):
        as_plan(f"data(3, rule={rule})")
    with pytest.raises(PlanError, match="codec=identity"):
        as_plan(f"site(3, rule={rule}, codec=int8)")


@pytest.mark.parametrize("axis", ["tensor(2)", "shard(2)", "pipe(2)"])
@pytest.mark.parametrize("rule", OF_CHANGES, ids=str)
def test_rules_that_measure_tensors_are_refused_where_ranks_have_parts_of_them(
    rule: Rule, axis: str
) -> None:
    plan = as_plan(f"site(2, every=4, rule={rule}) * {axis}")
    if rule.of_tensors and axis != "pipe(2)":
        with pytest.raises(PlanError, match=r"site\(2, every=4\)"):
            plan.validate_executable()
    else:
        plan.validate_executable()


@pytest.mark.parametrize("rule", OF_CHANGES, ids=str)
@pytest.mark.parametrize("topology", ["central", "exchange"])
@pytest.mark.parametrize("n", [2, 3, 5])
def test_changes_of_peers_are_fused_tensor_by_tensor(rule: Rule, topology: str, n: int) -> None:
    """Against the same rule over whole tensors; buffers are averaged."""
    shapes = [(4, 9), (1,), (7,), ()]
    weights = [float(1 + rank % 3) for rank in range(n)]
    chance = torch.Generator().manual_seed(n)
    base = [torch.randn(shape, generator=chance) for shape in shapes]
    changes = [[torch.randn(shape, generator=chance) for shape in shapes] for _ in range(n)]

    def work() -> list[Tensor]:
        link = open_link()
        plan = as_plan(f"site({n}, rule={rule}, topology={topology})").axis("site")
        assert isinstance(plan, Site)
        fuser = Fuser(Fusion(rule=rule, topology=plan.topology or Central()), link)
        held = [nn.Parameter(value.clone()) for value in base]
        counts = torch.full((3,), float(link.rank))
        fusion = WeightFusion([*held, counts], fuser)
        fusion.agree()
        for parameter, change in zip(held, changes[link.rank], strict=True):
            parameter.data += change
        fusion.fuse(weights)
        fuser.close()
        return [*(parameter.detach() for parameter in held), counts]

    results = all_fine(launch_threads(work, n))
    told = torch.tensor(weights, dtype=torch.float64)
    for number, start in enumerate(base):
        own = torch.stack([(start + each[number] - start).reshape(-1) for each in changes])
        left = torch.stack([sift_whole(rule, value, shapes[number]) for value in own])
        expected = start + fuse_whole(rule, left, told, shapes[number]).view(start.shape)
        for result in results:
            assert torch.equal(result[number], results[0][number])
            torch.testing.assert_close(result[number], expected, rtol=1e-5, atol=1e-6)
    mean = sum(w * rank for rank, w in enumerate(weights)) / sum(weights)
    torch.testing.assert_close(results[0][-1], torch.full((3,), mean))


def test_peers_that_have_agreed_on_nothing_begin_with_a_mean() -> None:
    def work() -> Tensor:
        link = open_link()
        fuser = Fuser(Fusion(rule=Ties(density=0.3), topology=Central()), link)
        own = nn.Parameter(torch.full((4,), float(link.rank)))
        fusion = WeightFusion([own], fuser)
        fusion.fuse([1.0, 1.0])
        own.data += torch.tensor([1.0, 0.0, 0.0, 0.2]) * (1 + link.rank)
        fusion.fuse([1.0, 1.0])
        fuser.close()
        return own.detach()

    for found in all_fine(launch_threads(work, 2)):
        torch.testing.assert_close(found, torch.tensor([2.0, 0.5, 0.5, 0.5]))


@pytest.mark.parametrize("rule", [r for r in variants() if r.fuses_weights], ids=str)
def test_rules_that_gather_travel_only_where_values_meet(rule: Rule) -> None:
    chosen, why = choose(rule, None, Fusion().sync, Fusion().codec, 3)
    assert why is not None
    assert chosen.topology.gathers == isinstance(rule, GatherRule)
    for topology in ("ring", "native", "gossip", "tree"):
        text = f"site(3, topology={topology}, rule={rule})"
        if isinstance(rule, Mean):
            as_plan(text)
        else:
            with pytest.raises(PlanError, match="topology=central"):
                as_plan(text)
    as_plan(f"data(3, rule={rule})").validate_executable()


@pytest.mark.parametrize("rule", [r for r in variants() if not r.fuses_weights], ids=str)
def test_rules_for_gradients_alone_are_refused_for_weights(rule: Rule) -> None:
    as_plan(f"data(3, rule={rule})").validate_executable()
    with pytest.raises(PlanError, match=r"data\(3, rule="):
        as_plan(f"site(3, rule={rule})")


def test_cuts_that_leave_nothing_are_refused() -> None:
    for cut in ("0.5", "-0.1", "2"):
        with pytest.raises(PlanError, match=r"below 0\.5"):
            as_plan(f"site(3, rule=trimmed({cut}))")
