"""From kill -9 of a worker to the next update of another one, with servers, in and out of step.

Three workers and a server on this machine; what a step computes is slept (20 ms). Beside each
figure stands the usual time from one update of the others to the next.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import signal
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import harness
import torch
from torch import nn

import allfuse as af

STEP_S = 0.02
PLANS = {
    "in step": "data(3, topology=central(servers=1), min=1)",
    "sync=asp": "data(3, topology=central(servers=1), sync=asp, min=1)",
}
UPDATES = 60  # before the kill


def job(pids: str) -> af.Job:
    Path(pids, str(os.getpid())).touch()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3000, 8, generator=generator)

    def loss(outputs: torch.Tensor, batch: Any) -> torch.Tensor:
        time.sleep(STEP_S)
        return nn.functional.cross_entropy(outputs, batch[1])

    return af.Job(
        model=lambda: nn.Linear(8, 2),
        train=(x, (x.sum(1) > 0).long()),
        loss=loss,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        batch_size=30,
        save_every=None,
        stop=af.Stop(steps=100),
    )


def commits(events: Path) -> list[tuple[float, str]]:
    """When updates were ordered, and whose they were."""
    if not events.exists():
        return []
    lines = [line for line in events.read_text().splitlines() if line.endswith("}")]
    told = map(json.loads, lines)
    return [(each["time"], each["worker"]) for each in told if each["event"] == "commit"]


def measure(plan: str) -> tuple[float, float]:
    """Seconds from the kill to the next update, and those between two usual ones."""
    with tempfile.TemporaryDirectory() as folder:
        pids, out, killed = Path(folder) / "pids", Path(folder) / "run", [0.0]
        pids.mkdir()

        def kill() -> None:
            while len(commits(out / "events.jsonl")) < UPDATES:
                time.sleep(0.01)
            killed[0] = time.time()
            os.kill(int(next(pids.iterdir()).name), signal.SIGKILL)

        killer = threading.Thread(target=kill)
        killer.start()
        af.train(functools.partial(job, str(pids)), plan, out=out, quiet=True)
        killer.join()
        times = [when for when, _ in commits(out / "events.jsonl")]
    before = [when for when in times if when <= killed[0]]
    after = next(when for when in times if when > killed[0])
    usual = statistics.quantiles([b - a for a, b in itertools.pairwise(before)], n=20)
    return after - killed[0], usual[-1]


def main() -> None:
    options = harness.parse_options(__doc__)
    told = []
    for name, plan in PLANS.items():
        found = [measure(plan) for _ in range(1 if options.quick else 5)]
        told.append(
            harness.figure(
                f"{name}: from the kill to the next update",
                [seconds for seconds, _ in found],
                target=2.0,
                unit="s",
                floor=f"19 of 20 usual gaps are below {found[0][1] * 1e3:.0f} ms; worst "
                f"{max(seconds for seconds, _ in found) * 1e3:.0f} ms",
            )
        )
    harness.report("lost_worker", told, options)


if __name__ == "__main__":
    main()
