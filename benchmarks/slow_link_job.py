"""What the ranks of `slow_link.py` do: train the character model, each contender in its own way.

All begin with the same weights, take the same batches, each rank its share of them, and step with
the same optimizer. A segment of some steps is timed on all ranks together; between segments the
loss over the same held-out samples is taken, which is not timed.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import harness
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import allfuse as af

sys.path.insert(0, str(harness.ROOT / "examples"))
charlm: Any = importlib.import_module("charlm")

FULL = {
    "layers": 2,
    "width": 224,
    "context": 32,
    "batch": 16,
    "steps": 288,
    "segment": 8,
    "held_out": 128,
}
QUICK = FULL | {"layers": 1, "width": 32, "batch": 4, "steps": 2, "segment": 1, "held_out": 4}
LEARNING_RATE = 1e-3  # better than 2e-3 for one process
WARM_UP = 20
SENT = Path("/sys/class/net/eth0/statistics/tx_bytes")  # of this host

Sizes = dict[str, int]


class Loop(Protocol):
    model: nn.Module

    def step(self) -> None: ...


class PlainLoop:
    """The loop that a person writes, around a model that is wrapped already."""

    def __init__(self, model: nn.Module, forward: nn.Module, rows: Tensor) -> None:
        self.model, self.forward = model, forward
        self.optimizer, self.schedule = optimizer_of(model)
        self.batches = iter(rows)

    def step(self) -> None:
        batch = next(self.batches)
        self.optimizer.zero_grad()
        total, count = charlm.loss(self.forward(batch[:, :-1].long()), batch)
        (total / count).backward()
        self.optimizer.step()
        self.schedule.step()


class SessionLoop:
    """The same through allfuse's session."""

    def __init__(self, session: Any, sizes: Sizes, rows: Tensor) -> None:
        self.session = session
        self.model = session.model(lambda: model_of(sizes))
        optimizer, schedule = optimizer_of(self.model)
        session.optimizer(optimizer)
        session.scheduler(schedule)
        self.batches = session.batches(rows, batch_size=sizes["batch"], shuffle=False)

    def step(self) -> None:
        self.session.step(next(self.batches), charlm.loss, forward=forward)


def forward(model: nn.Module, batch: Tensor) -> Any:
    return model(batch[:, :-1].long())


def model_of(sizes: Sizes) -> nn.Module:
    model: nn.Module = charlm.GPT(sizes["layers"], sizes["width"], sizes["context"])
    return model


def optimizer_of(model: nn.Module) -> tuple[torch.optim.Optimizer, Any]:
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    warm = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: min((n + 1) / WARM_UP, 1.0))
    return optimizer, warm


def read_rows(sizes: Sizes) -> tuple[Tensor, Tensor]:
    """Samples in the order in which they are trained on, and held-out ones."""
    chance = torch.Generator().manual_seed(0)
    parts = []
    for text in charlm.read_standard_library(1_000_000):
        rows = charlm.windows(text, sizes["context"])
        parts.append(rows[torch.randperm(len(rows), generator=chance)])
    return parts[0][: sizes["batch"] * sizes["steps"]], parts[1][: sizes["held_out"]]


@contextlib.contextmanager
def loop_of(way: dict[str, Any], sizes: Sizes, rows: Tensor) -> Iterator[Loop]:
    """{"plan": ...} in a session, {"hook": ...} in DistributedDataParallel, {} alone."""
    if "plan" in way:
        with af.session(way["plan"], quiet=True) as session:
            loop = SessionLoop(session, sizes, rows)
            yield loop
            loop.batches.close()
        return
    torch.manual_seed(0)
    model = model_of(sizes)
    batches = rows.unflatten(0, (-1, sizes["batch"]))
    if "hook" not in way:
        yield PlainLoop(model, model, batches)
        return
    # PowerSGD aborts with several buckets: their dependent sums overtake each other
    bucket_mb = 100 if way["hook"] == "powersgd" else None
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True, bucket_cap_mb=bucket_mb)
    add_hook(wrapped, **way)
    share = batches.unflatten(1, (dist.get_world_size(), -1))[:, dist.get_rank()]
    yield PlainLoop(model, wrapped, share)


def add_hook(wrapped: DistributedDataParallel, hook: str, rank: int = 0, start: int = 0) -> None:
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook

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


def train_all(ways: list[dict[str, Any]], sizes: Sizes, **limits: Any) -> list[dict[str, Any]]:
    """Runs in each rank: what `train` finds of each contender, one after the other."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rows, held_out = read_rows(sizes)
    found = []
    for way in ways:
        with loop_of(way, sizes, rows) as loop:
            found.append(train(loop, sizes, held_out, **limits))
            dist.barrier()
    dist.destroy_process_group()
    return found


def train(
    loop: Loop,
    sizes: Sizes,
    held_out: Tensor,
    *,
    segment: int | None = None,
    most: int | None = None,
    least: int = 0,
    target: float | None = None,
) -> dict[str, Any]:
    """Steps until the loss is at most `target`, but `least` of them at least and `most` at most.

    Returns the loss before the first step and after each segment, the seconds that each segment
    took until the last rank was done, and the bytes that this host sent in a step.
    """
    length, most = segment or sizes["segment"], most or sizes["steps"]
    losses, seconds, sent = [measure(loop.model, held_out)], [], 0
    for done in range(length, most + 1, length):
        dist.barrier()
        begin, before = time.perf_counter(), sent_so_far()
        for _ in range(length):
            loop.step()
        dist.barrier()
        seconds.append(time.perf_counter() - begin)
        sent += sent_so_far() - before
        losses.append(measure(loop.model, held_out))
        if target is not None and losses[-1] <= target and done >= least:
            break
    return {
        "segment": length,
        "losses": losses,
        "seconds": seconds,
        "sent": sent / (length * len(seconds)),
    }


@torch.no_grad()
def measure(model: nn.Module, held_out: Tensor) -> float:
    """The loss over held-out samples, of which each rank takes a part."""
    mine = held_out[dist.get_rank() :: dist.get_world_size()]
    total, count = charlm.loss(forward(model, mine), mine)
    sums = torch.tensor([float(total), float(count)], dtype=torch.float64)
    dist.all_reduce(sums)
    return float(sums[0] / sums[1])


def sent_so_far() -> int:
    return int(SENT.read_text()) if SENT.exists() else 0
