"""The course of training from lease to lease, where a scheduler hands out the work."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from allfuse.base.errors import Interrupted, UserError
from allfuse.roles.messages import INTERRUPTED
from allfuse.split.data import Loader, Portion
from allfuse.training.course import Course
from allfuse.training.cursor import Cursor
from allfuse.training.wishes import INTERRUPT, STOP

if TYPE_CHECKING:
    from allfuse.roles.messages import Lease
    from allfuse.split.data import IterableLoader
    from allfuse.training.apart import Apart
    from allfuse.training.step import Step


class LeasedCourse(Course):
    """A course whose batches come from leases."""

    def __init__(self, apart: Apart, *args: Any) -> None:
        super().__init__(*args)
        self.apart = apart
        self._has_stopped = self._is_interrupted = False
        self._steps_of_lease = 0  # that are done
        self._loader: Loader | None = None
        self._ahead: tuple[int, Iterator[tuple[int, Portion]]] | None = None  # of which lease
        apart.prepare = self._prepare

    def portions(
        self,
        number: int,
        loader: Loader | IterableLoader,
        epochs: int | None,
        steps: int | None,
    ) -> Iterator[Portion]:
        if number:
            raise UserError(
                f"a second loop over s.batches under {self.place.whole}: the scheduler hands out "
                "the work of one; next: a plan in step, or one session for each loop"
            )
        assert isinstance(loader, Loader)
        self._loader = loader
        self._take_lease()
        while not self.apart.is_over:
            lease = self.apart.lease
            assert lease is not None
            for step, portion in self._portions_of(lease):
                self._advance_schedulers(step, portion.epoch)
                self._open_step(portion)
                yield portion
                self.close_step()
                if self.apart.lease is not lease:
                    break
        self.stepper.current = None
        if self._was_interrupted():
            if self.apart.finishes:
                self.apart.save()
            raise Interrupted(
                f"interrupted after step {self.cursor.steps}; {self.apart.how_to_go_on()}"
            )

    def _was_interrupted(self) -> bool:
        """Whether this group asked for it, while it waited too, or the run ended because another
        one did: then what is left is no finished model."""
        lease = self.apart.lease
        told = lease is not None and lease.lease < 0 and lease.reason == INTERRUPTED
        return told or self._is_interrupted or self.wishes.own >= INTERRUPT

    def _prepare(self, lease: Lease) -> None:
        """Fetch the first batch of a lease while its weights are on their way."""
        if self._loader is not None:
            rest = self._read(self._loader, lease)
            self._ahead = lease.lease, itertools.chain([next(rest)], rest)

    def _portions_of(self, lease: Lease) -> Iterator[tuple[int, Portion]]:
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] == lease.lease:
            return ahead[1]
        assert self._loader is not None
        return self._read(self._loader, lease)

    def _read(self, loader: Loader, lease: Lease) -> Iterator[tuple[int, Portion]]:
        """The steps of a lease, counted from the first of the run, with their portions."""
        assert loader.steps_per_epoch is not None
        steps = range(lease.first_step, lease.first_step + lease.steps)
        places = [divmod(step, loader.steps_per_epoch) for step in steps]
        yield from zip(steps, loader.leased(places, lease.part, lease.parts), strict=True)

    def _advance_schedulers(self, step: int, epoch: int) -> None:
        for scheduler in self.state.schedulers:
            scheduler.advance(step, epoch)

    def _take_lease(self) -> None:
        """Count as done what all groups have learned; take in what was handed on."""
        lease = self.apart.lease
        assert lease is not None
        self.cursor = Cursor(steps=lease.done)
        self.tell_step_number()
        if lease.lease < 0:
            self._end_of_loop = lease.reason
        for name, state in lease.notes.items():
            if name in self.state.parts:
                self.state.parts[name].load_state_dict(state)

    def close_step(self) -> None:
        """Count the open step; after the last one of a lease hand the update in."""
        step = self.stepper.count()
        if step is None:
            return
        lease, portion = self.apart.lease, step.portion
        assert lease is not None
        assert portion is not None
        self.last = portion
        self.apart.count(step)
        self._hear_wishes(step)
        self.told(step)
        self._steps_of_lease += 1
        if self._steps_of_lease == lease.steps and lease.due:
            for name, part in self.state.parts.items():
                self.apart.note(name, part.state_dict())
        self.apart.after_step(self._steps_of_lease)
        if self._steps_of_lease == lease.steps:
            self._steps_of_lease = 0
            self._take_lease()

    def measured(self) -> contextlib.AbstractContextManager[None]:
        return self.apart.as_sent()

    def _hear_wishes(self, step: Step) -> None:
        """Pass on that somebody in this group wishes to stop."""
        if step.figures is not None:
            self.wishes.hear(step.figures.stops)
        heard = max(self.wishes.heard, self.wishes.own)
        if heard >= STOP and not self._has_stopped:
            self._has_stopped = True
            self._is_interrupted = heard >= INTERRUPT
            self.apart.stop(INTERRUPTED if self._is_interrupted else self.wishes.reason)

    def end(self, reason: str) -> None:
        """Ask that training ends; it does when all leases that are out have come in."""
        self._has_stopped = True
        self.apart.stop(reason)
