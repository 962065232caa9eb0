"""The median time of a step against torch's DistributedDataParallel.

2 workers with 1 thread each train the same model on the same data, both sides alive in the same
two processes and taking turns of some steps. The peer is DistributedDataParallel over a gloo group
on this host, with gradient_as_bucket_view and without, whichever is faster.

Batches are chosen so that computing takes one to three times as long as summing the gradients
does: with less, both sides only measure gloo; with more, they only measure the kernels.
"""

from __future__ import annotations

import functools
import os
import statistics
import tempfile
from pathlib import Path

import harness
import models
import torch
import torch.distributed as dist
from together import take_turns
from torch.nn.parallel import DistributedDataParallel

import allfuse as af

WORKERS = 2
TARGET = 1.02
CASES = ("mlp", "cnn", "gpt")
LAUNCHES = 3  # for each model: where memory happens to lie shifts a step by percents
SECONDS = 8.0  # in each launch
TURN_S = 0.2


def join(meeting: str) -> int:
    """Make the default group that DistributedDataParallel uses; this worker's rank."""
    from allfuse.launcher import current_world

    world = current_world()
    assert world is not None
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # as allfuse's own link on one host
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=world.rank, world_size=world.size
    )
    return world.rank


def wrapped(case: models.Case, *, view: bool) -> DistributedDataParallel:
    return DistributedDataParallel(models.build(case), gradient_as_bucket_view=view)


def measure(name: str, meeting: str, quick: bool) -> dict[str, harness.Turns]:
    """Runs in each worker, fresh. What a step of each side takes in each turn."""
    rank = join(meeting)
    case = models.CASES[name]
    data, batch = case.data(), case.share * WORKERS

    def loop(forward: torch.nn.Module) -> models.PlainLoop:
        return models.PlainLoop(forward, case, data, batch, WORKERS, rank)

    with af.session(quiet=True) as session:
        ours = models.SessionLoop(session, case, data, batch)
        compute = loop(models.build(case))
        loops = {
            "allfuse": ours.run,
            "ddp": loop(wrapped(case, view=False)).run,
            "ddp with views": loop(wrapped(case, view=True)).run,
            "compute": compute.run,
            "all-reduce": Payload(case).run,
        }
        found = take_turns(
            loops,
            compute,
            turn_s=TURN_S,
            seconds=SECONDS,
            least=2,
            quick_steps=2 if quick else None,
        )
        ours.close()
    return found


class Payload:
    """As many bytes as the gradients of a model, summed and nothing else."""

    def __init__(self, case: models.Case) -> None:
        self.flat = torch.zeros(models.count_parameters(case))

    def run(self, steps: int) -> None:
        for _ in range(steps):
            dist.all_reduce(self.flat)


def figures(name: str, turns: dict[str, harness.Turns]) -> list[harness.Figure]:
    """The ratio to the faster peer, and what the step is made of."""
    peer = min(("ddp", "ddp with views"), key=lambda key: statistics.median(turns[key].wall_s))
    told = ", ".join(f"{key} {harness.milliseconds(turn.wall_s)}" for key, turn in turns.items())
    megabytes = models.count_parameters(models.CASES[name]) * 4 / 1e6
    ours = turns["allfuse"]
    return [
        harness.figure(
            f"{name}: step over DistributedDataParallel",
            harness.ratios(ours.wall_s, turns[peer].wall_s),
            target=TARGET,
            floor=f"{megabytes:.1f} MB; medians: {told}; the peer is {peer}",
        ),
        harness.figure(
            f"{name}: the same in processor time of a worker",
            harness.ratios(ours.cpu_s, turns[peer].cpu_s),
        ),
        harness.figure(
            f"{name}: step over computing alone",
            harness.ratios(ours.wall_s, turns["compute"].wall_s),
            floor="1 would be traffic at no cost",
        ),
    ]


def main() -> None:
    options = harness.parse_options(__doc__)
    found: list[harness.Figure] = []
    for name in CASES[:1] if options.quick else CASES:
        parts = []
        for _ in range(1 if options.quick else LAUNCHES):
            with tempfile.TemporaryDirectory() as folder:
                meeting = str(Path(folder) / "meeting")
                work = functools.partial(measure, name, meeting, options.quick)
                parts.append(af.launch(work, workers=WORKERS, threads=1))
        found += figures(name, harness.gather(parts))
    harness.report("step", found, options)


if __name__ == "__main__":
    main()
