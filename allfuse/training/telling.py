"""What a session tells of itself: the events "start", "step" and "end"."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any

import torch

from allfuse.base.errors import AllfuseError

if TYPE_CHECKING:
    from allfuse.split.data import Source, Stream
    from allfuse.training.session import Session
    from allfuse.training.step import Step


class Teller:
    """Keeps the counts that events need, and emits them on the session's bus."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.began: float | None = None
        self._samples = 0
        self._sent_before = 0
        self.loss = math.nan
        self.about: dict[str, Any] = {}

    def start(
        self,
        source: Source | Stream,
        batch_size: int | None,
        per_epoch: int | None,
        epochs: int | None,
        steps: int | None,
    ) -> dict[str, Any]:
        """Emit "start"; what it says."""
        session = self.session
        self.began = time.monotonic()
        planned = None if epochs is None or per_epoch is None else epochs * per_epoch
        limits = [value for value in (steps, planned) if value is not None]
        out = session.keeper.path
        about = {
            "plan": str(session.plan),
            "promise": session.plan.promise,
            "workers": session.plan.workers,
            "device": str(session.device),
            "link": session.place.linked_by,
            "threads": torch.get_num_threads(),
            "samples": source.size,
            "batch_size": batch_size,
            "steps_per_epoch": per_epoch,
            "total_steps": max(min(limits), session.steps) if limits else None,
            "parameters": sum(session.split.count(m) for m in session.models.values()),
            "resumed_step": session.steps,
            "out": None if out is None else str(out),
            "choices": session.choices,
            "data": source.promise,
        }
        self.about = about
        session.bus.emit("start", **about)
        return about

    def step(self, step: Step) -> None:
        session = self.session
        seconds = time.perf_counter() - step.begin
        portion, figures = step.portion, step.figures
        shares = () if portion is None else portion.shares
        self._samples += sum(shares)
        loss = math.nan if figures is None else figures.loss
        if session.apart is None or not math.isnan(loss):  # else this group had nothing to count
            self.loss = loss
        if not session.bus.wants("step"):
            return
        sent = session.place.sent_bytes
        fused, self._sent_before = sent - self._sent_before, sent
        busy = [] if figures is None else figures.busy_s
        session.bus.emit(
            "step",
            epoch=session.course.cursor.epoch_of_last,
            loss=loss,
            grad_norm=step.norm,
            lr=session.learners[0].learning_rate if session.learners else math.nan,
            samples=sum(shares),
            seconds=seconds,
            shares=list(shares),
            busy=[min(1.0, value / max(seconds, 1e-9)) if value else None for value in busy],
            fused_bytes=fused,
        )

    def end(self, error: BaseException | None) -> None:
        if self.began is None:
            return
        session = self.session
        seconds = time.monotonic() - self.began
        reason = session.stop_reason or "the script ended"
        if error is not None:
            known = isinstance(error, AllfuseError)
            reason = str(error) if known else f"{type(error).__name__}: {error}"
        data: dict[str, Any] = {
            "reason": reason,
            "steps": session.steps,
            "seconds": seconds,
            "samples": self._samples,
            "samples_per_s": self._samples / max(seconds, 1e-9),
            "fused_bytes": session.place.sent_bytes,
            "loss": self.loss,
        }
        session.bus.emit("end", **data)
