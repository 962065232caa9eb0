"""Fusion of weights is the weighted mean over sites; the hook for other loops is the plain mean."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from allfuse.base.errors import PlanError, UserError
from allfuse.fusion import Fuser, Fusion, choose
from allfuse.fusion.hook import comm_hook
from allfuse.fusion.weights import WeightFusion
from allfuse.launcher.base import current_world
from allfuse.launcher.local import launch_local
from allfuse.launcher.thread import first_failure, launch_threads
from allfuse.link import Link
from allfuse.rule.median import Median

CPU = torch.device("cpu")


def open_link() -> Link:
    world = current_world()
    assert world is not None
    return world.link("site", tuple(range(world.size)), CPU)


def run(function: Callable[[], Any], workers: int) -> list[Any]:
    results = launch_threads(function, workers)
    failure = first_failure(results)
    if failure is not None:
        raise failure
    return results


def tensors_of(rank: int) -> list[Tensor]:
    random = torch.Generator().manual_seed(rank)
    return [
        nn.Parameter(torch.randn(5, 3, generator=random)),
        torch.randn(4, 6, generator=random).t(),  # not contiguous
        torch.randn(7, generator=random, dtype=torch.float64),
        torch.randn(9, generator=random).bfloat16(),
        torch.randn((), generator=random),
        torch.zeros(0),
        torch.tensor(rank),  # a counter stays its site's own
    ]


@pytest.mark.parametrize("total", [1.0, 48.0])
@pytest.mark.parametrize("workers", [1, 2, 3, 5])
def test_it_is_the_weighted_mean_and_the_same_on_all_sites(workers: int, total: float) -> None:
    samples = [float(3 + rank) for rank in range(workers)]
    scale = total / sum(samples)

    def work() -> tuple[list[Tensor], int, int]:
        link, tensors = open_link(), tensors_of(current_world().rank)  # type: ignore[union-attr]
        fusion = WeightFusion(tensors, Fuser(Fusion(), link))
        fusion.fuse([count * scale for count in samples])
        return [tensor.detach() for tensor in tensors], link.sent_bytes, fusion.read().payload_bytes

    outcomes = run(work, workers)
    parts = [tensors_of(rank) for rank in range(workers)]
    for place, ours in enumerate(outcomes[0][0][:-1]):
        weighted = [
            w * part[place].detach().double() for w, part in zip(samples, parts, strict=True)
        ]
        expected = torch.stack(weighted).sum(0) / sum(samples)
        exact = 3e-2 if ours.dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(ours.double(), expected, rtol=exact, atol=exact)
    for rank, (tensors, sent, payload) in enumerate(outcomes):
        assert int(tensors[-1]) == rank
        assert abs(sent - 2 * (workers - 1) * payload / workers) < 10  # whole bytes of each bucket
        for ours, first in zip(tensors[:-1], outcomes[0][0][:-1], strict=True):
            assert torch.equal(ours, first)


def test_a_round_repeats_and_leaves_the_graph_alone() -> None:
    def work() -> Tensor:
        link = open_link()
        weight = nn.Parameter(torch.full((3,), float(link.rank)))
        fusion = WeightFusion([weight], Fuser(Fusion(), link))
        for _ in range(3):
            fusion.fuse([0.5, 0.5])
        assert weight.grad_fn is None
        assert weight.requires_grad
        return weight.detach()

    for weight in run(work, 2):
        assert weight.tolist() == [0.5] * 3


def test_pairings_without_meaning_are_refused_and_what_is_left_open_is_chosen() -> None:
    with pytest.raises(PlanError, match="median needs every peer's value at once"):
        Fusion(rule=Median())
    plain = Fusion()
    chosen, why = choose(plain.rule, None, plain.sync, plain.codec, 4)
    assert chosen == plain
    assert why is not None
    assert choose(plain.rule, plain.topology, plain.sync, plain.codec, 4) == (plain, None)


def train_with_ddp(hook: str | None) -> list[Tensor]:
    """Three steps of DistributedDataParallel on the group of all workers."""
    import torch.distributed as dist

    from allfuse.base.torch_private import PrefixStore

    world = current_world()
    assert world is not None
    store = PrefixStore(f"ddp {hook}", world.store_board.store)  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=world.rank, world_size=world.size)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
    parallel = nn.parallel.DistributedDataParallel(model)
    if hook is not None:
        parallel.register_comm_hook(None, comm_hook(hook))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    random = torch.Generator().manual_seed(world.rank)
    for _ in range(3):
        optimizer.zero_grad()
        parallel(torch.randn(4, 6, generator=random)).square().mean().backward()
        optimizer.step()
    # In the other order torch 2.13 may deadlock: the last owner of a gloo group must be Python.
    del parallel
    dist.destroy_process_group()
    return [parameter.detach() for parameter in model.parameters()]


def test_the_hook_gives_what_distributed_data_parallel_gives_by_itself() -> None:
    def work() -> tuple[list[Tensor], list[Tensor], list[str]]:
        import torch.distributed as dist

        from allfuse.base.torch_private import PrefixStore

        hooked, plain = train_with_ddp("data(2)"), train_with_ddp(None)
        world = current_world()
        assert world is not None
        store = PrefixStore("refused", world.store_board.store)  # type: ignore[attr-defined]
        dist.init_process_group("gloo", store=store, rank=world.rank, world_size=2)
        refused = []
        for plan in ("data(3)", "site(2)", "site(1) * data(2)"):
            with pytest.raises(PlanError) as caught:
                comm_hook(plan)
            refused.append(str(caught.value))
        dist.destroy_process_group()
        return hooked, plain, refused

    hooked, plain, refused = launch_local(work, 2, timeout_s=60)
    for ours, theirs in zip(hooked, plain, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert "the process group has 2 ranks; nearest that can: data(2)" in refused[0]
    assert "fuses gradients of whole models only; nearest that can: data(2)" in refused[1]
    assert "nearest that can: data(2)" in refused[2]


def test_the_hook_needs_a_process_group() -> None:
    with pytest.raises(UserError, match=r"call torch\.distributed\.init_process_group"):
        comm_hook("data(2)")
