"""Any tensors are fused in place as an axis says, in worlds of allfuse and in groups of others."""

from __future__ import annotations

import gc
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import allfuse as af
from allfuse.base.errors import PeerLost, PlanError, UserError, WorkerFailed
from allfuse.base.torch_private import PrefixStore
from allfuse.fusion import fuse
from allfuse.launcher.base import current_world
from allfuse.launcher.local import launch_local
from allfuse.launcher.thread import first_failure, launch_threads
from allfuse.link.thread import Killed, Script
from allfuse.rule import RULES
from allfuse.topology import TOPOLOGIES

SIZE = 3
ARGUMENTS = {"clipped": "(0.5)"}
EXACT = [name for name, topology in TOPOLOGIES.items() if topology.exact]
TYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def my_rank() -> int:
    world = current_world()
    assert world is not None
    return world.rank


def value(rank: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(rank)).to(dtype)


def run(function: Callable[[], Any], workers: int = SIZE, **options: Any) -> list[Any]:
    results = launch_threads(function, workers, **options)
    failure = first_failure(results)
    if failure is not None:
        raise failure
    return results


def mean(weights: list[float], *shape: int) -> Tensor:
    parts = [w * value(rank, *shape).double() for rank, w in enumerate(weights)]
    return (torch.stack(parts).sum(0) / sum(weights)).float()


@pytest.mark.parametrize("kind", ["data", "site"])
@pytest.mark.parametrize("topology", [*EXACT, "auto", "tree(double)", "central(servers=2)"])
def test_every_topology_gives_the_weighted_mean(topology: str, kind: str) -> None:
    def work() -> Tensor:
        tensor = value(my_rank(), 1001)
        af.fuse_([tensor], f"{kind}({SIZE}, topology={topology})", weight=my_rank() + 1)
        return tensor

    fused = run(work)
    torch.testing.assert_close(fused[0], mean([1.0, 2.0, 3.0], 1001))
    assert all(torch.equal(fused[0], other) for other in fused)


def test_without_weights_all_count_alike() -> None:
    def work() -> Tensor:
        tensor = value(my_rank(), 5)
        af.fuse_(tensor, af.data(SIZE))
        return tensor

    torch.testing.assert_close(run(work)[0], mean([1.0] * SIZE, 5))


@pytest.mark.parametrize("name", [name for name in RULES if RULES[name].of_changes])
def test_rules_of_changes_are_refused_for_nothing_is_kept(name: str) -> None:
    with pytest.raises(PlanError, match=rf"site\({SIZE}\)"):
        run(lambda: af.fuse_([value(my_rank(), 7)], f"site({SIZE}, rule={name})"))


@pytest.mark.parametrize("name", [name for name in RULES if not RULES[name].of_changes])
def test_every_rule_leaves_all_ranks_equal(name: str) -> None:
    kind = "site" if RULES[name].fuses_weights else "data"

    def work() -> Tensor:
        tensor = value(my_rank(), 7)
        af.fuse_([tensor], f"{kind}({SIZE}, rule={name}{ARGUMENTS.get(name, '')})", weight=2.0)
        return tensor

    fused = run(work)
    assert all(torch.equal(fused[0], other) for other in fused)
    each = torch.stack([value(rank, 7) for rank in range(SIZE)])
    known = {
        "mean": each.mean(0),
        "median": each.median(0).values,
        "vote": each.sign().sum(0).sign(),
        "clipped": (each * (0.5 / each.norm(dim=1))[:, None]).mean(0),
    }
    if name in known:
        torch.testing.assert_close(fused[0], known[name])


