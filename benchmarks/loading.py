"""What a rank needs to come by its part of a model: from a seed, from a file, from a checkpoint.

The most memory that a rank has from before the model is built until the first batch, over what the
whole model takes, beside its part and the largest tensor, and beside a model that is built whole
before it is cut.

python benchmarks/loading.py [--quick]
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import models
import torch
from split import SMALL, Decoder, resident, warm_up
from torch import nn

import allfuse as af
from allfuse.plan import as_plan
from allfuse.store.tensorfile import write_model
from allfuse.training.start import build_model

LARGE = functools.partial(Decoder, 768, 16, 12)
"""113 million parameters."""
PLANS = ("shard(4)", "tensor(4)", "pipe(4)")


def peak_bytes(
    quick: bool, weights: str | None, out: str | None, whole: bool
) -> tuple[float, float]:
    """Runs in each worker: the most bytes that it has until the first batch, and those then."""
    from allfuse.launcher import current_world

    world = current_world()
    assert world is not None
    build: Any = SMALL if quick else LARGE
    data = models.texts()
    warm_up()
    with af.session(quiet=True, out=out, resume="auto") as session:
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak is that from here on
        model = session.model(build_model(build, 0) if whole else build, weights=weights)
        session.optimizer(models.adamw(model))
        peak = left = 0
        for _ in session.batches(data, batch_size=4, steps=10):
            peak, left = resident("VmHWM") - before, resident("VmRSS") - before
            break
        told = torch.zeros(world.size, dtype=torch.float64)
        told[session.place.mates.rank] = peak
        session.place.mates.all_reduce(told, "tell the peaks").wait()
    return float(told.max()), float(left)


def save_run(quick: bool, out: str) -> None:
    """Runs in each worker: one step, and a checkpoint."""
    case = models.Case(
        name="decoder",
        model=SMALL if quick else LARGE,
        data=models.texts,
        optimizer=models.adamw,
        share=4,
    )
    with af.session(quiet=True, out=out) as session:
        model = session.model(case.model)
        session.optimizer(models.adamw(model))
        for batch in session.batches(case.data(), batch_size=4, steps=1):
            session.step(batch, models.loss_of)
        session.save(block=True)


def count_bytes(build: Callable[[], nn.Module]) -> tuple[int, int]:
    """Of a model: all of its parameters, and the largest of them."""
    with torch.device("meta"):
        sizes = [parameter.nbytes for parameter in build().parameters()]
    return sum(sizes), max(sizes)


def figures(quick: bool, folder: Path) -> list[harness.Figure]:
    build: Any = SMALL if quick else LARGE
    total, largest = count_bytes(build)
    weights = folder / "weights.safetensors"
    write_model(weights, build_model(build, 1).state_dict())
    found = []
    for plan in PLANS[: 1 if quick else None]:
        n = as_plan(plan).workers
        launch = functools.partial(af.launch, workers=n, plan=plan, threads=1)
        out = folder / plan
        ways: dict[str, tuple[str | None, str | None, int]] = {
            "from a seed": (None, None, 1),
            "from a file": (str(weights), None, 1),
        }
        if plan == PLANS[0]:
            launch(functools.partial(save_run, quick, str(out)))
            ways["from a checkpoint"] = (None, str(out), 3)
        old, _ = launch(functools.partial(peak_bytes, quick, None, None, True))
        for name, (file, run, copies) in ways.items():
            peak, _ = launch(functools.partial(peak_bytes, quick, file, run, False))
            part = copies * total / n
            found.append(
                harness.figure(
                    f"{plan}: most memory of a rank to begin {name}, over the whole weights",
                    [peak / total],
                    target=None if quick else round((part + largest) / total + 0.1, 2),
                    floor=f"{peak / 1e6:.0f} of {total / 1e6:.0f} MB; its part is "
                    f"{part / 1e6:.0f}, the largest tensor {largest / 1e6:.0f} MB; built whole "
                    f"before it is cut {old / 1e6:.0f} MB",
                )
            )
    return found


def main() -> None:
    options = harness.parse_options(__doc__)
    with tempfile.TemporaryDirectory() as folder:
        harness.report("loading", figures(options.quick, Path(folder)), options)


if __name__ == "__main__":
    main()
