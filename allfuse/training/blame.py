"""Whose numbers are not finite."""

from __future__ import annotations

from collections.abc import Callable

from allfuse.base.errors import NonFiniteLoss
from allfuse.plan import Pipe
from allfuse.training.learner import Learner
from allfuse.training.place import Place


class Blame:
    """Says where numbers came up that are not finite, on all ranks in the same words.

    Args:
        how_to_go_on: words on what is safe on disk, told whether weights diverged.
    """

    def __init__(self, place: Place, how_to_go_on: Callable[[bool], str]) -> None:
        self.place, self.how_to_go_on = place, how_to_go_on

    def rank(self, member: int) -> str:
        """Which rank of the data axis it is, in words that all ranks of its replica say alike; of a
        group that a scheduler knows, of which worker."""
        plan = self.place.plan
        found, axis = self.place.sharers.members[member], plan.axis("pipe")
        if isinstance(axis, Pipe):  # where the loss was computed
            found = plan.peers(found, "pipe")[axis.teller]
        found = plan.peers(found, "tensor")[0]  # of those that computed the same
        rank = f" on rank {self.place.world.ids[found]}"
        if self._worker is None:
            return rank
        return f"{rank if self.place.sharers.size > 1 else ''} in worker {self._worker}"

    @property
    def _worker(self) -> int | None:
        """The group of a scheduler that this is; None without one."""
        crew = self.place.world.crew
        return None if crew is None or self.place.whole.outer is None else crew.index

    @property
    def group(self) -> str:
        """Which of those this is that step on their own, and so fail on their own, in words."""
        if self._worker is not None:
            return f" in worker {self._worker}"
        return f" in site {self.place.site.rank}" if self.place.site.size > 1 else ""

    def refusal(self, learner: Learner, what: str, value: float, where: str) -> NonFiniteLoss:
        """The error to raise of a value. Gradients are forgotten."""
        learner.forget()
        diverged = not all(bool(parameter.isfinite().all()) for parameter in learner.parameters)
        weights = (
            "the weights are not finite, since the gradient of a step before was not"
            if diverged
            else "the weights were not changed"
        )
        return NonFiniteLoss(
            f"{what} is {value}{where} at step {self.place.world.step or 0}; {weights}; "
            f"{self.how_to_go_on(diverged)}; next: a smaller learning rate, clip=1.0, or look at "
            "the samples of this step"
        )