def test_a_median_ignores_one_corrupt_rank_and_a_weight_counts() -> None:
    def work() -> tuple[Tensor, Tensor]:
        corrupt = torch.full((4,), 1e30 if my_rank() == 0 else 1.0)
        heavy = torch.full((4,), float(my_rank()))
        af.fuse_([corrupt], f"site({SIZE}, rule=median)")
        af.fuse_([heavy], f"site({SIZE}, rule=median)", weight=9.0 if my_rank() == 2 else 1.0)
        return corrupt, heavy

    corrupt, heavy = run(work)[1]
    assert corrupt.tolist() == [1.0] * 4
    assert heavy.tolist() == [2.0] * 4


def test_gossip_mixes_and_comes_to_the_mean_over_rounds() -> None:
    def work() -> Tensor:
        tensor = value(my_rank(), 6)
        for number in range(2):  # exact after log2 n rounds
            af.fuse_([tensor], "site(4, topology=gossip(one_peer))", round=number)
        return tensor

    def once() -> Tensor:
        tensor = value(my_rank(), 6)
        af.fuse_([tensor], "site(4, topology=gossip(ring), every=50)")
        return tensor

    for fused in run(work, 4):
        torch.testing.assert_close(fused, mean([1.0] * 4, 6))
    mixed = run(once, 4)
    assert not torch.equal(mixed[0], mixed[1])
    torch.testing.assert_close(torch.stack(mixed).mean(0), mean([1.0] * 4, 6))


def test_tensors_of_all_kinds() -> None:
    def tensors(rank: int) -> dict[str, Tensor]:
        made = {str(dtype): value(rank, 9, dtype=dtype) for dtype in TYPES}
        made["parameter"] = nn.Parameter(value(rank, 3, 4))
        made["columns"] = value(rank, 4, 6).t()
        made["part"] = value(rank, 8)[::2]
        made["scalar"] = value(rank)
        made["empty"] = torch.zeros(0)
        made["result"] = nn.Parameter(value(rank, 5)) * 1.0  # has a graph behind it
        made["counter"] = torch.tensor(rank)
        return made

    def work() -> dict[str, Tensor]:
        made = tensors(my_rank())
        af.fuse_(made.values(), af.site(SIZE), weight=1e5 * (my_rank() + 1))  # beyond float16
        assert isinstance(made["parameter"], nn.Parameter)
        assert made["parameter"].requires_grad
        assert made["parameter"].grad_fn is None
        return {name: tensor.detach() for name, tensor in made.items()}

    fused = run(work)
    for rank, found in enumerate(fused):
        assert int(found.pop("counter")) == rank  # stays its rank's own
    for name, tensor in fused[0].items():
        each = [(rank + 1) * tensors(rank)[name].detach().double() for rank in range(SIZE)]
        exact = max(1e-6, 4 * torch.finfo(tensor.dtype).eps)
        expected = torch.stack(each).sum(0) / 6
        torch.testing.assert_close(tensor.double(), expected, rtol=exact, atol=exact)
        assert all(torch.equal(tensor, other[name]) for other in fused)


def test_nothing_to_fuse_is_fine() -> None:
    def work() -> Tensor:
        af.fuse_([], af.site(2))
        count = torch.tensor(my_rank())
        af.fuse_([count], af.site(2))
        return count

    assert [int(count) for count in run(work, 2)] == [0, 1]


def test_one_rank_alone_fuses_with_itself() -> None:
    tensor = torch.ones(3)
    af.fuse_([tensor], "site(1)", weight=5.0)
    assert tensor.tolist() == [1.0] * 3


def refusals(function: Callable[[], Any], workers: int = 2) -> list[str]:
    """What each rank is told; none of them waits for another."""
    results = launch_threads(function, workers, timeout_s=5)
    assert all(isinstance(result, UserError) for result in results), results
    return [str(result) for result in results]


