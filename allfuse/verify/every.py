"""Every plan with so many ranks that makes sense, each verified on a job."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from allfuse.base.errors import AllfuseError, Interrupted, PlanError, UserError
from allfuse.base.units import format_seconds
from allfuse.plan import Plan
from allfuse.plan.schedule import SCHEDULES
from allfuse.topology import TOPOLOGIES
from allfuse.verify.progress import Listener
from allfuse.verify.report import Report
from allfuse.verify.task import JobSource
from allfuse.verify.verify import check_plan, verify_job

EVERY = 3  # steps from one fusion of sites to the next
MOST_AXES = 3


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One plan: what verify found, or why it did not run.

    refused: the job or this version cannot run it. failed: it began, and ended with an error.
    """

    plan: str
    report: Report | None = None
    refused: str | None = None
    failed: str | None = None

    @property
    def ok(self) -> bool:
        return self.failed is None and (self.report is None or self.report.ok)

    def as_dict(self) -> dict[str, Any]:
        found = None if self.report is None else self.report.as_dict()
        return {
            "plan": self.plan,
            "ok": self.ok,
            "report": found,
            "refused": self.refused,
            "failed": self.failed,
        }

    def line(self, width: int) -> str:
        """One line of the table."""
        if self.report is None:
            verdict = "refused" if self.failed is None else "FAILED"
            text = _first_line(self.failed or self.refused or "")
            return f"{self.plan:<{width}}  {verdict:<9}  {text}"
        report = self.report
        numbers = [report.loss, report.norm, report.worst]
        sizes = ["" if each is None else f"{each.size:.1e}" for each in numbers]
        seconds = "" if report.plan_seconds is None else format_seconds(report.plan_seconds)
        verdict = "same" if report.ok else "DIFFERENT"
        columns = [f"{self.plan:<{width}}", f"{verdict:<9}", f"{report.promise:<8}"]
        columns += [*(f"{size:>9}" for size in sizes), f"{seconds:>9}"]
        return "  ".join(columns) + ("" if report.first is None else f"  {report.first.what}")


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What came of all of them."""

    ranks: int
    entries: list[Entry]

    @property
    def ok(self) -> bool:
        return all(entry.ok for entry in self.entries)

    def as_dict(self) -> dict[str, Any]:
        plans = [entry.as_dict() for entry in self.entries]
        return {"ok": self.ok, "ranks": self.ranks, "plans": plans}

    def lines(self) -> list[str]:
        """The table, for people."""
        width = max(len(entry.plan) for entry in self.entries)
        head = (
            f"{'plan':<{width}}  {'numbers':<9}  {'promise':<8}  {'loss off':>9}  {'norm off':>9}"
        )
        ran = [entry for entry in self.entries if entry.report is not None]
        same = sum(entry.ok for entry in ran)
        return [
            f"{head}  {'weights':>9}  {'a step':>9}",
            *(entry.line(width) for entry in self.entries),
            "",
            f"{len(self.entries)} plans with {self.ranks} ranks: {same} of the {len(ran)} that ran "
            "keep their promise",
        ]


def plans_with(ranks: int) -> list[Plan]:
    """The plans with so many ranks, structure first: every product of at most three axes; then the
    topologies and ways to be out of step of replicas, and the schedules of stages.

    Raises:
        UserError: no plan has so few.
    """
    if ranks < 2:
        raise UserError(f"--ranks {ranks}: allowed: a whole number from 2")
    texts = [" * ".join(map(_axis, product)) for product in _products(ranks)]
    texts += [f"data({ranks}, topology={name})" for name in TOPOLOGIES]
    texts += [f"data({ranks}, topology=central(servers=2))", f"data({ranks}, sync=ssp(2))"]
    texts += [f"data({ranks}, sync=asp)", f"data({ranks}, codec=int8)"]
    texts += [f"site({ranks}, topology=gossip)", f"site({ranks}, every={EVERY}, sync=asp)"]
    texts += [f"site({ranks}, every={EVERY}, outer=nesterov)"]
    texts += [f"pipe({ranks}, schedule={name})" for name in SCHEDULES]
    if ranks > 2 and ranks % 2 == 0:
        texts += [
            f"data({ranks // 2}, sync=asp) * {axis}(2)" for axis in ("pipe", "shard", "tensor")
        ]
    found: dict[str, Plan] = {}
    for text in texts:
        try:
            plan = Plan.parse(text)
            check_plan(plan)
        except PlanError:
            continue  # it has no meaning, or none that can be replayed
        found.setdefault(str(plan), plan)
    return list(found.values())


def _products(ranks: int) -> Iterator[list[tuple[str, int]]]:
    """Axes whose sizes multiply to so many, at most one of data and site or both."""
    names = ("site", "data", "pipe", "shard", "tensor")

    def grow(chosen: list[tuple[str, int]], begin: int, left: int) -> Iterator[Any]:
        if left == 1:
            yield chosen
            return
        if len(chosen) == MOST_AXES:
            return
        for place in range(begin, len(names)):
            for size in range(2, left + 1):
                if left % size == 0:
                    yield from grow([*chosen, (names[place], size)], place + 1, left // size)

    return iter(sorted(grow([], 0, ranks), key=len))


def _axis(part: tuple[str, int]) -> str:
    name, size = part
    return f"site({size}, every={EVERY})" if name == "site" else f"{name}({size})"


def verify_all(
    job: JobSource,
    ranks: int,
    *,
    settings: Mapping[str, Any] | None = None,
    steps: int = 10,
    double: bool = True,
    device: str | None = None,
    on_event: Listener | None = None,
    threads: bool = False,
) -> Summary:
    """Verify a job under every plan with so many ranks, one after the other.

    `on_event("verified", line=..., plan=..., ok=...)` is called after each.

    Raises:
        AllfuseError: none of them ran; that of the first.
    """
    plans = plans_with(ranks)
    width = max(len(str(plan)) for plan in plans)
    entries: list[Entry] = []
    errors: list[AllfuseError] = []
    for plan in plans:
        options: dict[str, Any] = {"settings": settings, "steps": steps, "double": double}
        try:
            report = verify_job(job, plan, device=device, threads=threads, **options)
            entry = Entry(plan=str(plan), report=report)
        except Interrupted:
            raise
        except UserError as error:
            errors.append(error)
            entry = Entry(plan=str(plan), refused=str(error))
        except AllfuseError as error:
            errors.append(error)
            entry = Entry(plan=str(plan), failed=f"{type(error).__name__}: {error}")
        entries.append(entry)
        if on_event is not None:
            on_event("verified", line=entry.line(width), plan=entry.plan, ok=entry.ok)
    if all(entry.report is None for entry in entries):
        raise errors[0]
    return Summary(ranks=ranks, entries=entries)


def _first_line(text: str) -> str:
    line = text.strip().splitlines()[0] if text.strip() else ""
    return line if len(line) <= 120 else f"{line[:117]}..."
