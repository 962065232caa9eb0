"""When training ends, by what is measured and by the clock. Loops count steps and epochs."""

from __future__ import annotations

import math
import time
from typing import Any

from allfuse.job import Stop


class Stopping:
    """Keeps what a `Stop` rule needs to know, and says why to stop.

    What is measured is the same on all ranks. The clock is not: a rank whose time is up only wishes
    to stop, and the session agrees on the step.
    """

    def __init__(self, rule: Stop) -> None:
        self.rule = rule
        self.best = -math.inf
        self.evaluations_without_better = 0
        self.measured_step = -1
        self._spent_s = 0.0
        self._begin = time.monotonic()

    def evaluated(self, score: float, step: int) -> bool:
        """Take in a monitored value (higher is better); whether it is the best so far."""
        self.measured_step = step
        if score > self.best:
            self.best, self.evaluations_without_better = score, 0
            return True
        self.evaluations_without_better += 1
        return False

    def measured_at(self, step: int) -> bool:
        return self.measured_step == step

    def reason(self, value: float, higher_is_better: bool) -> str | None:
        """Why to stop after an evaluation that gave this value; None to go on."""
        target, patience = self.rule.target, self.rule.patience
        if target is not None and (value >= target if higher_is_better else value <= target):
            return f"the target {target:g} is reached"
        if patience is not None and self.evaluations_without_better >= patience:
            return f"no improvement for {patience} evaluations"
        return None

    def time_is_up(self) -> bool:
        limit = self.rule.seconds
        return limit is not None and self.seconds >= limit

    @property
    def seconds(self) -> float:
        """Seconds of training, those before a resume included."""
        return self._spent_s + time.monotonic() - self._begin

    def state_dict(self) -> dict[str, Any]:
        return {
            "best": self.best,
            "evaluations_without_better": self.evaluations_without_better,
            "measured_step": self.measured_step,
            "seconds": self.seconds,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best = state["best"]
        self.evaluations_without_better = state["evaluations_without_better"]
        self.measured_step = state["measured_step"]
        self._spent_s, self._begin = state["seconds"], time.monotonic()