def test_ranks_that_came_with_different_things_are_all_told() -> None:
    def sizes() -> None:
        af.fuse_([torch.ones(3 + my_rank())], af.site(2))

    def counts() -> None:
        af.fuse_([torch.ones(3)] * (1 + my_rank()), af.site(2))

    def types() -> None:
        af.fuse_([torch.ones(3, dtype=TYPES[my_rank()])], af.site(2))

    def rules() -> None:
        af.fuse_([torch.ones(3)], af.site(2, rule=("mean", "median")[my_rank()]))

    def one_weight() -> None:
        af.fuse_([torch.ones(3)], af.site(2), weight=(None, 1.0)[my_rank()])

    def none_or_some() -> None:
        af.fuse_([torch.ones(3)] if my_rank() else [], af.site(2))

    for function in (sizes, counts, types, rules, one_weight, none_or_some):
        for told in refusals(function):
            assert "what rank 0 came with is not what came from rank 1" in told


@pytest.mark.parametrize(
    ("tensor", "why"),
    [
        (torch.ones(2).to_sparse(), "tensor 0 is sparse"),
        (torch.ones(2) * 1j, "view_as_real"),
        (torch.ones(2).to(torch.float8_e4m3fn), "tensor 0 is of torch.float8_e4m3fn"),
        (torch.ones(1).expand(2), "tensor 0 is expanded: its elements share memory"),
        (torch.ones(2, device="meta"), "tensor 0 is on the meta device"),
        (3.0, "received a float; allowed: a tensor, or a list of them"),
    ],
)
def test_what_one_rank_cannot_fuse_is_told_to_all(tensor: Any, why: str) -> None:
    first, second = refusals(
        lambda: af.fuse_([tensor if my_rank() == 1 else torch.ones(2)], af.site(2))
    )
    assert "rank 1 has something that cannot be fused" in first
    assert why in second


@pytest.mark.parametrize("given", [None, 3.0, "abc", {"a": torch.ones(2)}], ids=repr)
def test_what_is_no_list_of_tensors_is_refused(given: Any) -> None:
    first, second = refusals(
        lambda: af.fuse_(given if my_rank() == 1 else torch.ones(2), af.site(2))
    )
    assert "rank 1 has something that cannot be fused" in first
    assert f"received a {type(given).__name__}; allowed: a tensor" in second


def test_a_tensor_of_one_row_may_have_any_stride_there() -> None:
    def work() -> Tensor:
        row = torch.full((3,), float(my_rank())).as_strided((1, 3), (0, 1))
        af.fuse_(row, af.site(2))
        return row

    assert [fused.tolist() for fused in run(work, 2)] == [[[0.5] * 3]] * 2


@pytest.mark.parametrize(
    "weight",
    [-1.0, float("nan"), float("inf"), 10**400, "1", [1.0], torch.ones(2)],
    ids=lambda weight: repr(weight)[:20],
)
def test_weights_without_meaning_are_refused(weight: Any) -> None:
    first, second = refusals(
        lambda: af.fuse_([torch.ones(2)], af.site(2), weight=weight if my_rank() else 1.0)
    )
    assert "rank 1 has something" in first
    assert "allowed: 0 or more" in second
    zero = refusals(lambda: af.fuse_([torch.ones(2)], af.site(2), weight=0))
    assert "the weights of all ranks are 0" in zero[0]
    large = refusals(lambda: af.fuse_([torch.ones(2)], af.site(2), weight=1e308))
    assert "beyond the range of numbers" in large[0]
    mixed = refusals(
        lambda: af.fuse_([torch.ones(2)], "site(2, topology=gossip(ring))", weight=1.0)
    )
    assert "mixes by weights of its own" in mixed[0]


def test_a_rank_of_weight_0_is_heard_by_nobody_and_hears_all() -> None:
    def work() -> Tensor:
        tensor = value(my_rank(), 5)
        af.fuse_([tensor], af.site(2), weight=float(my_rank()))
        return tensor

    for fused in run(work, 2):
        torch.testing.assert_close(fused, value(1, 5))


