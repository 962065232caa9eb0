"""The median time of a step against torch's DistributedDataParallel.

2 workers with 1 thread each train the same model on the same data, both sides alive in the same
two processes and taking turns of some steps. The peer is DistributedDataParallel over a gloo group
on this host, with gradient_as_bucket_view and without, whichever is faster.

Batches are chosen so that computing takes one to three times as long as summing the gradients
does: with less, both sides only measure gloo; with more, they only measure the kernels.
"""

from __future__ import annotations

import os
import statistics
import tempfile
from pathlib import Path

import harness
import models
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import allfuse as af

WORKERS = 2
TARGET = 1.02
CASES = ("mlp", "cnn", "gpt")
SECONDS = 26.0  # for each model
STEPS = 10  # of one turn


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


def measure(name: str, meeting: str, quick: bool) -> tuple[dict[str, list[float]], float]:
    """Runs in each worker. Seconds of each side's turns, and megabytes of gradients."""
    rank = join(meeting)
    case = models.CASES[name]
    data, batch = case.data(), case.share * WORKERS

    def loop(forward: torch.nn.Module) -> models.PlainLoop:
        return models.PlainLoop(forward, case, data, batch, WORKERS, rank)

    with af.session(quiet=True) as session:
        ours = models.SessionLoop(session, case, data, batch)
        loops = {
            "allfuse": ours,
            "ddp": loop(wrapped(case, view=False)),
            "ddp with views": loop(wrapped(case, view=True)),
            "compute": loop(models.build(case)),
        }
        payload = torch.zeros(sum(p.numel() for p in models.build(case).parameters()))
        steps = 2 if quick else STEPS

        def sum_payload() -> None:
            for _ in range(steps):
                dist.all_reduce(payload)

        turns = {key: lambda loop=loop: loop.run(steps) for key, loop in loops.items()}
        turns["all-reduce"] = sum_payload
        warm = harness.interleave(turns, 2, dist.barrier)
        rounds = torch.tensor(2 if quick else int(SECONDS / sum(map(min, warm.values()))))
        dist.broadcast(rounds, 0)
        seconds = harness.interleave(turns, int(rounds), dist.barrier)
        ours.close()
    return {key: [value / steps for value in values] for key, values in seconds.items()}, (
        payload.nbytes / 1e6
    )


def figures(name: str, seconds: dict[str, list[float]], megabytes: float) -> list[harness.Figure]:
    """The ratio to the faster peer, and what the step is made of."""
    peer = min(("ddp", "ddp with views"), key=lambda key: statistics.median(seconds[key]))
    told = ", ".join(f"{key} {harness.milliseconds(values)}" for key, values in seconds.items())
    floor = f"{megabytes:.1f} MB; medians: {told}; peer: {peer}"
    compute = harness.ratios(seconds["allfuse"], seconds["compute"])
    return [
        harness.figure(
            f"{name}: step over DistributedDataParallel",
            harness.ratios(seconds["allfuse"], seconds[peer]),
            target=TARGET,
            floor=floor,
        ),
        harness.figure(f"{name}: step over computing alone", compute, floor="1 with no traffic"),
    ]


def main() -> None:
    options = harness.parse_options(__doc__)
    found: list[harness.Figure] = []
    for name in CASES[:1] if options.quick else CASES:
        with tempfile.TemporaryDirectory() as folder:
            seconds, megabytes = af.launch(
                measure, name, str(Path(folder) / "meet"), options.quick, workers=WORKERS, threads=1
            )
        found += figures(name, seconds, megabytes)
    harness.report("step", found, options)


if __name__ == "__main__":
    main()
