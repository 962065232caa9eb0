"""Four workers, one of them four times as slow: samples per second and time to a fixed loss.

Computing is emulated by sleeping (see straggler_job.py): these figures are of waiting, not of
processors. Against DistributedDataParallel over gloo in the same run, on the same batches of
digits, each at a learning rate that suits it (an asynchronous push is a step of its own). The loss
is the one at which DDP has made 90 % of its gain.
"""

from __future__ import annotations

import functools
import json
import math
import tempfile
from pathlib import Path

import harness
import straggler_job as job

import allfuse as af

DDP = "DDP"
STEPS, ROUNDS = 160, 3
GAIN = 0.9
Curve = list[tuple[float, int, float]]

CONTENDERS: dict[str, float] = {  # learning rates: DDP's is the best of 0.05, 0.1, 0.2, 0.4, 0.8
    DDP: 0.2,
    "data(4)": 0.2,
    "data(4, balance=speed)": 0.2,
    "data(4, topology=central(servers=1), sync=ssp(3))": 0.05,
    "data(4, topology=central(servers=1), sync=asp)": 0.025,
    "site(4, every=4, topology=central(servers=1), sync=asp)": 0.2,
}
ASP, BALANCED = "data(4, topology=central(servers=1), sync=asp)", "data(4, balance=speed)"


def train(name: str, steps: int) -> Curve:
    """A contender's course: (seconds since its first step, batches of all, held-out loss)."""
    lr = CONTENDERS[name]
    if name == DDP:
        work = functools.partial(job.train_ddp, lr, steps)
        found: Curve = af.launch(work, workers=job.WORKERS, threads=1)
        return found
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        made = functools.partial(job.job, lr, steps)
        af.train(made, name, out=out, quiet=True)
        return read(out / "events.jsonl")


def read(events: Path) -> Curve:
    curve: Curve = []
    begin = math.nan
    for line in events.read_text().splitlines():
        event = json.loads(line)
        if event["event"] == "step" and math.isnan(begin):
            begin = event["time"]
        if event["event"] == "evaluated":
            curve.append((event["time"] - begin, event["step"], event["metrics"]["loss"]))
    return curve


def speed(curve: Curve) -> float:
    """Samples per second of the whole course."""
    seconds, steps, _ = curve[-1]
    return (steps - 1) * job.BATCH / seconds


def seconds_to(curve: Curve, loss: float) -> float:
    return next((seconds for seconds, _, value in curve if value <= loss), math.inf)


def main() -> None:
    options = harness.parse_options(__doc__)
    steps, rounds = (40, 1) if options.quick else (STEPS, ROUNDS)
    curves: dict[str, list[Curve]] = {name: [] for name in CONTENDERS}
    for number in range(rounds):
        for name in CONTENDERS if number % 2 == 0 else reversed(list(CONTENDERS)):
            curves[name].append(train(name, steps))
            print(f"round {number + 1}/{rounds}: {name}: {speed(curves[name][-1]):.0f} samples/s, "
                  f"loss {curves[name][-1][-1][2]:.3f}", flush=True)  # fmt: skip
    harness.report("straggler", figures(curves), options)


def figures(curves: dict[str, list[Curve]]) -> list[harness.Figure]:
    first = math.log(10)  # of ten classes that nobody has seen
    last = min(value for curve in curves[DDP] for _, _, value in curve)
    loss = first - GAIN * (first - last)
    ideal = (job.WORKERS - 1 + 1 / job.TIMES) / (job.WORKERS / job.TIMES)
    told = []
    for name, found in curves.items():
        if name == DDP:
            continue
        target = {ASP: 2.5, BALANCED: 2.0}.get(name)
        told.append(
            harness.figure(
                f"{name}: samples/s over DDP's",
                harness.ratios(map(speed, found), map(speed, curves[DDP])),
                target=target,
                better="higher",
                floor=f"{speed(found[0]):.0f} and {speed(curves[DDP][0]):.0f} samples/s (sleep); "
                f"all workers busy: {ideal:.2f}x",
            )
        )
        times = [seconds_to(curve, loss) for curve in found]
        bare = [seconds_to(curve, loss) for curve in curves[DDP]]
        told.append(
            harness.figure(
                f"{name}: DDP's time to loss {loss:.3f} over its own",
                harness.ratios(bare, times),
                better="higher",
                floor=f"{times[0]:.1f} s and {bare[0]:.1f} s; at the end, at equal samples, loss "
                f"{found[0][-1][2]:.3f} and {curves[DDP][0][-1][2]:.3f}",
            )
        )
    best = max(
        (figure for figure in told if "time to loss" in figure.name), key=lambda each: each.value
    )
    told.append(
        harness.Figure(
            name="the best policy: DDP's time to the loss over its own",
            value=best.value,
            spread=best.spread,
            target=2.0,
            better="higher",
            floor=best.name.partition(":")[0],
            rounds=best.rounds,
        )
    )
    return told


if __name__ == "__main__":
    main()