@pytest.mark.parametrize(
    ("axis", "why"),
    [
        ("site(3)", "there are 2 ranks; nearest that can: site(2)"),
        ("data(3)", "there are 2 ranks; nearest that can: data(2)"),
        ("site(3, every=5, rule=median)", "nearest that can: site(2, every=5, rule=median)"),
        ("tensor(2)", "fused over one axis, data or site"),
        ("site(1) * data(2)", "fused over one axis, data or site"),
        ("data(2, codec=topk(0.1))", "nothing is kept between calls; nearest that can: data(2)"),
        ("sites(2)", "did you mean 'site'"),
    ],
)
def test_axes_without_meaning_are_refused(axis: str, why: str) -> None:
    for told in refusals(lambda: af.fuse_([torch.ones(2)], axis)):
        assert why in told


def test_without_a_group_it_says_what_to_do() -> None:
    with pytest.raises(UserError, match=r"call torch\.distributed\.init_process_group first"):
        af.fuse_([torch.ones(2)], "site(2)")
    with pytest.raises(PlanError):
        af.fuse_([torch.ones(2)], "side(1)")


def test_a_lost_rank_is_named() -> None:
    def work() -> None:
        for _ in range(5):
            af.fuse_([torch.ones(2)], f"site({SIZE}, topology=ring)")

    results = launch_threads(work, SIZE, script=Script(kill={(1, 12)}), timeout_s=5)
    assert isinstance(results[1], Killed)
    assert isinstance(results[0], PeerLost)
    assert isinstance(results[2], PeerLost)
    assert 1 in {results[0].peer, results[2].peer}


def test_worlds_that_are_gone_leave_nothing_behind() -> None:
    run(lambda: af.fuse_([torch.ones(2)], "site(2, topology=ring)"), 2)
    gc.collect()
    assert not [world for world in fuse._links if world.kind == "thread"]
    for thread in [t for t in threading.enumerate() if t.name.startswith("allfuse-fuse-")]:
        thread.join(timeout=5)
        assert not thread.is_alive()


# Real processes.


def in_groups(told: Path) -> dict[str, Any]:
    """In allfuse's own world, in the default group of torch.distributed, and in a part of it."""
    world = current_world()
    assert world is not None
    rank, found = world.rank, {}
    tensor = value(rank, 50)
    af.fuse_([tensor], "site(3, topology=ring)", weight=rank + 1)
    found["world"] = tensor
    store = PrefixStore("owner", world.store_board.store)  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world.size)
    group = dist.group.WORLD
    for topology in (*EXACT, "gossip(full)"):
        tensor = value(rank, 50)
        af.fuse_([tensor], f"site(3, topology={topology})", group=group)
        found[topology] = tensor
    part = dist.new_group([0, 2])
    if rank != 1:
        found["part"] = value(rank, 50)
        af.fuse_([found["part"]], "site(2, topology=ring)", group=part)
    with pytest.raises(UserError, match="came with"):
        af.fuse_([torch.ones(2 + rank)], "site(3)", group=group)
    with pytest.raises(PlanError, match="there are 3 ranks"):
        af.fuse_([torch.ones(2)], "site(2)", group=group)
    dist.barrier()
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(PeerLost) as caught:
        af.fuse_([torch.ones(2)], "site(3, topology=ring)", group=group, timeout_s=2)
    found["lost"] = str(caught.value)
    if rank == 0:
        torch.save(found, told)
    os._exit(0)  # a group that has lost a rank may wait for it for ever


def test_groups_of_others(tmp_path: Path) -> None:
    told = tmp_path / "told"
    with pytest.raises(WorkerFailed):
        launch_local(lambda: in_groups(told), 3, timeout_s=30)
    found = torch.load(told)
    assert "in agree on a fusion" in found.pop("lost")
    torch.testing.assert_close(found.pop("world"), mean([1.0, 2.0, 3.0], 50))
    torch.testing.assert_close(found.pop("part"), (value(0, 50) + value(2, 50)) / 2)
    assert len(found) == len(EXACT) + 1
    for tensor in found.values():
        torch.testing.assert_close(tensor, mean([1.0] * 3, 50))
