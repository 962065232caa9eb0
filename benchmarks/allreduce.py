"""Sums and messages between the ranks of one host against gloo, for sizes from 400 B to 100 MB.

2, 4 and 8 ranks with 1 thread each; both sides move the same tensors in the same processes and take
turns. Ours is the link that a session takes there, shared memory. In a round of messages each rank
sends to the next one and receives from the one before.

Beside each figure stands what part of the machine's copy bandwidth it reaches: the bytes that all
ranks must at least read and write (in a sum each its own block, and the n-th parts of all; in a
message the block on both sides), over the rate at which as many processes as there are cores copy
100 MB at the same time.
"""

from __future__ import annotations

import functools
import os
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import harness
import torch
import torch.distributed as dist
from step import join

import allfuse as af

if TYPE_CHECKING:
    from allfuse.link import Link

RANKS = (2, 4, 8)
SIZES = (4_000, 64_000, 1_000_000, 10_000_000, 100_000_000)  # bytes of float32
MESSAGE_SIZES = (400, 4_000, 1_000_000, 20_000_000)
SECONDS = 2.0  # of each size
TURN_BYTES = 2e7  # that a turn sums, over several calls
MOST_CALLS = 50


class Found(NamedTuple):
    """What each side takes for each size, and the rate of copies."""

    sums: dict[int, dict[str, harness.Turns]]
    messages: dict[int, dict[str, harness.Turns]]
    rate: float


def measure(meeting: str, quick: bool) -> Found:
    """Runs in each rank."""
    from allfuse.launcher import current_world

    join(meeting)
    world = current_world()
    assert world is not None
    link = world.link("benchmark", tuple(range(world.size)), torch.device("cpu"))
    return Found(
        {size: compare(sums(link, size), size, quick) for size in few(SIZES, quick)},
        {size: compare(messages(link, size), size, quick) for size in few(MESSAGE_SIZES, quick)},
        copy_rate(world.rank, quick),
    )


def few(sizes: tuple[int, ...], quick: bool) -> tuple[int, ...]:
    return sizes[:2] if quick else sizes


def sums(link: Link, size: int) -> dict[str, Callable[[], object]]:
    """A sum of so many bytes, by each side."""
    ours, theirs = torch.zeros(size // 4), torch.zeros(size // 4)
    return {
        "allfuse": lambda: link.all_reduce(ours, "sum").wait(),
        "gloo": lambda: dist.all_reduce(theirs),
    }


def messages(link: Link, size: int) -> dict[str, Callable[[], object]]:
    """A message of so many bytes to the next rank and one from the rank before, by each side."""
    block, found = torch.zeros(size // 4), torch.zeros(size // 4)
    after, before = (link.rank + 1) % link.size, (link.rank - 1) % link.size

    def ours() -> None:
        works = link.receive(found, before, "message"), link.send(block, after, "message")
        for work in works:
            work.wait()

    def theirs() -> None:
        works = dist.irecv(found, before), dist.isend(block, after)
        for work in works:
            work.wait()

    return {"allfuse": ours, "gloo": theirs}


def compare(
    sides: dict[str, Callable[[], object]], size: int, quick: bool
) -> dict[str, harness.Turns]:
    """What one call of each side takes, in turns of several calls."""
    calls = max(1, min(MOST_CALLS, int(TURN_BYTES / size)))

    def repeat(call: Callable[[], object]) -> None:
        for _ in range(calls):
            call()

    turns = {name: functools.partial(repeat, call) for name, call in sides.items()}
    warm = harness.interleave(turns, 1, dist.barrier)
    one_round = torch.tensor(sum(turn.wall_s[0] for turn in warm.values()))
    dist.broadcast(one_round, 0)
    rounds = 2 if quick else max(3, min(40, int(SECONDS / float(one_round))))
    timed = harness.interleave(turns, rounds, dist.barrier)
    return {name: turn.each(calls) for name, turn in timed.items()}


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


def figures(ranks: int, found: Found) -> list[harness.Figure]:
    told = []
    for size, turns in found.sums.items():
        least = ranks * 2 * size + (ranks + 1) * size  # read and write each block; the sums
        target = 0.5 if ranks == 4 and size >= 1_000_000 else 1.0
        told.append(figure(f"{ranks} ranks, {name_of(size)}", turns, least / found.rate, target))
    for size, turns in found.messages.items():
        floor_s = ranks * 2 * size / found.rate
        told.append(figure(f"{ranks} ranks, messages of {name_of(size)}", turns, floor_s, 1.0))
    return told


def name_of(size: int) -> str:
    return f"{size / 1e6:g} MB"


def figure(
    name: str, turns: dict[str, harness.Turns], floor_s: float, target: float
) -> harness.Figure:
    ours, theirs = turns["allfuse"].wall_s, turns["gloo"].wall_s
    return harness.figure(
        f"{name}: time over gloo's",
        harness.ratios(ours, theirs),
        target=target,
        floor=f"allfuse {harness.milliseconds(ours)}, gloo {harness.milliseconds(theirs)}; "
        f"{floor_s / statistics.median(ours):.0%} of the copy bandwidth",
    )


def main() -> None:
    options = harness.parse_options(__doc__)
    told: list[harness.Figure] = []
    for ranks in RANKS[:1] if options.quick else RANKS:
        with tempfile.TemporaryDirectory() as folder:
            work = functools.partial(measure, str(Path(folder) / "meeting"), options.quick)
            found = af.launch(work, workers=ranks, threads=1)
        told += figures(ranks, found)
    harness.report("allreduce", told, options)


if __name__ == "__main__":
    main()
