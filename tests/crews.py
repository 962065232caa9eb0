"""Crews as threads of the test's process, and what they told."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import allfuse as af
from allfuse.audience import RunAudience
from allfuse.job import Job
from allfuse.launcher.crew import Crew
from allfuse.launcher.thread_crew import ThreadCrew
from allfuse.link.mailroom import Faults, Mailroom
from allfuse.plan import as_plan
from allfuse.roles.office import run_scheduler, run_server
from allfuse.roles.terms import terms_of
from allfuse.training.keeper import Resume
from allfuse.training.loop import Result, train_job
from allfuse.watching import Watching, watch


class Recorder:
    """An audience that keeps what it hears."""

    def __init__(self, crew: Any, events: list[tuple[str, dict[str, Any]]]) -> None:
        self.crew, self.events = crew, events

    def opens(self, facts: dict[str, Any]) -> Path | None:
        self.crew.tell_run({"folder": None, "about": facts.get("about") or {}})
        return None

    def goes_on(self, run: dict[str, Any]) -> Path | None:
        return None

    def begins(self, done: int) -> None:
        self.events.append(("begins", {"done": done}))

    def event(self, name: str, /, **data: Any) -> None:
        self.events.append((name, data))

    def close(self, error: BaseException | None) -> None:
        self.events.append(("closed", {"error": error}))


class Told:
    """What a crew came to: the result of the group that measured the end, and all events."""

    def __init__(self, crew: ThreadCrew, events: list[tuple[str, dict[str, Any]]]) -> None:
        self.crew, self.events = crew, events

    @property
    def results(self) -> list[Any]:
        return [result for group in self.crew.results for result in group]

    @property
    def result(self) -> Result:
        failures = [each for each in self.results if isinstance(each, BaseException)]
        failures += [each for each in self.crew.roles.values() if isinstance(each, BaseException)]
        if failures:
            raise failures[0]
        (result,) = [group[0] for group in self.crew.results if not group[0].elsewhere]
        return result

    def all(self, name: str) -> list[dict[str, Any]]:
        return [data for event, data in self.events if event == name]


def run_crew(
    work: Callable[[], Any],
    plan: str,
    faults: Faults | None = None,
    timeout_s: float = 30.0,
    audience: Callable[[Any], Any] | None = None,
) -> Told:
    """Run a function in every rank of a plan with roles."""
    chosen = as_plan(plan)
    events: list[tuple[str, dict[str, Any]]] = []
    watches = audience or (lambda mate: Recorder(mate, events))
    assert chosen.outer is not None
    crew = Crew(
        worker=work,
        scheduler=lambda: run_scheduler(watches),
        server=run_server,
        servers=terms_of(chosen, timeout_s).servers,
        plan=plan,
        inner=str(chosen.inner),
        groups=chosen.outer.n,
        ranks=chosen.inner.workers,
    )
    post = Mailroom() if faults is None else Mailroom(faults)
    return Told(ThreadCrew(crew, post, timeout_s=timeout_s).run(), events)


def train_crew(job: Job, plan: str, faults: Faults | None = None) -> Told:
    """Train a job under a plan with roles."""
    return run_crew(lambda: train_job(job), plan, faults)


def train_crew_into(
    out: Path, job: Job, plan: str, *, resume: Resume = False, timeout_s: float = 30.0
) -> Told:
    """Train a job under a plan with roles, with a run folder."""

    def prepare(session: Any) -> None:
        watch(session, Watching(quiet=True))

    def work() -> Result:
        return train_job(job, out=out, resume=resume, prepare=prepare)

    return run_crew(work, plan, timeout_s=timeout_s, audience=RunAudience)


def small_job(**changes: Any) -> Job:
    """A classifier of 8 numbers in float64; batches of 15, the last of 7."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(97, 8, generator=generator, dtype=torch.float64)
    y = (x.sum(1) > 0).long()
    fields: dict[str, Any] = {
        "model": lambda: torch.nn.Sequential(
            torch.nn.Linear(8, 9), torch.nn.Tanh(), torch.nn.Linear(9, 2)
        ).double(),
        "train": (x, y),
        "loss": lambda outputs, batch: torch.nn.functional.cross_entropy(outputs, batch[1]),
        "optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
        "batch_size": 15,
        "stop": af.Stop(epochs=2),
        "save_every": None,
    }
    return af.Job(**{**fields, **changes})
