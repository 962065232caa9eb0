"""The run under the plan, compared with the reference on every rank while it trains."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from allfuse.job import Job
from allfuse.plan import Plan
from allfuse.split.piece import Piece
from allfuse.training.loop import train_job
from allfuse.verify.distance import Yardstick, relative_numbers
from allfuse.verify.record import Reference, tensors_of
from allfuse.verify.report import Difference, Row
from allfuse.verify.samples import cut_of

if TYPE_CHECKING:
    from allfuse.base.events import Event
    from allfuse.link import Link
    from allfuse.training.session import Session

# What is allowed, relative. Measured without faults, on 8 jobs (MLP, CNN, small GPT; SGD, AdamW,
# RMSprop, Adagrad) under 5 plans for 60 steps: in float64 at most 6e-15 of loss and norm and 3e-8
# of weights (Adagrad's bias before BatchNorm); in fp32 3e-6 and 0.16 (likewise). In half precision
# rounding alone comes to 2e-2 and 6e-2 in 30 steps, so that only gross faults are seen.
HALF = {"loss": 5e-2, "gradient norm": 1e-1, "weights": 5e-1}
TOLERANCES = {
    "float64": {"loss": 1e-9, "gradient norm": 1e-9, "weights": 1e-6},
    "fp32": {"loss": 1e-4, "gradient norm": 1e-4, "weights": 5e-1},
    "bf16": HALF,
    "fp16": HALF,
}
NOT_HERE = -1.0  # in place of a difference: the rank has nothing of the tensor
SMALLEST = 1e-3  # of the largest loss (or norm): below it differences are relative to that instead


def compare_run(
    job: Job, plan: Plan, device: str | None, reference: Reference, progress: Path
) -> tuple[list[Row], int]:
    """Train a job under its plan; every rank of it calls this. The rows, and threads of a rank."""
    comparison = Comparison(reference, progress)

    def prepare(session: Session) -> None:
        if session.balance is not None:
            session.balance.script = cut_of(plan, job)
        comparison.attach(session)

    try:
        result = train_job(job, plan, device=device, prepare=prepare)
        comparison.end(result.weights)
    finally:
        comparison.close()
    return comparison.rows, torch.get_num_threads()


def cut_whole(whole: Mapping[str, Tensor], pieces: Mapping[str, Piece | None]) -> dict[str, Tensor]:
    """A rank's parts of whole tensors."""
    cut = {}
    for name, tensor in whole.items():
        piece = pieces.get(name)
        if name not in pieces or piece is not None:
            cut[name] = tensor if piece is None else piece.take(tensor)
    return cut


