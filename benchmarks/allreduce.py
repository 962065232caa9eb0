"""Sums over the ranks of one host against gloo's all_reduce, for sizes from 4 KB to 100 MB.

2, 4 and 8 ranks with 1 thread each; both sides sum the same tensors in the same processes and take
turns. Ours is the link that a session takes there, shared memory. Beside each figure stands what
part of the machine's copy bandwidth it reaches: the bytes that all ranks must at least read and
write (each its own block, and the n-th parts of all for the sum), over the rate at which as many
processes as there are cores copy 100 MB at the same time.
"""

from __future__ import annotations

import functools
import os
import statistics
import tempfile
from pathlib import Path

import harness
import torch
import torch.distributed as dist
from step import join

import allfuse as af

RANKS = (2, 4, 8)
SIZES = (4_000, 64_000, 1_000_000, 10_000_000, 100_000_000)  # bytes of float32
SECONDS = 2.0  # of each size
TURN_BYTES = 2e7  # that a turn sums, over several calls
MOST_CALLS = 50


def measure(meeting: str, quick: bool) -> tuple[dict[int, dict[str, harness.Turns]], float]:
    """Runs in each rank: what a sum of each size takes on each side; and the rate of copies."""
    from allfuse.launcher import current_world

    join(meeting)
    world = current_world()
    assert world is not None
    link = world.link("benchmark", tuple(range(world.size)), torch.device("cpu"))
    found: dict[int, dict[str, harness.Turns]] = {}
    for size in SIZES[:2] if quick else SIZES:
        ours, theirs = torch.zeros(size // 4), torch.zeros(size // 4)
        calls = max(1, min(MOST_CALLS, int(TURN_BYTES / size)))

        def sum_ours(block: torch.Tensor = ours, calls: int = calls) -> None:
            for _ in range(calls):
                link.all_reduce(block, "sum").wait()

        def sum_theirs(block: torch.Tensor = theirs, calls: int = calls) -> None:
            for _ in range(calls):
                dist.all_reduce(block)

        turns = {"allfuse": sum_ours, "gloo": sum_theirs}
        warm = harness.interleave(turns, 1, dist.barrier)
        one_round = torch.tensor(sum(turn.wall_s[0] for turn in warm.values()))
        dist.broadcast(one_round, 0)
        rounds = 2 if quick else max(3, min(40, int(SECONDS / float(one_round))))
        timed = harness.interleave(turns, rounds, dist.barrier)
        found[size] = {name: turn.each(calls) for name, turn in timed.items()}
    return found, copy_rate(world.rank, quick)


def copy_rate(rank: int, quick: bool) -> float:
    """Bytes read and written in a second by all cores together, as this rank sees its part."""
    cores = len(os.sched_getaffinity(0))
    size = 1_000_000 if quick else 100_000_000
    source, target = torch.ones(size // 4), torch.ones(size // 4)
    dist.barrier()
    if rank >= cores:
        dist.barrier()
        return 0.0
    turns = harness.interleave({"copy": lambda: target.copy_(source)}, 5)
    dist.barrier()
    return 2 * size / statistics.median(turns["copy"].wall_s) * cores


def figures(
    ranks: int, found: dict[int, dict[str, harness.Turns]], rate: float
) -> list[harness.Figure]:
    told = []
    for size, turns in found.items():
        ours, theirs = turns["allfuse"].wall_s, turns["gloo"].wall_s
        least = ranks * 2 * size + (ranks + 1) * size  # read and write each block; the sums
        part = least / rate / statistics.median(ours)
        told.append(
            harness.figure(
                f"{ranks} ranks, {size / 1e6:g} MB: time over gloo's",
                harness.ratios(ours, theirs),
                target=0.5 if ranks == 4 and size >= 1_000_000 else 1.0,
                floor=f"allfuse {harness.milliseconds(ours)}, gloo {harness.milliseconds(theirs)}; "
                f"{part:.0%} of the copy bandwidth",
            )
        )
    return told


def main() -> None:
    options = harness.parse_options(__doc__)
    told: list[harness.Figure] = []
    for ranks in RANKS[:1] if options.quick else RANKS:
        with tempfile.TemporaryDirectory() as folder:
            work = functools.partial(measure, str(Path(folder) / "meeting"), options.quick)
            found, rate = af.launch(work, workers=ranks, threads=1)
        told += figures(ranks, found, rate)
    harness.report("allreduce", told, options)


if __name__ == "__main__":
    main()
