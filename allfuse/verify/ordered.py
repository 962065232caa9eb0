"""Plans with a scheduler and servers: a run's own order of events, executed serially and compared.

The run comes first, since nobody knows its order before. The scheduler writes it into its book:
which update was made by whom, from which version of the weights, of which samples, and when it was
applied. Then one process executes that order (serial.py), and every loss, gradient norm and weight
that a worker saw is compared with it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from allfuse.base.errors import AllfuseError, Interrupted, PeerLost, PlanError, WorkerFailed
from allfuse.launcher import current_world
from allfuse.launcher.crew import Crew as RolesCrew
from allfuse.launcher.crew import launch_crew
from allfuse.plan import Data, Plan
from allfuse.roles.office import BOOK, run_scheduler, run_server
from allfuse.roles.terms import terms_of
from allfuse.training.device import choose_device
from allfuse.verify.compare import TOLERANCES
from allfuse.verify.history import History
from allfuse.verify.playback import compare_exactly, replay
from allfuse.verify.record import Reference
from allfuse.verify.replay import Replay, is_plain_mean
from allfuse.verify.report import Report
from allfuse.verify.tally import Tally
from allfuse.verify.task import Task
from allfuse.verify.witness import Seen, train_watched

if TYPE_CHECKING:
    from allfuse.launcher.crewmate import Crewmate
    from allfuse.verify.verify import Crew

TIMEOUT_S = 300.0
COMPARED = (
    "what every worker saw of every update, with one process that executes the updates in the "
    "order of the scheduler's book"
)


@dataclass(frozen=True)
class Findings:
    """The differences from the replay, and from one process where the plan promises that.

    updates: how many there were. threads: of the process that executed them.
    """

    replayed: Tally
    exact: Tally | None
    updates: int
    threads: int


def check_ordered(plan: Plan) -> None:
    """Refuse plans with roles whose groups the replay cannot follow.

    Raises:
        PlanError: the plan cannot run, or inside its groups something is fused otherwise than as a
            mean of gradients.
    """
    plan.validate_executable()
    terms_of(plan, TIMEOUT_S)
    for axis in plan.inner.axes:
        plain = isinstance(axis, Data) and is_plain_mean(Replay(axis, 0)) and _is_even(axis)
        if not plain and axis.replicates and axis.n > 1:
            raise PlanError(
                str(plan), f"verify cannot replay {axis} inside {plan.outer} yet", str(plan.outer)
            )


def _is_even(axis: Data) -> bool:
    """Whether the ranks of an axis have equal shares, which the record does not tell of others."""
    return axis.balance == "even"


def verify_ordered(crew: Crew, task: Task, note: Callable[[str], None]) -> Report:
    """Run a job under a plan with roles, execute its order of events, and compare.

    Raises:
        AllfuseError: the record cannot be right: samples that were learned from twice or never, a
            worker further ahead than the plan allows, or weights that it cannot have had.
    """
    plan = task.plan
    if plan.promise == "exact":
        note("the reference trains: a plain loop in one process")
        reference: Reference = crew.run_alone(task.reference)
    else:
        probe = task.folder / "probe"
        probe.mkdir()
        alone = replace(task, plan=Plan.parse("data(1)"), steps=1, folder=probe)
        reference = crew.run_alone(alone.reference)
    run = folder_of(task)
    run.mkdir()
    note(f"{plan} trains; its order of events is written down")
    work = functools.partial(_train, task, reference.precision == "float64")
    train_with_roles(work, plan, run, threads=crew.by_threads, each=crew.each)
    note("one process executes the updates in the same order")
    found: Findings = crew.run_alone(functools.partial(_replay, task, reference))
    return make_reports(plan, reference, found, crew.each)


def folder_of(task: Task) -> Path:
    return task.folder / "run"


class BookKeeper:
    """Whom the scheduler tells of the run: all that is wanted of it is its book."""

    def __init__(self, folder: Path, crew: Crewmate) -> None:
        self.folder, self.crew = folder, crew

    def opens(self, facts: dict[str, Any]) -> Path | None:
        self.crew.tell_run({"folder": None, "about": {}})
        return self.folder

    def goes_on(self, run: dict[str, Any]) -> Path | None:
        return self.folder

    def begins(self, done: int) -> None:
        pass

    def event(self, name: str, /, **data: Any) -> None:
        pass

    def close(self, error: BaseException | None) -> None:
        pass


def train_with_roles(
    work: Callable[[], Any], plan: Plan, folder: Path, *, threads: bool, each: int
) -> None:
    """Do the work in every rank of a plan with roles; the scheduler's book comes into the folder.

    Args:
        threads: all are threads of this process, instead of processes of `each` threads.
    """
    outer = plan.outer
    assert outer is not None, "a plan without roles"
    crew = RolesCrew(
        worker=work,
        scheduler=functools.partial(run_scheduler, functools.partial(BookKeeper, folder)),
        server=run_server,
        servers=terms_of(plan, TIMEOUT_S).servers,
        plan=str(plan),
        inner=str(plan.inner),
        groups=outer.n,
        ranks=plan.inner.workers,
        on_loss="stop",
    )
    if not threads:
        launch_crew(crew, threads=each, timeout_s=TIMEOUT_S)
        return
    from allfuse.launcher.thread_crew import ThreadCrew
    from allfuse.link.mailroom import Mailroom

    ran = ThreadCrew(crew, Mailroom()).run()
    outcomes = [*(each for group in ran.results for each in group), *ran.roles.values()]
    failures = [each for each in outcomes if isinstance(each, BaseException)]
    causes = [each for each in failures if not isinstance(each, PeerLost | WorkerFailed)]
    for failure in causes or failures:
        raise failure


def _train(task: Task, double: bool) -> bool:
    job, _ = task.subject(double)
    outer = task.plan.outer
    assert outer is not None
    return train_watched(job, task.device, folder_of(task), outer.n * task.steps)


def _replay(task: Task, reference: Reference) -> Findings:
    """What the one process does."""
    job, _ = task.subject(reference.precision == "float64")
    world = current_world()
    assert world is not None
    device, run = choose_device(task.device, world), folder_of(task)
    terms = terms_of(task.plan, TIMEOUT_S)
    history = History.read(run / BOOK, terms)
    history.check(terms)
    if history.gossip is None and (history.taken_back or history.untold):
        raise AllfuseError(
            f"while {task.plan} trained, {history.taken_back} leases were taken back, and servers "
            f"were given a worker's weights ({history.untold or 'none'}), which the replay cannot "
            "follow; next: look for what killed them, or verify again"
        )
    seen, tolerance = Seen.read(run), TOLERANCES[reference.precision]
    seen.layout, seen.each = history.layout, task.plan.inner.workers

    def tick() -> None:
        if world.stop_requested.is_set():
            raise Interrupted("interrupted while the updates were executed")

    replayed = Tally(tolerance, task.steps)
    replay(job, task.plan, history, seen, replayed, device, tick)
    exact = None
    if task.plan.promise == "exact":
        exact = compare_exactly(history, seen, reference, Tally(tolerance, task.steps))
    return Findings(replayed, exact, len(history.updates), torch.get_num_threads())


def make_reports(plan: Plan, reference: Reference, found: Findings, each: int) -> Report:
    """Of the replay; where the plan promises more, of that, with the replay beside it."""
    make = functools.partial(
        make_report, plan, reference.precision, threads=each, reference_threads=found.threads
    )
    replayed = make("replayed", found.replayed, compared=COMPARED)
    told = [f"{found.updates} updates were executed"]
    if replayed.ok:
        equal = "bit for bit" if found.replayed.is_equal else "to rounding, not bit for bit"
        told = [f"{told[0]}; all weights that workers were sent agree {equal}"]
    if found.exact is None:
        return replace(replayed, notes=[*reference.notes, *told])
    exact = make("exact", found.exact, also=replace(replayed, notes=told))
    return replace(exact, notes=reference.notes)


def make_report(
    plan: Plan,
    precision: str,
    promise: str,
    tally: Tally,
    *,
    threads: int,
    reference_threads: int,
    **more: Any,
) -> Report:
    return Report(
        plan=str(plan),
        promise=promise,
        steps=tally.steps,
        precision=precision,
        tolerance=dict(TOLERANCES[precision]),
        rows=tally.rows(),
        notes=[],
        workers=plan.workers,
        threads=threads,
        reference_threads=reference_threads,
        plan_seconds=None,
        reference_seconds=None,
        **more,
    )
