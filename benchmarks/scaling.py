"""Samples per second with 2 workers over 1, one thread each, of a model bound by computing.

The batch is the same with 1 and with 2 workers, as everywhere in allfuse. Beside it stands the
machine's own limit in the same run: two processes that each do the hand-written loop over half
the batch and never talk, over one such process with the whole batch.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import harness
import models
import torch
import torch.distributed as dist
from step import join

import allfuse as af

TARGET = 1.9
SECONDS = 80.0
TURN_S = 3.0
WORKERS = 2


def session_rate(seconds: float) -> float:
    """Runs in each worker: samples per second of all workers together."""
    case = models.CASES["wide"]
    batch = case.share * WORKERS
    with af.session(quiet=True) as session:
        ours = models.SessionLoop(session, case, case.data(), batch)
        rate = steps_per_second(ours.run, seconds) * batch
        session.stop("measured")
        ours.close()
    return rate


def alone_rate(seconds: float, meeting: str, workers: int, meets: bool) -> float:
    """Runs in each worker: samples per second of this one, which tells nobody anything."""
    case = models.CASES["wide"]
    batch = case.share * WORKERS
    loop = models.PlainLoop(models.build(case), case, case.data(), batch, workers, 0)
    loop.run(2)
    os.close(tempfile.mkstemp(dir=meeting)[0])
    while len(list(Path(meeting).iterdir())) < workers:  # begin together
        time.sleep(0.001)
    if not meets:
        return steps_per_second(loop.run, seconds) * (batch // workers)
    join(f"{meeting}.sum")
    number = torch.zeros(1)

    def run(steps: int) -> None:
        for _ in range(steps):
            loop.run(1)
            dist.all_reduce(number)

    return steps_per_second(run, seconds) * (batch // workers)


def steps_per_second(run: Callable[[int], None], seconds: float) -> float:
    """The rate of a fixed number of steps, equal on all workers, that take about so long."""
    run(2)
    steps = max(2, round(seconds / 0.16))  # about 0.1 s to 0.2 s a step
    begin = time.perf_counter()
    run(steps)
    return steps / (time.perf_counter() - begin)


def turn(name: str, seconds: float) -> float:
    """Samples per second of one contender, in fresh processes."""
    if name in ("one worker", "two workers"):
        workers = 1 if name == "one worker" else 2
        return float(af.launch(session_rate, seconds, workers=workers, threads=1))
    workers = 1 if name == "one process" else 2
    with tempfile.TemporaryDirectory() as folder:
        meeting = str(Path(folder) / "meeting")
        os.mkdir(meeting)
        meets = name == "two that meet"
        rate = af.launch(alone_rate, seconds, meeting, workers, meets, workers=workers, threads=1)
    return float(rate) * workers


def main() -> None:
    options = harness.parse_options(__doc__)
    seconds = 0.3 if options.quick else TURN_S
    names = ["one worker", "two workers", "one process", "two processes", "two that meet"]
    rates: dict[str, list[float]] = {name: [] for name in names}
    for number in harness.rounds_for(0.0 if options.quick else SECONDS, least=1):
        for name in names if number % 2 == 0 else reversed(names):
            rates[name].append(turn(name, seconds))
    told = ", ".join(f"{name} {harness.quartiles(rates[name])[1]:.0f}/s" for name in names)
    limit = harness.ratios(rates["two processes"], rates["one process"])
    lock_step = harness.ratios(rates["two that meet"], rates["one process"])
    scaling = harness.ratios(rates["two workers"], rates["one worker"])
    found = [
        harness.figure(
            "samples/s of 2 workers over 1",
            scaling,
            target=TARGET,
            better="higher",
            floor=f"limit in lock-step {harness.quartiles(lock_step)[1]:.3f}; {told}",
        ),
        harness.figure("samples/s of 2 processes that never talk over 1", limit, better="higher"),
        harness.figure(
            "samples/s of 2 processes that only meet after each step, over 1",
            lock_step,
            better="higher",
        ),
        harness.figure(
            "share of the limit in lock-step that is reached",
            harness.ratios(scaling, lock_step),
            better="higher",
        ),
    ]
    harness.report("scaling", found, options)


if __name__ == "__main__":
    main()
