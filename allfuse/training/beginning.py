"""What a session does once, before its first step."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch

from allfuse.base.errors import DataError
from allfuse.split.data import Loader, Source, Stream
from allfuse.training.choosing import record_of, settle
from allfuse.training.keeper import SAME
from allfuse.training.loading import DATA_DIFFERS, Order, batch_size_of, refuse_unequal
from allfuse.training.parting import cut_model, stages_key

if TYPE_CHECKING:
    from allfuse.training.session import Session


def begin(
    s: Session,
    source: Source | Stream,
    loader: Any,
    order: Order,
    epochs: int | None,
    steps: int | None,
) -> None:
    """Once, before the first step: the run folder, the state to go on from, the first event."""
    if s.teller.began is not None:
        return
    size = batch_size_of(loader)
    s.survival.refuse_streams(source)
    if s.apart is not None:
        _join(s, source, loader, order, epochs, steps)
        return
    if s.plan.workers > 1 or s.keeper.path is not None:
        data = source.fingerprint()
        s.survival.compare(data, DATA_DIFFERS)
    model = s.state.fingerprint()
    cut_model(s, source, size)  # before there is a run folder: it may be refused
    if s.keeper.path is not None:
        facts = {
            "batch_size": size,
            "seed": s.settings.seed,
            "order": order.record(),
            "choices": s.choices,
            "device": str(s.device),
            "threads": torch.get_num_threads(),
            **s.state.kinds(),
        }
        s.keeper.begin(facts, {"data": data, "model": model})
        _record_stages(s)
    found = s.keeper.newest(s.survival.agree)
    if found is not None:
        s._restore(found)
    else:
        s.rounds.begin(s.models.values())
    if s.balance is not None:
        cursor = s.course.cursor
        here = (cursor.epoch, cursor.step_in_epoch)
        s.balance.begin(s.keeper.path, here, s.keeper.resume)
    _choose_topologies(s)
    s.course.tell_step_number()
    s.teller.start(source, size, loader.steps_per_epoch, epochs, steps)
    s.survival.losses.tell_of_restarts()
    for trouble in s.keeper.troubles:
        s.bus.emit("warning", text=trouble)
    if s.keeper.resume and found is None:
        text = "there is no checkpoint yet: training starts at the beginning"
        s.bus.emit("note", text=text)


def _record_stages(s: Session) -> None:
    """Where stages were found to begin, so that the run goes on with the same."""
    if s.split.begins:
        begins = [list(name) for name in s.split.begins]
        s.keeper.record(stages={**s.keeper.recorded("stages"), stages_key(s.plan): begins})


def _join(
    s: Session, source: Source | Stream, loader: Any, order: Order, epochs: int | None,
    steps: int | None,
) -> None:  # fmt: skip
    """The same where a scheduler hands out the work: it keeps the run folder, too."""
    apart, size = s.apart, batch_size_of(loader)
    assert apart is not None
    if not isinstance(loader, Loader) or size is None or loader.steps_per_epoch is None:
        raise DataError(
            f"{s.plan}: a scheduler hands out samples by their number, and this data has "
            "its own order; allowed: data sets with a length, without a sampler; next: a plan "
            "in step"
        )
    data = source.fingerprint()
    refuse_unequal(data, s.place, DATA_DIFFERS)
    prints = {"data": data, "model": s.state.fingerprint(), **s.keeper.fingerprints}
    kept = {
        "batch_size": size,
        "seed": s.settings.seed,
        "order": order.record(),
        "device": str(s.device),
        "threads": torch.get_num_threads(),
        **s.state.kinds(),
    }
    job_file = s.keeper.job_file
    apart.facts["job_file"] = None if job_file is None else str(job_file)
    apart.outline(s.state)
    cut_model(s, source, size)
    apart.facts["record"] = s.keeper.describe(kept, prints, s.plan)
    same = {name: apart.facts["record"].get(name) for name in SAME}
    about = s.teller.start(source, size, loader.steps_per_epoch, epochs, steps)
    apart.facts["start"] = {**about, "out": apart.facts["out"], "link": apart.link}
    apart.begin(
        s.state,
        s.split,
        steps_per_epoch=loader.steps_per_epoch,
        steps=steps,
        epochs=epochs,
        fingerprints={**prints, "same": json.dumps(same, sort_keys=True, default=str)},
    )


def _choose_topologies(s: Session) -> None:
    """Where the plan leaves them open and there is something to choose."""
    links = s.keeper.recorded("links")
    for name, fuser in s.place.fusers_by_axis.items():
        if fuser.auto is not None:
            if name == "site":
                blocks = s.rounds.blocks(s.models.values())
            else:
                blocks = [b.values for each in s.learners for b in each.fusion.buckets]
            text = settle(fuser.auto, blocks, links.get(name, {}))
            s.choices[f"topology of {name}"] = text
            links[name] = record_of(fuser.auto)
    if links:
        s.keeper.record(choices=s.choices, links=links)
