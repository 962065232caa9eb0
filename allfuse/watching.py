"""How a run is watched: the console, events.jsonl, TensorBoard files, a profiler trace."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from allfuse.base.errors import UserError
from allfuse.training.session import Session

if TYPE_CHECKING:
    from allfuse.base.events import Bus, Event
    from allfuse.store.run import RunFolder


@dataclass(frozen=True, kw_only=True)
class Watching:
    """How a session is watched: the console, TensorBoard files, a profiler trace of some steps."""

    quiet: bool = False
    to_stderr: bool = False
    tensorboard: bool = False
    profile: str | None = None


def watch(session: Session, watching: Watching) -> None:
    """Subscribe the sinks of rank 0. Where a scheduler hands out the work, they are with it."""
    if watching.profile is not None:
        _profile(session, watching.profile)
    if watching.tensorboard:
        _require("tensorboard", "report")
    if session.apart is not None:
        session.apart.facts["watching"] = asdict(watching)
    elif session.is_main:
        watch_bus(session.bus, watching, lambda: session.keeper.folder, session.at_close)
    else:  # it may come to be, when those before it are lost
        session.when_main.append(
            lambda bus: watch_bus(bus, watching, lambda: session.keeper.folder, session.at_close)
        )


def watch_bus(
    bus: Bus,
    watching: Watching,
    folder: Callable[[], RunFolder | None],
    at_close: Callable[[Callable[[], None]], None],
) -> None:
    """Subscribe the sinks: console, events.jsonl and what else was asked for.

    Args:
        folder: gives the run folder, if any, once training starts.
        at_close: takes what is to be called at the end.
    """

    def warn(text: str) -> None:
        bus.emit("warning", text=text)

    if watching.quiet:
        bus.subscribe(_tell_trouble, ["warning", "not_saved"])
    else:
        from allfuse.observe import Console

        console = Console(sys.stderr if watching.to_stderr else sys.stdout)
        bus.subscribe(console)
        at_close(console.close)

    def open_files(event: Event) -> None:
        found = folder()
        if found is None:
            return
        from allfuse.observe import JsonLines, TensorBoard

        lines = JsonLines(found.events_path, append=True, warn=warn)
        lines(event)
        bus.subscribe(lines)
        at_close(lines.close)
        if watching.tensorboard:
            board = TensorBoard(found.tensorboard_path, warn=warn)
            board(event)
            bus.subscribe(board)
            at_close(board.close)

    bus.subscribe(open_files, ["start"])


def _tell_trouble(event: Event) -> None:
    """What also a quiet run has to say."""
    text = event.data.get("text") or f"step {event.data.get('step')}: {event.data.get('reason')}"
    print(f"allfuse: {event.name.replace('_', ' ')}: {text}", file=sys.stderr, flush=True)


def _profile(session: Session, steps: str) -> None:
    """A torch profiler trace of chosen steps, on every rank, in the run folder."""
    from allfuse.observe import Profile

    profile = Profile(steps, session.keeper.path or Path("."), rank=session.rank)

    def written(path: Path | None) -> None:
        if path is not None:
            session.bus.emit("note", text=f"wrote {path}")

    session.on("start", lambda s, event: profile.before_step(s.steps + 1))

    def after(s: Session, event: Event) -> None:
        written(profile.after_step(s.steps))
        profile.before_step(s.steps + 1)

    session.on("step", after)
    session.at_close(lambda: written(profile.close()))


def _require(package: str, extra: str) -> None:
    """Refuse early what a missing package would make fail later."""
    if importlib.util.find_spec(package) is None:
        raise UserError(
            f"{package} is not installed; next: pip install {package}, or allfuse[{extra}]"
        )
