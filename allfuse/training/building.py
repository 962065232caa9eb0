"""Builds models whose numbers come later: from the seed, or from a file, to each rank its own."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from allfuse.base.errors import JobError
from allfuse.split.building import build_without_memory
from allfuse.split.pending import Pending
from allfuse.store.weights import (
    Weights,
    find_differences,
    list_differences,
    open_weights,
    reader,
)
from allfuse.training.loading import MODEL_DIFFERS
from allfuse.training.start import (
    build_model,
    refuse_lazy,
    require_module,
    seeded,
    shape_of,
    spread,
    take_over,
)

if TYPE_CHECKING:
    from allfuse.job import Job
    from allfuse.training.place import Place
    from allfuse.training.recovery import Handed
    from allfuse.training.session import Session

Build = Callable[[], nn.Module] | nn.Module


def start_model(s: Session, build: Build, number: int, weights: str | Path | None) -> nn.Module:
    """A session's model, on its device, with the same weights on every rank; of one that ranks are
    to share, parameters get their numbers when it is cut.

    Raises:
        JobError: it is no module, or the weights do not fit. UserError, CheckpointError: there are
        no weights, or they cannot be read. DataError: ranks have different models.
    """
    seed, given = s.settings.seed + number, None if weights is None else open_weights(weights)
    if s.split.cuts or given is not None:
        model, pending = build_pending(build, seed)
    else:
        model = build_model(build, seed)
        pending = Pending(model, {})
    refuse_lazy(model)
    if given is not None:
        fit_weights(model, given, pending)
    pending.move(s.device)
    model.to(s.device)
    if s.place.plan.workers > 1:
        s.survival.compare(shape_of(model), MODEL_DIFFERS)
    if not s.split.cuts:
        pending.fill()
    _make_equal(s, model, pending)
    if len(pending):
        pending.guard()
        s.pending = pending
        s.choices["building"] = "each rank has its pieces of the weights, and one tensor at a time"
    elif s.split.cuts:
        s.choices["building"] = "the model was built whole on each rank before it was cut"
    return model


def _make_equal(s: Session, model: nn.Module, pending: Pending) -> None:
    """Give all ranks the numbers of the first one. Those that come later need not travel if they
    come from the same draws, or from the same file, everywhere."""
    held = dict(enumerate((*model.parameters(), *model.buffers())))

    def here() -> dict[int, Tensor]:
        return {key: tensor for key, tensor in held.items() if tensor not in pending}

    def work() -> bool:
        alike = not len(pending) or _are_alike(pending.digest, s.place)
        if not alike:
            pending.fill()
        spread([*here().values()], s.place.everyone)  # which is another after a loss
        return alike

    def hear(handed: Handed) -> bool:
        if not handed.result:
            pending.fill()
        take_over(here(), handed.state)
        return bool(handed.result)

    s.survival.together("all", work, hear=hear, give=here)


def _are_alike(digest: int, place: Place) -> bool:
    link = place.everyone
    slots = torch.zeros(link.size, dtype=torch.int64, device=place.device)
    slots[link.rank] = digest
    link.all_reduce(slots, "compare how the model was built").wait()
    seen: list[int] = slots.tolist()
    return len(set(seen)) == 1


def build_pending(build: Build, seed: int) -> tuple[nn.Module, Pending]:
    """A module whose large parameters get their numbers later, those that a plain seed gives; one
    that is built already has them."""
    if isinstance(build, nn.Module) or not callable(build):
        model = build_model(build, seed)
        return model, Pending(model, {})
    with seeded(seed):
        made, pending = build_without_memory(build)
    model = require_module(made)
    assert pending is not None
    return model, pending


def build_first(job: Job) -> nn.Module:
    """A job's model as training begins with it: of its seed, or with its weights."""
    if job.weights is None:
        return build_model(job.model, job.seed)
    model, pending = build_pending(job.model, job.seed)
    fit_weights(model, open_weights(job.weights), pending)
    pending.fill()
    return model


def fit_weights(model: nn.Module, weights: Weights, pending: Pending) -> None:
    """Have a model take its numbers from weights: those that come later then, the others at once.

    Raises:
        JobError: names, shapes or types differ; tells the first of them and how many.
    """
    told = differences(model, weights)
    if told:
        raise JobError(
            f"the weights of {weights.source} do not fit the model: {list_differences(told)}; "
            "allowed: the same names and shapes, and types that the model's hold; next: a model "
            "function that builds what the weights were made for, in their type"
        )
    take_weights(model, weights, pending)
    pending.digest = zlib.crc32(repr(sorted(weights.shapes.items())).encode())


def differences(model: nn.Module, weights: Weights) -> list[str]:
    """What is not alike in a model and in weights for it, in words."""
    return find_differences(_kept(model), _names(model), weights.shapes)


def take_weights(model: nn.Module, weights: Weights, pending: Pending) -> None:
    """The same for weights that fit."""
    by_name = dict(model.named_parameters(remove_duplicate=False))
    now = {}
    for name in _kept(model):
        parameter = by_name.get(name)
        if name not in weights.shapes:
            continue  # it has another name
        if parameter is not None and parameter in pending:
            pending.take(parameter, reader(weights, name))
        else:
            now[name] = weights.read(name)
    model.load_state_dict(now, strict=False)


def _kept(model: nn.Module) -> dict[str, Tensor]:
    """What a model's state dict holds, under all its names."""
    return {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}


def _names(model: nn.Module) -> Mapping[str, list[str]]:
    """Of each parameter's and buffer's name, all names of it."""
    found: dict[int, list[str]] = {}
    everything = (
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    )
    for name, tensor in everything:
        found.setdefault(id(tensor), []).append(name)
    return {name: found[id(tensor)] for name, tensor in everything}
