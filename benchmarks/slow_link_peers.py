"""The others of `slow_link.py`: what a person writes without allfuse, or takes from elsewhere.

A loop is a step without arguments. Ranks have met in torch.distributed's own group by then.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from slow_link_tasks import Task, cut
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from allfuse.launcher.torchrun import own_address

Step = Callable[[], None]
WAIT = timedelta(seconds=60)


@contextlib.contextmanager
def loop_of(
    model: nn.Module, task: Task, samples: Any, lr: float | None, name: str, **options: Any
) -> Iterator[Step]:
    """A peer's step: "ddp", "diloco", "torchft", "hivemind", or "alone", which tells nobody."""
    batches = cut(samples, task.batch, dist.get_rank(), dist.get_world_size())
    wrapped = wrap(model, **options) if name == "ddp" else model
    optimizer, schedule = task.optimizer(model, lr)

    def step() -> None:
        batch = next(batches)
        optimizer.zero_grad()
        total, count = task.loss(task.forward(wrapped, batch), batch)
        (total / count).backward()
        optimizer.step()
        schedule.step()

    if name == "diloco":
        yield diloco(model, step, **options)
    elif name == "torchft":
        with torchft(model, optimizer, **options):
            yield step
    elif name == "hivemind":
        with hivemind(model, step, **options) as averaged:
            yield averaged
    else:
        yield step


def installed(name: str) -> bool:
    return name not in ("torchft", "hivemind") or importlib.util.find_spec(name) is not None


def wrap(model: nn.Module, hook: str = "none", rank: int = 0, start: int = 0) -> nn.Module:
    """DistributedDataParallel with one of its hooks."""
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook

    # PowerSGD aborts with several buckets: their dependent sums overtake each other
    bucket_mb = 100 if hook == "powersgd" else None
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True, bucket_cap_mb=bucket_mb)
    if hook == "fp16":
        wrapped.register_comm_hook(None, default_hooks.fp16_compress_hook)
    elif hook == "powersgd":
        state = powerSGD_hook.PowerSGDState(
            None,
            matrix_approximation_rank=rank,
            start_powerSGD_iter=start,
            orthogonalization_epsilon=1e-8,  # without it columns of zeros become NaN
        )
        wrapped.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    return wrapped


def diloco(
    model: nn.Module, inner: Step, every: int, outer_lr: float = 1.0, momentum: float = 0.0
) -> Step:
    """DiLoCo over gloo, written by hand: all weights in one sum, every so many steps."""
    anchor = parameters_to_vector(model.parameters()).detach()
    outer = torch.optim.SGD([anchor], lr=outer_lr, momentum=momentum, nesterov=momentum > 0)
    steps = 0

    def step() -> None:
        nonlocal steps
        inner()
        steps += 1
        if steps % every:
            return
        with torch.no_grad():
            change = anchor - parameters_to_vector(model.parameters())
            dist.all_reduce(change)
            anchor.grad = change / dist.get_world_size()
            outer.step()
            vector_to_parameters(anchor, model.parameters())

    return step


@contextlib.contextmanager
def torchft(
    model: nn.Module, optimizer: torch.optim.Optimizer, every: int, outer_lr: float, momentum: float
) -> Iterator[None]:
    """torchft's DiLoCo over its gloo group: each host a replica group of one."""
    import torchft as ft
    from torchft.local_sgd import DiLoCo

    rank, ranks = dist.get_rank(), dist.get_world_size()
    told: list[Any] = [None]
    house: Any = None
    if rank == 0:
        from torchft.coordination import LighthouseServer

        house = LighthouseServer(bind="0.0.0.0:0", min_replicas=ranks, join_timeout_ms=10_000)
        told[0] = house.address().rpartition(":")[2]
    dist.broadcast_object_list(told)
    own = own_address(os.environ["MASTER_ADDR"]) or "127.0.0.1"
    store = dist.TCPStore(own, 0, is_master=True, wait_for_workers=False)
    outer = torch.optim.SGD(
        model.parameters(), lr=outer_lr, momentum=momentum, nesterov=momentum > 0
    )
    manager = ft.Manager(
        pg=ft.ProcessGroupGloo(timeout=WAIT),
        min_replica_size=ranks,
        use_async_quorum=False,
        load_state_dict=lambda state: None,
        state_dict=dict,
        replica_id=f"site{rank}",
        store_addr=own,
        store_port=store.port,
        hostname=own,
        rank=0,
        world_size=1,
        lighthouse_addr=f"http://{os.environ['MASTER_ADDR']}:{told[0]}",
        timeout=WAIT,
        quorum_timeout=WAIT,
        init_sync=False,
    )
    try:
        with DiLoCo(manager, [model], optimizer, outer, every, pin_memory=False):
            yield
            dist.barrier()
    finally:
        manager.shutdown(wait=False)
        if house is not None:
            house.shutdown()


@contextlib.contextmanager
def hivemind(model: nn.Module, inner: Step, every: int) -> Iterator[Step]:
    """Hivemind's averaging of all weights every so many steps, 8 bits a value on the way."""
    import hivemind as hm

    own = own_address(os.environ["MASTER_ADDR"]) or "127.0.0.1"
    rank, ranks = dist.get_rank(), dist.get_world_size()
    told: list[Any] = [None]
    about: dict[str, Any] = {"host_maddrs": [f"/ip4/{own}/tcp/0"], "start": True}
    if rank == 0:
        dht = hm.DHT(**about)
        told = [[str(address) for address in dht.get_visible_maddrs()]]
    dist.broadcast_object_list(told)
    if rank:
        dht = hm.DHT(initial_peers=told[0], **about)
    averager = hm.DecentralizedAverager(
        [parameter.detach().clone() for parameter in model.parameters()],
        dht=dht,
        prefix="slow_link",
        target_group_size=ranks,
        min_group_size=ranks,
        min_matchmaking_time=2.0,
        request_timeout=1.0,
        next_chunk_timeout=WAIT.total_seconds(),
        sender_timeout=WAIT.total_seconds(),
        reducer_timeout=2 * WAIT.total_seconds(),
        compression=hm.compression.Uniform8BitQuantization(),
        start=True,
    )
    dist.barrier()
    steps = 0

    def step() -> None:
        nonlocal steps
        inner()
        steps += 1
        if steps % every:
            return
        with torch.no_grad():
            with averager.get_tensors() as held:
                for kept, parameter in zip(held, model.parameters(), strict=True):
                    kept.copy_(parameter)
            if averager.step(timeout=WAIT.total_seconds()) is None:
                raise RuntimeError("hivemind found no group")
            with averager.get_tensors() as held:
                for kept, parameter in zip(held, model.parameters(), strict=True):
                    parameter.copy_(kept)

    try:
        yield step
        dist.barrier()
    finally:
        averager.shutdown()
        dht.shutdown()