class Comparison:
    """Compares one rank's loss, gradient norm and weights with the reference.

    At each moment every rank tells all others its figures and the difference of each tensor, as one
    row of float64: one sum of 8 n (3 + tensors) bytes. The sum also keeps the ranks together, so
    that what comparing costs one rank is not counted in another one's step.
    """

    rows: list[Row]

    def __init__(self, reference: Reference, progress: Path) -> None:
        self.reference, self.progress = reference, progress
        self.tolerance = TOLERANCES[reference.precision]
        self.rows = []
        self.link: Link | None = None
        self._yardstick: Yardstick | None = None

    def attach(self, session: Session) -> None:
        """Watch a session from its first step on."""
        place = session.place
        self.session, self.steps = session, len(self.reference.figures)
        self.sites = [place.plan.coordinates(r).get("site", 0) for r in range(place.plan.workers)]
        self.link = place.world.link("verify", tuple(range(place.plan.workers)), place.device)
        session.stepper.always_norm = True
        session.on("start", lambda _, event: self.compare("0", None))
        session.on("step", lambda _, event: self.compare(str(event.step), event))

    def end(self, weights: Mapping[str, Tensor]) -> None:
        """Compare what training returned."""
        self.compare("end", None, weights)

    def close(self) -> None:
        if self.link is not None:
            self.link.close()

    def compare(
        self, moment: str, event: Event | None, returned: Mapping[str, Tensor] | None = None
    ) -> None:
        """Take in one moment on every rank; rank 0 keeps it as a row and tells of its progress."""
        (model,) = self.session.models.values()
        pieces = self.session.split.pieces()
        own = {**tensors_of(model), **cut_whole(returned or {}, pieces)}
        figures = [math.nan, math.nan, math.nan]
        if event is not None:
            values = (event.data["loss"], event.data["grad_norm"], event.data["seconds"])
            figures = [math.nan if value is None else value for value in values]
        held: dict[str, float] = {}
        if moment in self.reference.kept:
            whole = self.reference.weights(moment, self.sites[self.session.rank])
            here = self._differences(own, whole, cut_whole(whole, pieces), model)
            held = {name: here.get(name, NOT_HERE) for name in whole}
        told = self._tell([*figures, *held.values()])
        if self.session.is_main:
            self.rows.append(self._row(moment, told, list(held), event is not None))
            if event is not None:
                self._tell_progress(self.rows[-1])

    def _tell(self, values: list[float]) -> list[list[float]]:
        """What every rank has to tell, one row for each."""
        assert self.link is not None
        slots = torch.zeros(self.link.size, len(values), dtype=torch.float64)
        slots[self.link.rank] = torch.tensor(values, dtype=torch.float64)
        slots = slots.to(self.session.device)
        self.link.all_reduce(slots, "compare with the reference").wait()
        rows: list[list[float]] = slots.tolist()
        return rows

    def _differences(
        self,
        own: Mapping[str, Tensor],
        whole: dict[str, Tensor],
        expected: dict[str, Tensor],
        model: nn.Module,
    ) -> dict[str, float]:
        """How far each tensor, or this rank's part of it, is off. In units of the whole model."""
        if self._yardstick is None:
            self._yardstick = Yardstick({name for name, _ in model.named_parameters()})
        self._yardstick.advance(whole)
        return self._yardstick.differences(own, expected)

    def _row(self, moment: str, told: list[list[float]], names: list[str], stepped: bool) -> Row:
        """The largest differences over all ranks, as rank 0 sees them."""
        step = self.steps if moment == "end" else int(moment)
        loss = self._figure("loss", 0, step, told) if stepped else None
        norm = self._figure("gradient norm", 1, step, told) if stepped else None
        allowed = self.tolerance["weights"]
        weights = [
            Difference(what=name, rank=rank, step=step, size=size, allowed=allowed)
            for rank, values in enumerate(told)
            for name, size in zip(names, values[3:], strict=True)
            if size != NOT_HERE
        ]
        wrong = dict.fromkeys(each.what for each in weights if not each.ok)
        return Row(
            moment=moment,
            loss=loss,
            norm=norm,
            weights=max(weights, key=Difference.order, default=None),
            wrong=list(wrong),
            seconds=max(values[2] for values in told) if stepped else None,
        )

    def _figure(self, what: str, column: int, step: int, told: list[list[float]]) -> Difference:
        everything = [f[column] for figures in self.reference.figures for f in figures if f]
        floor = SMALLEST * max(abs(value) for value in everything)
        found = []
        for rank, values in enumerate(told):
            figures = self.reference.figures[step - 1][self.sites[rank]]
            own = None if math.isnan(values[column]) else values[column]
            expected = None if figures is None else figures[column]
            found.append(
                Difference(
                    what=what,
                    rank=rank,
                    step=step,
                    size=relative_numbers(own, expected, floor),
                    allowed=self.tolerance[what],
                    own=own,
                    expected=expected,
                )
            )
        return max(found, key=Difference.order)

    def _tell_progress(self, row: Row) -> None:
        assert row.loss is not None
        assert row.norm is not None
        data: dict[str, Any] = {
            "step": row.loss.step,
            "steps": self.steps,
            "loss_difference": row.loss.size,
            "grad_norm_difference": row.norm.size,
            "weight_difference": None if row.weights is None else row.weights.size,
            "tensor": None if row.weights is None else row.weights.what,
        }
        with open(self.progress, "a") as file:
            file.write(json.dumps(data) + "\n")
