"""From kill -9 of a worker to the next update of those that are left.

Three workers on this machine, by themselves (`--on-loss continue`) or with a server; what a step
computes is slept (20 ms). Beside each figure stands the usual time from one update to the next.
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
    "data(3)": "data(3)",
    "data(3), the first worker": "data(3)",
    "site(3, every=5)": "site(3, every=5)",
    "a server, in step": "data(3, topology=central(servers=1), min=1)",
    "a server, sync=asp": "data(3, topology=central(servers=1), sync=asp, min=1)",
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
        stop=af.Stop(steps=150),
    )


def updates(events: Path, kind: str) -> list[float]:
    """When updates were made: servers tell of "commit"s, others of "step"s."""
    if not events.exists():
        return []
    lines = [line for line in events.read_text().splitlines() if line.endswith("}")]
    return [each["time"] for each in map(json.loads, lines) if each["event"] == kind]


def measure(plan: str, first: bool) -> tuple[float, float]:
    """Seconds from the kill to the next update, and those between two usual ones.

    Args:
        first: kill the first worker that was started; else the last.
    """
    kind = "commit" if "servers" in plan else "step"
    with tempfile.TemporaryDirectory() as folder:
        pids, out, killed = Path(folder) / "pids", Path(folder) / "run", [0.0]
        pids.mkdir()

        def kill() -> None:
            while len(updates(out / "events.jsonl", kind)) < UPDATES:
                time.sleep(0.01)
            workers = sorted(int(path.name) for path in pids.iterdir())  # in the order of the forks
            killed[0] = time.time()
            os.kill(workers[0 if first else -1], signal.SIGKILL)

        killer = threading.Thread(target=kill)
        killer.start()
        af.train(functools.partial(job, str(pids)), plan, out=out, quiet=True, on_loss="continue")
        killer.join()
        times = updates(out / "events.jsonl", kind)
    before = [when for when in times if when <= killed[0]]
    after = next(when for when in times if when > killed[0])
    usual = statistics.quantiles([b - a for a, b in itertools.pairwise(before)], n=20)
    return after - killed[0], usual[-1]


def main() -> None:
    options = harness.parse_options(__doc__)
    told = []
    for name, plan in PLANS.items():
        found = [measure(plan, "first" in name) for _ in range(1 if options.quick else 5)]
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
