"""What verify found, as numbers and in words."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from allfuse.base.units import format_seconds

MEANING = {
    "exact": "the numbers equal those of one process, to rounding",
    "replayed": "the numbers equal those of the same plan executed serially in one process",
}
REFERENCE = {
    "exact": "a plain loop in one process on the same batches",
    "replayed": "a plain loop in one process that plays the sites in turn",
}
MOST_ROWS = 12  # of the table in words


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The largest difference of one quantity over all ranks, relative to its scale.

    what: "loss", "gradient norm" or the name of a tensor. step: steps done. size: infinite where
    one side has no number. own, expected: both sides, for loss and norm.
    """

    what: str
    rank: int
    step: int
    size: float
    allowed: float
    own: float | None = None
    expected: float | None = None

    @property
    def ok(self) -> bool:
        return self.size <= self.allowed

    @staticmethod
    def order(difference: Difference) -> float:
        return difference.size

    def __str__(self) -> str:
        values = ""
        if self.own is not None and self.expected is not None:
            values = f" ({self.own:.9g}, the reference has {self.expected:.9g})"
        when = "before the first step" if self.step == 0 else f"step {self.step}"
        return (
            f"{self.what} on rank {self.rank}, {when}: off by {self.size:.2g}{values}; "
            f"allowed: {self.allowed:.0e}"
        )


@dataclass(frozen=True, kw_only=True)
class Row:
    """One moment: "0" before the first step, a number of steps, or "end" after the last round.

    wrong: names of all tensors beyond the tolerance. seconds: of the step, on the slowest rank.
    """

    moment: str
    loss: Difference | None
    norm: Difference | None
    weights: Difference | None
    wrong: list[str]
    seconds: float | None

    @property
    def differences(self) -> list[Difference]:
        """In the order in which one follows from the other."""
        return [d for d in (self.loss, self.norm, self.weights) if d is not None]


