"""The course of training from batch to batch: where it is, what comes with a step, when it ends."""

from __future__ import annotations

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
    from allfuse.split.data import IterableLoader, Loader
    from allfuse.training.place import Place
    from allfuse.training.rounds import Rounds
    from allfuse.training.state import State
    from allfuse.training.stepper import Step, Stepper


class Course:
    """Takes a session from batch to batch.

    A step is open from the moment its batch is handed out until it is closed: when the next batch
    is asked for, or as soon as a script asks for something that depends on it.

    Attributes:
        cursor: where training is.
        learned: what of later batches of the first loop was learned from already.
        last: this rank's part of the last batch that counted.
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
        self.told: Callable[[Step], None] = lambda step: None
        self.interrupted: Callable[[], None] = lambda: None
        self._seed = seed
        self._loops = 0
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
        while not self._has_ended(epochs, steps):
            begin = self.cursor
            for portion in loader.epoch(begin.epoch, begin.step_in_epoch):
                self._open_step(portion)
                yield portion
                self.close_step()
                if self._has_ended(epochs, steps):
                    break
            if self.cursor is begin:  # the data has become shorter since the checkpoint
                self.cursor = begin.after_epoch()
        self.stepper.current = None

    def leave_loop(self) -> None:
        """However it ended. A batch that was left without learning from it is not used up."""
        self._in_loop = False
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
            seed_all(self.place.device, self._seed, self.cursor.steps, self.place.rank)
        self.stepper.open(portion)

    def open_step_for(self, learner: Learner) -> Step:
        """The step that the next loss belongs to. Batches of the script's own open it."""
        step = self.stepper.current
        if step is not None and step.portion is None and learner in step.stepped:
            self.close_step()
        if step is None or (step.portion is None and step.counted):
            self.stepper.open(None)
        step = self.stepper.current
        assert step is not None
        return step

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
        self.tell_step_number()
        ends_epoch = portion is not None and portion.last
        is_void = portion is not None and not any(portion.shares)  # it was learned from before
        stepped = self.state.learners if is_void else step.stepped
        for scheduler in self.state.schedulers:
            scheduler.after_step(step.stepped, ends_epoch)
        if step.figures is not None:
            self.wishes.hear(step.figures.stops)
        if self.rounds.active:
            samples = self.stepper.reference(portion) if step.learned else 0.0
            models = self.state.models.values()
            self.rounds.after_step(samples, self.cursor.steps, models, self.wishes.heard)
        self.told(step)
        self._maybe_stop(ends_epoch)

    def _maybe_stop(self, ends_epoch: bool) -> None:
        """Stop where all ranks know that one wishes to. Sites meet at rounds and ends of epochs,
        and hear of each other with what was fused in the background."""
        heard = self.wishes.heard
        if self.rounds.active:
            heard = self.rounds.wish
            if ends_epoch or self.rounds.due(self.cursor.steps):
                heard = self.rounds.agree(max(self.wishes.heard, self.wishes.own))
        if heard >= INTERRUPT:
            self.interrupted()
        if heard:
            self.end(self.wishes.reason)

    def tell_step_number(self) -> None:
        """To all that name the step: events, errors of links, reports of failures."""
        self.bus.step = self.place.world.step = self.cursor.steps
        if self.place.world.size > 1:
            for link in self.place.links:
                link.step = self.cursor.steps

    # State.

    def capture(self) -> dict[str, Any]:
        return {"cursor": list(self.cursor), "rounds": self.rounds.capture()}

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
