"""Those who watch a job that a scheduler hands out: its run folder, its checkpoints, its events."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from allfuse.base.errors import AllfuseError
from allfuse.base.events import Bus
from allfuse.launcher.crewmate import Crewmate
from allfuse.plan import as_plan
from allfuse.roles.blueprint import Blueprint
from allfuse.roles.office import SNAPSHOTS
from allfuse.store.checkpoint import NotSaved, Saved
from allfuse.store.run import RunFolder
from allfuse.training.keeper import decide_resume, refuse_other
from allfuse.training.relay import go_on
from allfuse.training.served import Binder
from allfuse.watching import Watching, watch_bus


class RunAudience:
    """Holds the run folder of a job and shows its course: the scheduler's `Audience`."""

    def __init__(self, crew: Crewmate, token_file: Path | None = None) -> None:
        self.crew, self.bus, self.token_file = crew, Bus(0), token_file
        self.folder: RunFolder | None = None
        self._closing = ExitStack()
        self._binder: Binder | None = None
        self._silent: set[str] = set()  # workers that were lost, and may hang
        self._began: float | None = None
        self._run: dict[str, Any] = {}
        self._held: list[tuple[str, dict[str, Any]]] = []  # until the course begins
        self._stepped = 0.0
        self._samples = self._since = 0
        self._losses = self._counts = 0.0  # since the last step
        self._loss = float("nan")
        self._reason, self._done = "", 0

    def opens(self, facts: dict[str, Any]) -> Path | None:
        """Make the run folder that the first worker asked for, or go on with it.

        Raises:
            RunError: it cannot be used; nothing was written.
        """
        out = facts.get("out")
        if out is not None and decide_resume(facts.get("resume", False), out):
            self.folder = RunFolder.open(out, lock=True)
            self._go_on(self.folder, facts)
        elif out is not None:
            job_file = facts.get("job_file")
            self.folder = RunFolder.create(
                out, facts["record"], None if job_file is None else Path(job_file)
            )
        run = {
            "folder": out,
            "watching": facts.get("watching") or {},
            "about": {
                **facts.get("about", {}),
                "out": None if out is None else str(Path(out).resolve()),
            }
            if "about" in facts
            else {},
            "start": facts["start"],
            "job_file": facts.get("job_file"),
            "checkpoints": {
                "blueprint": facts["blueprint"],
                "names": facts.get("parameters", []),
                "steps_per_epoch": facts["steps_per_epoch"],
                "keep": facts.get("keep", 3),
            },
        }
        self._watch(run)
        self.crew.tell_run(run)
        return None if out is None else Path(out)

    def _go_on(self, folder: RunFolder, facts: dict[str, Any]) -> None:
        record = facts["record"]
        refuse_other(folder, record["fingerprints"], record)
        for text in go_on(folder, facts, as_plan(record["plan"])):
            self._held.append(("warning", {"text": text}))
        if folder.record.get("plan") != record["plan"]:
            folder.update(plan=record["plan"], command=record["command"])

    def goes_on(self, run: dict[str, Any]) -> Path | None:
        """Take over the run folder of a scheduler that was lost."""
        if run["folder"] is not None:
            self.folder = RunFolder.open(run["folder"], lock=True)
        self._watch(run)
        self._held.append(
            ("warning", {"text": "the scheduler was lost; another one goes on from its book"})
        )
        return None if run["folder"] is None else Path(run["folder"])

    def begins(self, done: int) -> None:
        """The course begins, or goes on after so many steps."""
        run = self._run
        self.bus.step = done
        self._began = self._stepped = time.monotonic()
        self.bus.emit("start", **{**run["start"], "resumed_step": done})
        if self.crew.listens_beyond and not done:
            job = Path(run["job_file"] or "JOB").name
            token = "" if self.token_file is None else f" --token-file {self.token_file}"
            place = self.crew.scheduler(0.0)
            text = f"others can take part: allfuse join {place} {job}{token}"
            self.bus.emit("note", text=text)
        held, self._held = self._held, []
        for name, data in held:
            self.event(name, **data)

    def _watch(self, run: dict[str, Any]) -> None:
        self._run = run
        if run["folder"] is not None:
            about, path = run["checkpoints"], Path(run["folder"])
            blueprint = Blueprint.from_plain(about["blueprint"])
            self._binder = Binder(
                path,
                path / SNAPSHOTS,
                as_plan(self.crew.plan),
                blueprint,
                about["names"],
                about["steps_per_epoch"],
                about["keep"],
            )
        watching = Watching(**run["watching"])
        watch_bus(self.bus, watching, lambda: self.folder, self._at_close)

    def _at_close(self, function: Callable[[], None]) -> None:
        self._closing.callback(function)

    def event(self, name: str, /, **data: Any) -> None:
        """Tell what the scheduler says in the words of a run."""
        if self._began is None:
            self._held.append((name, data))
            return
        match name:
            case "told":
                self.bus.emit(data["event"], **{**data["data"], "worker": data["worker"]})
            case "commit":
                self._committed(data)
            case "loss":
                self.bus.emit("lost", text=f"{data['worker']}: {data['reason']}", **data)
            case "done":
                self._reason, self._done = data["reason"], data["done"]
            case "hold" | "checkpoint":
                self._bind(name, data)
            case "silent":
                self._silent.add(data["worker"])
            case "expelled":
                self.crew.end_process(data["worker"])
            case _:
                if name == "snapshot" and self._binder is not None:
                    self._binder.written(data["sequence"])
                if name == "join":  # again, where it was only slow
                    self._silent.discard(data["worker"])
                self.bus.emit(name, **data)
        if self._binder is not None:
            self._tell_saved(self._binder.poll())

    def _bind(self, name: str, data: dict[str, Any]) -> None:
        """Have a checkpoint made, or see to it that one can be."""
        if self._binder is None:
            return
        if name == "hold":
            self._binder.hold(data["sequence"])
        else:
            self._binder.bind(data["versions"], data["score"], data["messages"])

    def _tell_saved(self, outcomes: Iterable[Saved | NotSaved]) -> None:
        for outcome in outcomes:
            if isinstance(outcome, NotSaved):
                self.bus.emit("not_saved", step=outcome.step, reason=outcome.reason)
            else:
                self.bus.emit("saved", **{**asdict(outcome), "path": str(outcome.path)})

    def _committed(self, data: dict[str, Any]) -> None:
        """Count an update. A step is told when all parts of one more batch were learned from."""
        self._samples += data["rows"]
        self._since += data["rows"]
        self._losses += data["loss"]
        self._counts += data["count"]
        self.bus.emit("commit", **data)
        if data["done"] <= self.bus.step:
            return
        self.bus.step = data["done"]
        if self._counts:
            self._loss = self._losses / self._counts
        now = time.monotonic()
        self.bus.emit("step", loss=self._loss, samples=self._since, seconds=now - self._stepped)
        self._stepped, self._since = now, 0
        self._losses = self._counts = 0.0

    def close(self, error: BaseException | None) -> None:
        """The end of the job, and of all that was opened."""
        with self._closing:
            for name in self._silent:
                self.crew.end_process(name)
            if self._binder is not None:
                self._tell_saved(self._binder.close())
            if self._began is not None:
                seconds = time.monotonic() - self._began
                reason = self._reason or "interrupted"
                if error is not None:
                    known = isinstance(error, AllfuseError)
                    reason = str(error) if known else f"{type(error).__name__}: {error}"
                self.bus.emit(
                    "end",
                    reason=reason,
                    steps=self._done or self.bus.step,
                    seconds=seconds,
                    samples=self._samples,
                    samples_per_s=self._samples / max(seconds, 1e-9),
                    loss=self._loss,
                )
        if self.folder is not None:
            self.folder.close()