@dataclass(frozen=True, kw_only=True)
class Report:
    """How a job under its plan compares with its reference.

    tolerance: allowed differences of loss, gradient norm and weights. first: the first one beyond
    it, from which later ones follow. loss, norm, worst: the largest of losses, of gradient norms
    and of weights. plan_seconds, reference_seconds: of the fastest step, since other programs on a
    machine can hold up single ones a hundredfold; None where steps of workers cannot be told apart.
    compared: what with what, in words. also: another comparison of the same run.
    """

    plan: str
    promise: str
    steps: int
    precision: str
    tolerance: dict[str, float]
    rows: list[Row]
    notes: list[str]
    workers: int
    threads: int
    reference_threads: int
    plan_seconds: float | None
    reference_seconds: float | None
    compared: str = ""
    also: Report | None = None

    @property
    def ok(self) -> bool:
        return self.first is None and (self.also is None or self.also.ok)

    @property
    def first(self) -> Difference | None:
        return next((d for row in self.rows for d in row.differences if not d.ok), None)

    @property
    def loss(self) -> Difference:
        return max((row.loss for row in self.rows if row.loss), key=Difference.order)

    @property
    def norm(self) -> Difference | None:
        norms = (row.norm for row in self.rows if row.norm)
        return max(norms, key=Difference.order, default=None)

    @property
    def worst(self) -> Difference:
        return max((row.weights for row in self.rows if row.weights), key=Difference.order)

    @property
    def wrong(self) -> list[str]:
        """The tensors beyond the tolerance when that is first seen of any."""
        return next((row.wrong for row in self.rows if row.wrong), [])

    @property
    def speed_ratio(self) -> float | None:
        """How many steps the plan does in the time of one of the reference."""
        if self.plan_seconds is None or self.reference_seconds is None:
            return None
        return self.reference_seconds / self.plan_seconds

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; numbers that are not finite are None."""
        found = asdict(self)
        for name in ("ok", "wrong", "speed_ratio"):
            found[name] = getattr(self, name)
        for name in ("first", "loss", "norm", "worst"):
            value = getattr(self, name)
            found[name] = None if value is None else asdict(value)
        found["also"] = None if self.also is None else self.also.as_dict()
        plain: dict[str, Any] = _finite(found)
        return plain

    def lines(self) -> list[str]:
        """A summary for people."""
        verdict = "same numbers" if self.first is None else "DIFFERENT NUMBERS"
        compared = (
            "loss, gradient norm and every weight, on every worker after every step, with "
            + REFERENCE[self.promise]
        )
        lines = [
            f"verify {self.plan}: {verdict} after {self.steps} steps in {self.precision}",
            f"promise     {self.promise}: {MEANING[self.promise]}",
            f"compared    {self.compared or compared}",
            "",
            *self._table(),
            "",
        ]
        for label, difference in (("loss", self.loss), ("gradient", self.norm)):
            if difference is not None:
                lines.append(f"{label:<12}largest difference: {_place(difference)}")
        worst = self.worst
        lines.append(f"{'weights':<12}largest difference: {_place(worst)}, in {worst.what}")
        lines += self._explain()
        lines += self._speed()
        lines += [f"{'note':<12}{note}" for note in self.notes]
        return lines if self.also is None else [*lines, "", *self.also.lines()]

    def _table(self) -> list[str]:
        every = math.ceil(len(self.rows) / MOST_ROWS)
        bad = next((row for row in self.rows if not all(d.ok for d in row.differences)), None)
        lines = [
            f"{'step':>6}  {'loss':>12}  {'loss off':>9}  {'norm off':>9}  weights off, most in"
        ]
        for number, row in enumerate(self.rows):
            if number % every == 0 or row is bad or row is self.rows[-1]:
                lines.append(_table_line(row) + ("   <- first difference" if row is bad else ""))
        return lines

    def _explain(self) -> list[str]:
        if self.first is None:
            return []
        lines = [f"{'first wrong':<12}{self.first}"]
        if self.wrong and self.loss.ok and (self.norm is None or self.norm.ok):
            lines.append(
                f"{'':<12}losses and gradient norms agree throughout: what is off bears on nothing "
                "(a bias before BatchNorm), or went wrong in the last step only"
            )
        if self.wrong:
            more = f" and {len(self.wrong) - 6} more" if len(self.wrong) > 6 else ""
            lines.append(f"{'':<12}tensors that are off first: {', '.join(self.wrong[:6])}{more}")
        else:
            lines.append(f"{'':<12}no tensor is off: training is right and reported wrong")
        return lines

    def _speed(self) -> list[str]:
        if self.plan_seconds is None or self.reference_seconds is None:
            return []
        plan = f"{_count(self.workers, 'worker')} of {_count(self.threads, 'thread')}"
        alone = f"one process of {_count(self.reference_threads, 'thread')}"
        return [
            f"{'speed':<12}{format_seconds(self.plan_seconds)} a step with {plan}, "
            f"{format_seconds(self.reference_seconds)} with {alone}: {self.speed_ratio:.2f} times "
            f"its speed (fastest steps, in {self.precision}, without reading samples and comparing)"
        ]


def _table_line(row: Row) -> str:
    loss = "" if row.loss is None or row.loss.own is None else f"{row.loss.own:.6g}"
    sizes = ["" if d is None else f"{d.size:.1e}" for d in (row.loss, row.norm)]
    columns = [f"{row.moment:>6}", f"{loss:>12}", *(f"{size:>9}" for size in sizes)]
    if row.weights is not None:
        columns.append(f"{row.weights.size:.1e}  {row.weights.what} on rank {row.weights.rank}")
    return "  ".join(columns)


def _place(difference: Difference) -> str:
    return (
        f"{difference.size:.1e} at step {difference.step} on rank {difference.rank} "
        f"(allowed: {difference.allowed:.0e})"
    )


def _count(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _finite(nest: Any) -> Any:
    if isinstance(nest, dict):
        return {key: _finite(value) for key, value in nest.items()}
    if isinstance(nest, list):
        return [_finite(value) for value in nest]
    return None if isinstance(nest, float) and not math.isfinite(nest) else nest
