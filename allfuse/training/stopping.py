"""When training ends, by what is measured and by the clock. Loops count steps and epochs."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

from allfuse.job import Job


class Stopping:
    """Keeps what a job's `Stop` rule needs to know, and says why to stop.

    What is measured is the same on all ranks. The clock is not: a rank whose time is up only wishes
    to stop, and the session agrees on the step.
    """

    def __init__(self, job: Job) -> None:
        self.job, self.rule = job, job.stop
        self.best = -math.inf
        self.evaluations_without_better = 0
        self.figures: dict[str, float] = {}
        self.measured_step = -1
        self._spent_s = 0.0
        self._begin = time.monotonic()

    def evaluated(self, figures: Mapping[str, float], step: int) -> bool:
        """Take in an evaluation; whether it is the best so far."""
        self.figures, self.measured_step = dict(figures), step
        if self.is_best(figures):
            self.best, self.evaluations_without_better = self.job.score(figures), 0
            return True
        self.evaluations_without_better += 1
        return False

    def is_best(self, figures: Mapping[str, float]) -> bool:
        return self.job.score(figures) > self.best

    def score_at(self, step: int) -> float | None:
        """The monitored value where the weights of this step were measured, higher is better."""
        return self.job.score(self.figures) if self.measured_step == step else None

    def reason(self) -> str | None:
        """Why to stop after the last evaluation; None to go on."""
        target, patience = self.rule.target, self.rule.patience
        if target is not None and self.figures:
            value, lower = self.figures[self.job.monitor_name], self.job.lower_is_better
            if value <= target if lower else value >= target:
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
            "figures": dict(self.figures),
            "measured_step": self.measured_step,
            "seconds": self.seconds,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best = state["best"]
        self.evaluations_without_better = state["evaluations_without_better"]
        self.figures, self.measured_step = state["figures"], state["measured_step"]
        self._spent_s, self._begin = state["seconds"], time.monotonic()
