"""A run that goes on over servers: from what those wrote last, or from any plan's checkpoint."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from allfuse.base.errors import CheckpointError
from allfuse.plan import Plan
from allfuse.roles.blueprint import Blueprint
from allfuse.roles.book import Book
from allfuse.roles.office import BOOK, SNAPSHOTS
from allfuse.roles.records import Order
from allfuse.roles.snapshots import Snapshots
from allfuse.roles.terms import terms_of
from allfuse.roles.versions import write_version
from allfuse.split.data import Learned
from allfuse.store.checkpoint import Checkpoints
from allfuse.store.run import RunFolder
from allfuse.training.keeper import trouble_with
from allfuse.training.served import read_state


def go_on(folder: RunFolder, facts: Mapping[str, Any], plan: Plan) -> list[str]:
    """Prepare a run's folder for scheduler and servers that go on with it: from their own files
    where those are of this plan and not older than the newest checkpoint, else from that.

    Args:
        facts: what the first worker said: `blueprint`, `parameters`, `unsaved`.

    Returns:
        What is wrong with newer checkpoints than the one that is taken.

    Raises:
        CheckpointError: it cannot be used, or there are some and none can.
    """
    checkpoints, troubles = Checkpoints(folder.checkpoints), []
    book, snapshots = folder.path / BOOK, folder.path / SNAPSHOTS
    found: int | None = None
    for step in checkpoints.steps():
        trouble = trouble_with(checkpoints, step)
        if trouble is None:
            found = step
            break
        troubles.append(f"the checkpoint of step {step} cannot be used: {trouble}")
    is_same = folder.record.get("plan") == str(plan) and book.exists()
    note = {} if found is None else checkpoints.read(found)[1]
    if is_same and plan.servers and (found is None or has_newer(snapshots, plan.servers, note)):
        return troubles
    if found is None:
        if troubles:
            raise CheckpointError(
                f"resume {folder.path}: none of its checkpoints can be used; "
                f"{'; '.join(troubles)}; next: a new run folder"
            )
        clear(book, snapshots)
        return ["there is no checkpoint yet: training starts at the beginning"]
    blueprint = Blueprint.from_plain(facts["blueprint"])
    names, unsaved = facts.get("parameters", ()), facts.get("unsaved", {})
    set_out(checkpoints, found, plan, blueprint, names, unsaved, book, snapshots)
    if _has_unsent(checkpoints.read(found)[0]):
        troubles.append(
            "what the codec of gradients had not sent before is left out: servers do not keep it; "
            "to have it, go on for a step under a plan in step without a codec"
        )
    return troubles


def _has_unsent(state: Mapping[str, Any]) -> bool:
    fusions = [fusion for fusion in state["fusions"] if fusion is not None]
    return any(bool(r.any()) for fusion in fusions for r in fusion["residuals"].values())


def has_newer(snapshots: Path, servers: int, note: Mapping[str, Any]) -> bool:
    """Whether all servers have a version on disk that is not before that of a checkpoint, of which
    this is the note."""
    kept = [set(Snapshots(snapshots, index, servers).all()) for index in range(servers)]
    common: set[int] = set.intersection(*kept)
    return max(common, default=-1) >= int(note.get("sequence", 0))


def clear(book: Path, snapshots: Path) -> None:
    """Remove what servers and scheduler left of another leg of the run."""
    for path in (book, book.with_name(f"{book.name}-wal"), book.with_name(f"{book.name}-shm")):
        path.unlink(missing_ok=True)
    shutil.rmtree(snapshots, ignore_errors=True)


def set_out(
    checkpoints: Checkpoints,
    step: int,
    plan: Plan,
    blueprint: Blueprint,
    names: Sequence[str | None],
    unsaved: Mapping[str, Tensor],
    book: Path,
    snapshots: Path,
) -> None:
    """Have scheduler and servers go on from a checkpoint: a new book, and a shard for each server.

    All of the checkpoint is in memory meanwhile, and one shard.

    Args:
        names: of the optimizer's parameters in its order, as servers call them; None: frozen.
        unsaved: buffers that no checkpoint holds, as a worker has built them.

    Raises:
        CheckpointError: it cannot be read, or is of another model.
    """
    state, _ = read_state(checkpoints, step)
    clear(book, snapshots)
    weights = weights_of(state, unsaved)
    kept = _kept_by_name(state, blueprint, names)

    def find(name: str) -> Tensor:
        if name not in weights:
            raise CheckpointError(f"the checkpoint of step {step} holds no {name}")
        return weights[name]

    write_version(snapshots, blueprint, plan.servers, 0, find, lambda name: kept.get(name, {}))
    _begin_book(book, state, plan)


def weights_of(state: Mapping[str, Any], unsaved: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All tensors of the models of a state, as servers call them."""
    several = len(state["models"]) > 1
    found = dict(unsaved)
    for prefix, model in state["models"].items():
        for name, value in model.items():
            if isinstance(value, Tensor):
                found[f"{prefix}.{name}" if several else name] = value
    return found


def _kept_by_name(
    state: Mapping[str, Any], blueprint: Blueprint, names: Sequence[str | None]
) -> dict[str, dict[str, Tensor]]:
    """What the optimizer of the servers keeps, by the names of tensors."""
    if any(group.pushed == "gradient" for group in blueprint.groups):
        states = state["optimizers"][0]["state"]
        named = {name: states.get(index, {}) for index, name in enumerate(names) if name}
    else:
        named = state.get("outer", {})
    return {
        name: {kind: value for kind, value in each.items() if isinstance(value, Tensor)}
        for name, each in named.items()
    }


def _begin_book(path: Path, state: Mapping[str, Any], plan: Plan) -> None:
    """A book whose first order is done: servers have the weights of sequence 0 on disk."""
    terms = terms_of(plan, timeout_s=0.0)
    whole = int(state["cursor"][0])
    learned = Learned(state.get("learned", ())).after(whole)
    rest = learned.rest(whole, terms.parts, terms.every // terms.fragments)
    book = Book(path)
    try:
        with book.transaction():
            book.put("begin", max(whole, learned.end))
            book.put("rest", [[list(each) for each in block] for block in rest])
            book.put("learned", learned.plain())
            book.put_order(Order(0, 0, [], [], [], save=True))
            for name, part in state["parts"].items():
                if _is_plain(part):
                    book.put_note(name, 0, part)
    finally:
        book.close()


def _is_plain(value: object) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(each) for key, each in value.items())
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str | bytes)
