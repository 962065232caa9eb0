"""Fuses models on disk after their hidden units were brought into one order."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from allfuse.base.errors import MergeError, UserError
from allfuse.base.tensors import count_rows
from allfuse.job import Job, default_forward
from allfuse.merge.align.aligning import Aligner, check_way
from allfuse.merge.align.recording import state_of
from allfuse.merge.blocks import Files
from allfuse.merge.folder import LOCK, held, put_in_place, refuse_folder
from allfuse.merge.loaded import SourceWeights, batches, build, load
from allfuse.merge.merge import MEMORY_BYTES, choose_threads, merge, refuse_place
from allfuse.merge.origin import carry_job
from allfuse.merge.outline import Outline, outline
from allfuse.merge.recipe import Recipe
from allfuse.merge.source import Source, open_source
from allfuse.merge.written import write_model
from allfuse.split.data.generators import isolated
from allfuse.store.durable import explain
from allfuse.store.tensorfile import DTYPES
from allfuse.training.calibrate import estimate_statistics, norms_of

Tell = Callable[..., None]


@dataclass(frozen=True, kw_only=True)
class Alignment:
    """How models are aligned before they are fused.

    Attributes:
        how: "weights" or "activations".
        job: builds the module of all models, and has the data.
        examples: samples of its training data that are looked at.
        calibrate: whether the statistics of BatchNorm are estimated anew for the result.
    """

    how: str
    job: Job
    examples: int = 256
    calibrate: bool = True

    def __post_init__(self) -> None:
        check_way(self.how)
        if self.examples < 2:
            raise UserError(f"--examples {self.examples}: allowed: 2 or more to align models")


def check_aligned(
    recipe: Recipe,
    alignment: Alignment,
    out: Path,
    *,
    memory_bytes: int = MEMORY_BYTES,
    overwrite: bool = False,
) -> dict[str, Any]:
    """What would be aligned, once it is known that it can be. No numbers of the models are read;
    the job's module, as it is built, says which units there are.

    Raises:
        MergeError, JobError, DataError: as `merge_aligned`.
    """
    plan, aligner = _prepare(recipe, alignment, out, overwrite, memory_bytes)
    groups = aligner.groups.groups
    return {
        "rule": str(recipe.rule),
        "models": len(plan.sources),
        "tensors": len(plan.tasks),
        "parameters": sum(task.target.count for task in plan.tasks),
        "written_bytes": plan.written_bytes,
        "align": alignment.how,
        "groups": {group.name: group.size for group in groups},
        "units": sum(group.size for group in groups),
        "in_place": dict(aligner.groups.fixed),
    }


def merge_aligned(
    recipe: Recipe,
    alignment: Alignment,
    out: Path,
    *,
    memory_bytes: int = MEMORY_BYTES,
    threads: int | None = None,
    overwrite: bool = False,
    tell: Tell = lambda name, **data: None,
) -> dict[str, Any]:
    """Bring all models into the order of the base, or of the first, fuse them by the recipe's rule,
    and estimate the statistics of BatchNorm anew, for those of fused weights are others (Jordan et
    al. 2023, "REPAIR", arXiv:2211.08403); what was done.

    Takes memory for three models, and room on the disk for copies of those that are aligned, beside
    `out` under a name that begins with ".partial-". One that was killed begins anew.

    `tell` hears what `merge` tells, "aligning" (model, models) and "note" (text).

    Raises:
        MergeError: models that cannot be aligned or fused, no room, or `out` is there already.
        JobError, DataError: a job that cannot be used.
    """
    begin = time.monotonic()
    plan, aligner = _prepare(recipe, alignment, out, overwrite, memory_bytes)
    try:
        with _room(out) as folder:
            paths = _align(plan, aligner, folder, tell)
            result = folder / "result"
            done = merge(
                replace(recipe, models=paths),
                result,
                memory_bytes=memory_bytes,
                threads=threads,
                tell=tell,
            )
            if alignment.calibrate and norms_of(aligner.module):
                _calibrate(aligner.module, open_source(result), alignment, recipe.seed, tell)
            carry_job(recipe.models, result, _about(recipe, alignment))
            put_in_place(result, out)
    except OSError as error:
        raise MergeError(explain(error, out)) from error
    return asdict(done) | {
        "out": str(out),
        "align": alignment.how,
        "seconds": time.monotonic() - begin,
    }


def _prepare(
    recipe: Recipe, alignment: Alignment, out: Path, overwrite: bool, memory_bytes: int
) -> tuple[Outline, Aligner]:
    if recipe.is_stacked:
        raise MergeError("layers that are stacked have no common order; next: leave --align out")
    plan = outline(recipe)
    refuse_place(plan, out, overwrite)
    choose_threads(plan, memory_bytes, 1)
    copies = sum(_bytes(source) for source in plan.sources if source is not plan.first)
    refuse_folder([], plan.written_bytes + copies, out, overwrite)
    job = alignment.job
    module = build(job)
    if all(parameter.dtype != torch.float64 for parameter in module.parameters()):
        module.float()
    aligner = Aligner(
        module,
        lambda: batches(job, "train", alignment.examples, seed=recipe.seed),
        how=alignment.how,
        forward=job.forward,
        seed=recipe.seed,
    )
    return plan, aligner


def _bytes(source: Source) -> int:
    return sum(entry.bytes for name, entry in source.entries.items() if name not in source.tied)


@contextmanager
def _room(out: Path) -> Iterator[Path]:
    """A folder beside `out` that is removed at the end, and that nobody else works in."""
    with held(out.with_name(f".partial-aligned-{out.name}")) as folder:
        for left in folder.iterdir():  # by one that was killed
            if left.name != LOCK:
                shutil.rmtree(left)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _align(plan: Outline, aligner: Aligner, folder: Path, tell: Tell) -> list[Path]:
    """Write aligned copies of the models; where each is. The reference is where it was."""
    reference = _numbers(aligner.module, plan.first)
    paths = []
    for number, source in enumerate(plan.sources):
        if source is plan.first:
            paths.append(source.path)
            continue
        tell("aligning", model=number, models=len(plan.sources))
        orders = aligner.match(reference, _numbers(aligner.module, source))
        done = aligner.describe(orders)
        tell(
            "note",
            text=f"{source.path}: {done.moved:,} of {done.units:,} units in {done.groups} groups "
            "have another place",
        )
        with SourceWeights(source) as weights:
            own = {name: weights.read(name) for name in source.entries if name not in source.tied}
        paths.append(folder / str(number))
        write_model(source, aligner.groups.permute(own, orders), paths[-1])
    return paths


def _numbers(module: nn.Module, source: Source) -> dict[str, Tensor]:
    """A model's tensors by the module's names, all of them finite."""
    load(module, source)
    found = {name: tensor.detach().clone() for name, tensor in state_of(module).items()}
    for name, tensor in found.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise MergeError(
                f"{source.path}: {name} has numbers that are not finite, which cannot be aligned; "
                "next: take another checkpoint, or leave --align out"
            )
    return found


def _calibrate(
    module: nn.Module, made: Source, alignment: Alignment, seed: int, tell: Tell
) -> None:
    """BatchNorm's statistics anew, in the files of a result that has no name yet."""
    load(module, made)
    before = {name: tensor.clone() for name, tensor in module.named_buffers()}
    found = batches(alignment.job, "train", alignment.examples, seed=seed)
    usable = (batch for batch in found if count_rows(batch) > 1)  # one sample has no variance
    with isolated(seed):
        count = estimate_statistics(module, usable, alignment.job.forward or default_forward)
    with contextlib.closing(Files(Path())) as files:
        for name, tensor in module.named_buffers():
            entry = made.entries.get(name)
            if entry is not None and not torch.equal(tensor, before[name]):
                files.write(entry, 0, tensor.detach().to(DTYPES[entry.dtype]).flatten())
        files.sync()
    tell("note", text=f"statistics of {count} BatchNorm modules were estimated anew")


def _about(recipe: Recipe, alignment: Alignment) -> Mapping[str, Any]:
    """What a result is made of, in plain data."""
    return {
        "rule": str(recipe.rule),
        "models": [str(model) for model in recipe.models],
        "weights": list(recipe.weights),
        "base": None if recipe.base is None else str(recipe.base),
        "seed": recipe.seed,
        "align": alignment.how,
    }
