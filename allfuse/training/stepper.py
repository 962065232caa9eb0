"""One step of training on one rank: losses in, fused gradients of the whole batch out."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from allfuse.base.errors import NonFiniteLoss
from allfuse.split.data import Portion
from allfuse.training.exchange import Exchange, Figures, Pending
from allfuse.training.learner import Learner
from allfuse.training.place import Place

NORM_EVERY_S = 0.25  # how often the gradient's norm is taken only to be shown


@dataclass
class Step:
    """A step under way, or the one done last."""

    portion: Portion | None
    begin: float = field(default_factory=time.perf_counter)
    losses: list[Tensor] = field(default_factory=list)
    count: float = 0.0
    pending: Pending | None = None
    figures: Figures | None = None
    norm: float | None = None
    work_s: float = 0.0


class Stepper:
    """Weighs the losses of a rank, so that the sum over ranks is the gradient of the whole batch.

    Each rank differentiates (sum of its losses) / reference, where the reference is the number of
    samples of the whole batch, known beforehand. If the losses are means over something else
    (tokens), the fused gradients are corrected by reference / (true total count), which the
    exchange has told by then; for means over samples that factor is exactly 1 and nothing is done.
    """

    def __init__(self, place: Place, clip: float | None) -> None:
        self.place, self.clip = place, clip
        self.group = [place.plan.replica_index(member) for member in place.data.members]
        self.exchange = Exchange(place.data, place.device)
        self.always_norm = False
        self.current: Step | None = None
        self._busy_s = 0.0
        self._norm_time = -math.inf

    def open(self, portion: Portion | None) -> Step:
        self.current = Step(portion)
        return self.current

    def close(self) -> Step | None:
        """The open step, done; None when there is none."""
        step, self.current = self.current, None
        if step is not None:
            self._busy_s = step.work_s
        return step

    def reference(self, portion: Portion | None) -> float:
        """Samples of the whole batch in this rank's data axis; 1 a rank when nobody knows."""
        if portion is None:
            return float(self.place.data.size)
        return float(sum(portion.shares[index] for index in self.group))

    def differentiate(
        self, learner: Learner, total: Tensor, count: float, *, last: bool, wish: int
    ) -> None:
        """Add the gradients of a sum of losses; with `last` tell the peers loss, count and wish."""
        step = self.current or self.open(None)
        takes_part = step.portion is None or step.portion.rows > 0
        step.losses.append(total.detach())
        step.count += count
        if last:
            said = math.fsum(float(value) for value in step.losses)
            said = said if takes_part or not math.isfinite(said) else 0.0
            step.pending = self.exchange.start(
                said, step.count if takes_part else 0.0, self._busy_s, wish
            )
        weight = 1.0 if takes_part else 0.0
        learner.backward(total * (weight / self.reference(step.portion)), last)

    def finish(self, learner: Learner, refuse: Callable[[str, float, int], Exception]) -> Figures:
        """Wait for exchange and fusions, correct, clip. Afterwards the optimizer may step.

        Raises what `refuse(what, value, rank)` makes of a loss or norm that is not finite.
        """
        step = self.current
        assert step is not None
        assert step.pending is not None
        step.work_s += time.perf_counter() - step.begin - step.work_s
        figures = step.pending.wait()
        bad = figures.first_not_finite()
        if bad is not None:
            learner.fusion.forget()
            raise refuse("the loss", figures.losses[bad], self.place.data.members[bad])
        if figures.total == 0:
            raise NonFiniteLoss("the loss is a mean over nothing: no rank counted anything")
        learner.finish(self.reference(step.portion) / figures.total)
        step.figures, step.pending, step.losses, step.count = figures, None, [], 0.0
        now = time.monotonic()
        if self.clip is not None or self.always_norm or now - self._norm_time > NORM_EVERY_S:
            norm = learner.clip(self.clip)
            step.norm, self._norm_time = None if norm is None else float(norm), now
            if step.norm is not None and not math.isfinite(step.norm) and not learner.may_skip:
                raise refuse("the norm of the gradient", step.norm, self.place.rank)
        return figures
