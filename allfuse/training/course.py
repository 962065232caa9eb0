"""The course of training from batch to batch: where it is, what comes with a step, when it ends."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from allfuse.base.errors import UserError
from allfuse.split.data import Learned, Loader, Portion
from allfuse.training.cursor import Cursor
from allfuse.training.learner import Learner
from allfuse.training.start import seed_all
from allfuse.training.wishes import INTERRUPT

if TYPE_CHECKING:
    from allfuse.base.events import Bus
    from allfuse.split.data import IterableLoader
    from allfuse.training.place import Place
    from allfuse.training.rounds import Rounds
    from allfuse.training.state import State
    from allfuse.training.step import Step
    from allfuse.training.stepper import Stepper


class Course:
    """Takes a session from batch to batch.

    A step is open from the moment its batch is handed out until it is closed: when the next batch
    is asked for, or as soon as a script asks for something that depends on it.

    Attributes:
        cursor: where training is.
        learned: what of later batches of the first loop was learned from already.
        last: this rank's part of the last batch that counted.
        fetched, fuse_weights, agree: how it takes a portion, fuses weights after a step on so many
            samples, and finds the strongest wish of all.
        told: called with every step that counts.
        interrupted: called when all ranks have heard of an interrupt; raises.
    """

    def __init__(
        self, place: Place, bus: Bus, state: State, stepper: Stepper, rounds: Rounds, seed: int
    ) -> None:
        self.place, self.bus, self.state = place, bus, state
        self.stepper, self.rounds, self.wishes = stepper, rounds, stepper.wishes
        self.cursor = Cursor()
        self.learned = Learned()
        self.last: Portion | None = None
        self.fetched: Callable[[], Portion | None] = self.next_portion
        self.fuse_weights: Callable[[float, int], None] = self._fuse_weights
        self.agree: Callable[[int], int] = rounds.agree
        self.told: Callable[[Step], None] = lambda step: None
        self.interrupted: Callable[[], None] = lambda: None
        self.loader: Loader | IterableLoader | None = None
        self._reading: Iterator[Portion] | None = None  # what it gives, from the cursor on
        self._turn: tuple[int, Loader | IterableLoader] | None = None
        self._seed = seed
        self._loops = 0
        stepper.before_forward = self._seed_stage
        self._in_loop = False
        self._stop: str | None = None
        self._end_of_loop: str | None = None

    @property
    def reason(self) -> str | None:
        """Why training ended, or the last loop; None while it goes on."""
        return self._stop or self._end_of_loop

    def end(self, reason: str) -> None:
        self._stop = self._stop or reason

    # Loops.

    def enter_loop(self) -> int:
        """The number of the loop that begins now.

        Raises:
            UserError: another one is under way.
        """
        if self._in_loop:
            raise UserError(
                "a loop over s.batches(...) is under way; allowed: one loop at a time; next: put "
                "data that belongs together into one data set"
            )
        self._in_loop, self._end_of_loop = True, None
        self._loops += 1
        return self._loops - 1

    def was_done(self, number: int) -> bool:
        """Whether a loop was over before the checkpoint that the run goes on from."""
        if number < self.cursor.loop:
            self._end_of_loop = "done before the run was resumed"
            return True
        return False

    def portions(
        self,
        number: int,
        loader: Loader | IterableLoader,
        epochs: int | None,
        steps: int | None,
    ) -> Iterator[Portion]:
        """This rank's part of each batch of a loop, of which a resumed run may have done some."""
        if number > self.cursor.loop:
            self.close_step()
            self.cursor = self.cursor.after_loop()
        self.loader = self.loader or loader  # another one, after a loss before the first step
        while not self._has_ended(epochs, steps):
            begin, self._reading = self.cursor, None
            while (portion := self.fetched()) is not None:
                self._open_step(portion)
                yield portion
                self.close_step()
                if self._has_ended(epochs, steps):
                    break
            if self.cursor is begin:  # the data has become shorter since the checkpoint
                self.cursor = begin.after_epoch()
        self.stepper.current = None

    def next_portion(self) -> Portion | None:
        """What comes at the cursor; None at the end of an epoch."""
        assert self.loader is not None
        if self._reading is None:
            if isinstance(self.loader, Loader) and self.cursor.loop == 0:
                self.loader.learned = self.learned
            self._reading = self.loader.epoch(self.cursor.epoch, self.cursor.step_in_epoch)
        return next(self._reading, None)

    def leave_loop(self) -> None:
        """However it ended. A batch that was left without learning from it is not used up."""
        self._in_loop, self._turn = False, None
        if self.loader is not None:
            self.loader.close()
        self.loader = self._reading = None
        step = self.stepper.current
        if step is not None and not step.learned and not step.counted:
            self.stepper.current = None

    def _has_ended(self, epochs: int | None, steps: int | None) -> bool:
        """Whether the loop is over, by its own limits or because training stops."""
        if steps is not None and self.cursor.loop_steps >= steps:
            self._end_of_loop = _are_done(self.cursor.loop_steps, steps, "step")
        elif epochs is not None and self.cursor.loop_epochs >= epochs:
            self._end_of_loop = _are_done(self.cursor.loop_epochs, epochs, "epoch")
        return self._stop is not None or self._end_of_loop is not None

    # Steps.

    def _open_step(self, portion: Portion) -> None:
        if self.place.world.has_process_groups:  # threads share one process's generators
            seed_all(self.place.device, self._seed, self.cursor.steps, self.place.replica_index)
        self.stepper.open(portion)

    def _seed_stage(self, stage: int, microbatch: int) -> None:
        """Before the forward pass of a stage: what it draws depends on these alone."""
        place = self.place
        if place.world.has_process_groups:
            key = (self._seed, self.cursor.steps, place.replica_index, stage, microbatch)
            seed_all(place.device, *key)

    def open_step_for(self, learner: Learner) -> Step:
        """The step that the next loss belongs to. Batches of the script's own open it."""
        step = self.stepper.current
        if step is not None and step.portion is None and learner in step.stepped:
            self.close_step()
        if step is None or (step.portion is None and step.counted):
            self._refuse_uncut()
            self.stepper.open(None)
        step = self.stepper.current
        assert step is not None
        return step

    def _refuse_uncut(self) -> None:
        if self.stepper.split.cuts and not self._loops:
            raise UserError(
                f"a step under {self.place.plan} on a batch of the script's own: where the model "
                "is cut is found out on the first samples of a loop; next: for batch in "
                "s.batches(...)"
            )

    def close_learned_step(self) -> None:
        """Close the open step if its batch was learned from; a batch just taken stays open."""
        step = self.stepper.current
        if step is not None and step.learned:
            self.close_step()

    def close_step(self) -> None:
        """Count the open step, fuse weights where a round is due, and tell what happened.

        A no-op when none is open.
        """
        step = self.stepper.count()
        if step is None:
            return
        portion = self.last = step.portion
        self.cursor = self.cursor.after(portion)
        self._take_turn()
        self.tell_step_number()
        ends_epoch = portion is not None and portion.last
        is_void = portion is not None and not any(portion.shares)  # it was learned from before
        stepped = self.state.learners if is_void else step.stepped
        for scheduler in self.state.schedulers:
            scheduler.after_step(stepped, ends_epoch)
        if step.figures is not None:
            self.wishes.hear(step.figures.stops)
        if self.rounds.active:
            samples = step.reference if step.learned else 0.0
            self.fuse_weights(samples, self.cursor.steps)
        self.told(step)
        self._maybe_stop(ends_epoch)

    def _maybe_stop(self, ends_epoch: bool) -> None:
        """Stop where all ranks know that one wishes to. Sites meet at rounds and ends of epochs,
        and hear of each other with what was fused in the background."""
        heard = self.wishes.heard
        if self.rounds.active:
            heard = self.rounds.wish
            if ends_epoch or self.rounds.due(self.cursor.steps):
                heard = self.agree(max(self.wishes.heard, self.wishes.own))
        if heard >= INTERRUPT:
            self.interrupted()
        if heard:
            self.end(self.wishes.reason)

    def _fuse_weights(self, samples: float, steps: int) -> None:
        self.rounds.after_step(samples, steps, self.state.models.values(), self.wishes.heard)

    # After a loss.

    def cut_anew(self, loader: Loader | IterableLoader, step: int) -> None:
        """Have another loader cut the batches, from a step on that no rank has done yet."""
        if self._turn is not None:
            self._turn[1].close()
        self._turn = (step, loader)
        self._take_turn()

    def _take_turn(self) -> None:
        if self._turn is None or self.cursor.steps < self._turn[0]:
            return
        if self.loader is not None:
            self.loader.close()
        self.loader, self._reading, self._turn = self._turn[1], None, None
        self.stepper.meet_peers()

    def open_again(self, batch: Any) -> Portion | None:
        """The open step from its beginning, without the learner that was under way.

        Where the script works on the `batch` that it was handed, and batches are cut anew from
        this step on, it is on this rank's new part, which is returned.
        """
        before = self.stepper.current
        assert before is not None
        portion = before.portion
        if portion is not None and batch is before.handed and self._reading is None:
            portion = self.next_portion()
        if portion is None:
            self.stepper.open(None)
        else:
            self._open_step(portion)
        step = self.stepper.current
        assert step is not None
        if portion is before.portion:
            step.group = before.group
        step.begin, step.handed, step.figures = before.begin, before.handed, before.figures
        step.stepped = before.stepped
        step.differentiated = list(before.stepped)
        return None if portion is before.portion else portion

    def tell_step_number(self) -> None:
        """To all that name the step: events, errors of links, reports of failures."""
        self.bus.step = self.place.world.step = self.cursor.steps
        if self.place.world.size > 1:
            for link in self.place.links:
                link.step = self.cursor.steps

    def measured(self) -> contextlib.AbstractContextManager[None]:
        """The weights that are measured, for a moment."""
        return self.rounds.fused_for_a_moment(self.state.models.values())

    # State.

    def capture(self) -> dict[str, Any]:
        learned = self.learned.after(self.cursor.steps).plain()
        return {"cursor": list(self.cursor), "rounds": self.rounds.capture(), "learned": learned}

    def is_in(self, state: dict[str, Any]) -> bool:
        """Whether the loop under way is the one that a state was captured in."""
        return Cursor(*state["cursor"]).loop == self._loops - 1

    def restore(self, state: dict[str, Any]) -> None:
        self.cursor = Cursor(*state["cursor"])
        self.learned = Learned(state.get("learned", ()))
        self.rounds.restore(state["rounds"], self.state.models.values())
        self.tell_step_number()


def _are_done(done: int, limit: int, what: str) -> str:
    told = "1 {} is done" if done == 1 else f"{done} {{}}s are done"
    return told.format(what) + (f", and {limit} were asked for" if done > limit else "")
