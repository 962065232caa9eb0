"""What a save in the background costs training, over what a blocking save of the same takes.

The state is a model and its AdamW, 100 MB together. Turns of some steps with one save are set
against turns without any; the difference is what a save costs, waits and slower steps included.
The blocking save is torch.save with flush and fsync, into the same folder. The store's own count of
the time that it held up the caller is shown beside it.

With 1 thread the second core is free to write; with as many threads as cores nothing is.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import models
import torch
from torch import nn

import allfuse as af

TARGET = 0.10
SECONDS = 38.0  # for each number of threads
STEPS = 16  # of a turn: about as long as a save takes in the background
WIDTH, LAYERS = 1176, 6


class Heavy(nn.Module):
    """8.3 million parameters, so 33 MB, and 66 MB more of AdamW."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU()) for _ in range(LAYERS)),
            nn.Linear(WIDTH, 10),
        )

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.layers(rows)


CASE = models.Case(
    name="heavy",
    model=Heavy,
    data=lambda: models.vectors(WIDTH),
    optimizer=models.adamw,
    share=16,
)


def save_blocking(path: Path, state: Any) -> None:
    """torch.save until the bytes are on the disk."""
    with path.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())


def measure(folder: Path, threads: int, quick: bool) -> dict[str, list[float]]:
    """Seconds of each turn (`with` a save, `without`), of the `blocking` saves, and as `counted`
    and `saved` by the store: how long it held up its caller, and until the save was whole. `cpu`
    in front: the processor time of the same, until the save is whole."""
    torch.set_num_threads(threads)
    steps = 3 if quick else STEPS
    names = ["with", "blocking", "without"]
    told = ("counted", "saved", "cpu with", "cpu without", "cpu blocking")
    seconds: dict[str, list[float]] = {name: [] for name in (*names, *told)}
    with af.session(out=folder / f"run{threads}", quiet=True, keep=1) as session:

        def note(_: Any, event: Any) -> None:
            seconds["counted"].append(event.data["stalled_seconds"])
            seconds["saved"].append(event.data["seconds"])

        session.on("saved", note)
        ours = models.SessionLoop(session, CASE, CASE.data(), CASE.share)

        def with_save() -> None:
            session.save()
            ours.run(steps)

        turns: dict[str, Callable[[], None]] = {
            "with": with_save,
            "without": lambda: ours.run(steps),
            "blocking": lambda: save_blocking(folder / "blocking.pt", state_of(session)),
        }
        ours.run(2)
        for number in harness.rounds_for(*((0.0, 2) if quick else (SECONDS, 4))):
            for name in names if number % 2 == 0 else reversed(names):
                begin, begin_cpu = time.perf_counter(), time.process_time()
                turns[name]()
                seconds[name].append(time.perf_counter() - begin)
                session.keeper.wait()  # so that no turn pays for the one before
                seconds[f"cpu {name}"].append(time.process_time() - begin_cpu)
        ours.close()
        return {name: values[1:] for name, values in seconds.items()}  # the first allocates


def state_of(session: Any) -> dict[str, Any]:
    """What an ordinary script saves."""
    return {
        "model": session.models["model"].state_dict(),
        "optimizer": session.learners[0].optimizer.state_dict(),
    }


def figures(
    seconds: dict[str, list[float]], threads: int, target: float | None
) -> list[harness.Figure]:
    """What a save costs by the clock of the loop, and by the store's own count."""
    blocking = statistics.median(seconds["blocking"])
    saved, turn = (statistics.median(seconds[name]) for name in ("saved", "without"))
    busy = seconds["cpu with"], seconds["cpu without"]
    cpu = statistics.median(seconds["cpu blocking"])
    paired = zip(seconds["with"], seconds["without"], strict=True)
    told = f"blocking save {blocking * 1e3:.0f} ms, in the background {saved * 1e3:.0f} ms"
    place = f"{threads} thread{'s' if threads > 1 else ''}"
    return [
        harness.figure(
            f"stall of a save over a blocking one, {place}",
            [(with_save - without) / blocking for with_save, without in paired],
            target=target,
            floor=f"{told}; a turn without it {turn * 1e3:.0f} ms",
        ),
        harness.figure(
            f"the same by the store's own count, {place}",
            [value / blocking for value in seconds["counted"]],
            floor="what a copy of the state takes is the least",
        ),
        harness.figure(
            f"processor time of a save over that of a blocking one, {place}",
            [(a - b) / cpu for a, b in zip(*busy, strict=True)],
            floor=f"a blocking save uses {cpu * 1e3:.0f} ms; training pays if no core is free",
        ),
    ]


def main() -> None:
    options = harness.parse_options(__doc__)
    cores = len(os.sched_getaffinity(0))
    found: list[harness.Figure] = []
    for threads in (1,) if options.quick or cores == 1 else (1, cores):
        with tempfile.TemporaryDirectory() as folder:
            seconds = measure(Path(folder), threads, options.quick)
        found += figures(seconds, threads, TARGET)
    harness.report("checkpoint", found, options)


if __name__ == "__main__":
    main()
