"""How far training is, and which batch comes next."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from allfuse.split.data import Portion


class Cursor(NamedTuple):
    """A place in a run. A loop is one call of `Session.batches`; a run may have several in a row.

    steps: optimizer steps done. epoch, step_in_epoch: the next batch; epochs are counted over all
    loops, so that each has an order of samples of its own. epoch_of_last: that of the last batch.
    loop: the loop under way, counted from 0. loop_steps, loop_epochs: what is done of it.
    """

    steps: int = 0
    epoch: int = 0
    step_in_epoch: int = 0
    epoch_of_last: int = 0
    loop: int = 0
    loop_steps: int = 0
    loop_epochs: int = 0

    def after(self, portion: Portion | None) -> Cursor:
        """One step further. An epoch's last batch leads to the next epoch."""
        steps, loop_steps = self.steps + 1, self.loop_steps + 1
        if portion is None:  # a batch of the script's own
            return self._replace(steps=steps)
        epoch, loop, done = portion.epoch, self.loop, self.loop_epochs
        if portion.last:
            return Cursor(steps, epoch + 1, 0, epoch, loop, loop_steps, done + 1)
        return Cursor(steps, epoch, portion.step + 1, epoch, loop, loop_steps, done)

    def after_epoch(self) -> Cursor:
        """The beginning of the next epoch, where this one has no batch left."""
        return self._replace(
            epoch=self.epoch + 1, step_in_epoch=0, loop_epochs=self.loop_epochs + 1
        )

    def after_loop(self) -> Cursor:
        """The beginning of the next loop, in an epoch that no loop has begun yet."""
        epoch = self.epoch + (self.step_in_epoch > 0)
        return Cursor(self.steps, epoch, 0, self.epoch_of_last, self.loop + 1)
