"""A run's updates executed one after the other, and compared with all that was seen of the run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from allfuse.job import Job
from allfuse.plan import Plan
from allfuse.roles.terms import terms_of
from allfuse.verify.central import Named
from allfuse.verify.distance import Yardstick
from allfuse.verify.history import Event, History, Update
from allfuse.verify.pupil import Lesson
from allfuse.verify.record import Reference
from allfuse.verify.round_table import RoundTable
from allfuse.verify.serial import Serial
from allfuse.verify.tally import END, Tally
from allfuse.verify.witness import Seen


@dataclass
class Played:
    """A run executed again.

    weights: at the end. held: what each worker had of them, which under a codec is less. yardstick:
    which has come to the end.
    """

    weights: Named
    held: dict[str, Named]
    yardstick: Yardstick


def replay(
    job: Job,
    plan: Plan,
    history: History,
    seen: Seen,
    tally: Tally,
    device: torch.device,
    tick: Callable[[], None] = lambda: None,
) -> Played:
    """Execute a run's updates one after the other, and compare all that was seen of it.

    tick: called before each update.
    """
    if history.gossip is not None:
        return replay_gossip(job, plan, history, seen, tally, device, tick)
    outer, terms = plan.outer, terms_of(plan, timeout_s=0.0)  # nothing is waited for
    assert outer is not None
    serial = Serial(job, outer, terms, plan.inner.replicas, device, history)
    yardstick = Yardstick(serial.parameters)
    readers: dict[tuple[str, int], list[Update]] = {}
    for update in history.updates:
        readers.setdefault((update.worker, update.read), []).append(update)
    last: dict[str, Named] = {}

    def learned(update: Update, lesson: Lesson) -> None:
        tick()
        compare_lesson(update, lesson, seen, tally)

    def arrived(event: Event, weights: Named, held: Mapping[str, Named]) -> None:
        yardstick.advance(weights)
        last.update(held)
        for worker, expected in held.items():
            for update in readers.get((worker, event.sequence), []):
                for rank, own in seen.weights(str(update.lease)).items():
                    sizes = yardstick.differences(own, expected)
                    tally.add_weights(str(update.first_step), rank, sizes)

    weights = serial.play(learned, arrived)
    workers = {
        rank: update.worker
        for update in history.updates
        for rank in seen.figures.get(update.lease, {})
    }
    for rank, own in seen.weights(END).items():
        expected = last.get(workers.get(rank, ""), weights)
        tally.add_weights(END, rank, yardstick.differences(own, expected))
    return Played(weights, last, yardstick)


def replay_gossip(
    job: Job,
    plan: Plan,
    history: History,
    seen: Seen,
    tally: Tally,
    device: torch.device,
    tick: Callable[[], None],
) -> Played:
    """`replay` where workers hold the weights themselves, and mix them."""
    table = RoundTable(job, plan, history, device)
    yardstick = Yardstick(table.parameters)
    collector = table.pupils.get(table.gossip.collector)
    updates = {update.lease: update for update in history.updates}

    def learned(worker: str, lease: int, lesson: Lesson) -> None:
        tick()
        if lease in updates:
            compare_lesson(updates[lease], lesson, seen, tally)
        if worker == table.gossip.collector:
            yardstick.advance(table.weights_of(worker))

    if collector is not None:
        yardstick.advance(table.weights_of(table.gossip.collector))
    weights = table.play(learned)
    yardstick.advance(weights)
    for rank, own in seen.weights(END).items():
        tally.add_weights(END, rank, yardstick.differences(own, weights))
    return Played(weights, {}, yardstick)


def compare_lesson(update: Update, lesson: Lesson, seen: Seen, tally: Tally) -> None:
    """Losses and norms of an update's steps, and what the scheduler was told of it."""
    last = update.first_step + update.steps
    told = update.loss / update.count if update.count > 0 else None
    expected = lesson.total / lesson.count if lesson.count > 0 else None
    if abs(update.count - lesson.count) > 1e-6 * lesson.count and expected is not None:
        told = None  # it is a mean over something else
    tally.add_figure("loss", last, update.number, told, expected)
    for rank, figures in seen.figures.get(update.lease, {}).items():
        if len(figures) != update.steps:
            tally.add_figure("loss", last, rank, None, expected)
        steps = range(update.first_step + 1, last + 1)
        for step, (loss, norm), own in zip(steps, figures, lesson.figures, strict=False):
            tally.add_figure("loss", step, rank, loss, None if own is None else own[0])
            tally.add_figure("gradient norm", step, rank, norm, None if own is None else own[1])


def compare_exactly(history: History, seen: Seen, reference: Reference, tally: Tally) -> Tally:
    """The same run and a plain loop over whole batches: losses, and weights before every step."""
    first = reference.weights("0", 0)
    yardstick: Yardstick | None = None
    for event in history.events:
        for update in event.updates:
            moment = str(update.first_step)
            for rank, own in seen.weights(str(update.lease)).items():
                if moment not in reference.kept:
                    continue
                expected = _of(own, reference.weights(moment, 0))
                yardstick = yardstick or Yardstick(set(_of(own, first)))
                yardstick.advance(expected)
                tally.add_weights(moment, rank, yardstick.differences(own, expected))
        count = sum(update.count for update in event.updates)
        if count > 0:
            step = event.updates[0].first_step + 1
            loss = sum(update.loss for update in event.updates) / count
            figures = reference.figures[step - 1][0]
            tally.add_figure("loss", step, 0, loss, None if figures is None else figures[0])
    for rank, own in seen.weights(END).items():
        expected = _of(own, reference.weights(END, 0))
        assert yardstick is not None
        yardstick.advance(expected)
        tally.add_weights(END, rank, yardstick.differences(own, expected))
    return tally


def _of(own: Mapping[str, Tensor], expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those of which there are both."""
    return {name: value for name, value in expected.items() if name in own}
