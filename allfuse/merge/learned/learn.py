"""Fuses models on disk by a method that looks at what they do with data."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from allfuse.base.errors import MergeError, UserError
from allfuse.base.tensors import count_rows
from allfuse.base.units import format_bytes
from allfuse.job import Job
from allfuse.merge.layout import Layout
from allfuse.merge.learned.base import Learned
from allfuse.merge.learned.ingredients import Ingredients, Tell, put
from allfuse.merge.likeness import refuse_unlike, refuse_untied
from allfuse.merge.loaded import build
from allfuse.merge.source import open_source
from allfuse.merge.tying import with_ties_of
from allfuse.merge.written import plan_model, write_model
from allfuse.split.data.generators import isolated
from allfuse.training.calibrate import estimate_statistics, norms_of
from allfuse.training.device import room_bytes


@dataclass(frozen=True, kw_only=True)
class LearnedMerge:
    """What is to be fused how, by data.

    Attributes:
        models: where they are. weights: of each, from 0. jobs: of each.
        base: what changes are counted from, for methods of changes.
        examples: samples of each model's data that are looked at.
        seed: of which samples, and of what is drawn.
        dtype: of the floating-point tensors that are written; None: that of base or first model.
        calibrate: whether the statistics of BatchNorm are estimated anew.
    """

    method: Learned
    models: Sequence[Path]
    jobs: Sequence[Job]
    weights: Sequence[float]
    base: Path | None = None
    examples: int = 256
    seed: int = 0
    dtype: str | None = None
    device: str = "cpu"
    calibrate: bool = True

    def __post_init__(self) -> None:
        n, name = len(self.models), self.method.name
        for what, given in (("weights", self.weights), ("jobs", self.jobs)):
            if len(given) != n:
                raise MergeError(f"{len(given)} {what} for {n} models; allowed: one for each")
        if min(self.weights) < 0 or not sum(self.weights) > 0:
            raise MergeError(
                f"weights {list(self.weights)}: {name} takes weights from 0, of which one is above"
            )
        if self.method.of_changes and self.base is None:
            raise MergeError(
                f"{name} fuses what models learned since a base, and there is none; next: --base"
            )
        if not self.method.of_changes and self.base is not None:
            raise MergeError(
                f"{name} fuses models as they are, and would not look at the base {self.base}; "
                "next: leave it out, or name it among the models"
            )
        if self.examples < 1:
            raise UserError(f"--examples {self.examples}: allowed: 1 or more")
        if self.device not in ("cpu", "cuda"):
            raise UserError(f"--device {self.device}: allowed: cpu, cuda")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise UserError("--device cuda: torch sees no GPU here; allowed: cpu")


def check(given: LearnedMerge, out: Path, overwrite: bool = False) -> dict[str, Any]:
    """What would be done, once it is known that it can be: no data and no weights are read.

    Raises:
        MergeError: models that cannot be fused, no room for the result or in memory.
    """
    mix, layout, held_bytes = _prepare(given, out, overwrite, lambda name, **data: None)
    return {
        "rule": str(given.method),
        "models": len(mix.sources),
        "tensors": len(layout.entries),
        "parameters": sum(entry.count for entry in layout.entries.values()),
        "files": len(layout.sizes),
        "examples": given.examples,
        "memory_bytes": held_bytes,
        "written_bytes": layout.bytes,
    }


def merge_learned(
    given: LearnedMerge,
    out: Path,
    *,
    overwrite: bool = False,
    tell: Tell = lambda name, **data: None,
) -> dict[str, Any]:
    """Fuse models on disk by what they do with data; what was done.

    `tell` hears "learning" (what, model, models, total) when something begins, "learned" (count) as
    it goes on, and "note" (text).

    Raises:
        MergeError: models that cannot be fused or read, no room, or `out` is there already.
        JobError, DataError: a job that cannot be used.
    """
    begin = time.monotonic()
    mix, layout, held_bytes = _prepare(given, out, overwrite, tell)
    tell(
        "note",
        text=f"{given.method}: at most {given.examples} samples of each model's data, about "
        f"{format_bytes(held_bytes)} in memory beside activations",
    )
    found = given.method.fuse(mix)
    module = mix.start()
    put(module, mix.mean() | found)
    if given.calibrate:
        _calibrate(mix, module)
    _refuse_infinite(module)
    state = module.state_dict()
    about = {"rule": str(given.method), "models": [str(model) for model in given.models]}
    write_model(
        mix.first,
        {name: state[name] for name in layout.entries},
        out,
        overwrite,
        given.dtype,
        made_of=(given.models, about),
    )
    return {
        "out": str(out),
        "tensors": len(layout.entries),
        "parameters": sum(entry.count for entry in layout.entries.values()),
        "written_bytes": layout.bytes,
        "seconds": time.monotonic() - begin,
    }


def _prepare(
    given: LearnedMerge, out: Path, overwrite: bool, tell: Tell
) -> tuple[Ingredients, Layout, int]:
    """All checks that need no numbers; and the bytes that will be held in memory."""
    sources = tuple(open_source(Path(path)) for path in given.models)
    base = None if given.base is None else open_source(Path(given.base))
    sources = tuple(with_ties_of(base or sources[0], source) for source in sources)
    mix = Ingredients(
        sources=sources,
        jobs=tuple(given.jobs),
        weights=tuple(given.weights),
        base=base,
        examples=given.examples,
        seed=given.seed,
        device=torch.device(given.device),
        tell=tell,
    )
    for other in sources:
        if other is not mix.first:
            refuse_unlike(mix.first, other)
    refuse_untied(mix.first, sources)
    places = [place for source in sources for place in source.places]
    layout = plan_model(mix.first, out, overwrite, given.dtype, places)
    held_bytes = given.method.held_bytes(build(given.jobs[0]), len(sources))
    _refuse_memory(held_bytes, mix)
    return mix, layout, held_bytes


def _refuse_memory(needed_bytes: int, mix: Ingredients) -> None:
    room = room_bytes(mix.device, 1)
    if room is not None and needed_bytes > room:
        raise MergeError(
            f"it takes about {format_bytes(needed_bytes)} in memory beside activations, and "
            f"{format_bytes(room)} are free on {mix.device.type}; next: a rule that streams from "
            "disk, such as ties, or a machine with more memory"
        )


def _calibrate(mix: Ingredients, module: nn.Module) -> None:
    """BatchNorm's statistics anew, on the data of all models."""
    if not norms_of(module):
        return
    several = {id(job): number for number, job in enumerate(mix.jobs)}.values()
    pairs = itertools.chain.from_iterable(
        ((number, batch) for batch in mix.batches(number, "BatchNorm's statistics"))
        for number in several
    )
    usable = (pair for pair in pairs if count_rows(pair[1]) > 1)  # one sample has no variance
    with isolated(mix.seed):
        count = estimate_statistics(
            module, usable, lambda module, pair: mix.forward(pair[0], module, pair[1])
        )
    mix.tell("note", text=f"statistics of {count} BatchNorm modules were estimated anew")


def _refuse_infinite(module: nn.Module) -> None:
    for name, value in module.state_dict().items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise MergeError(
                f"{name} of the fused model has numbers that are not finite; next: compare the "
                "models, or another method"
            )
