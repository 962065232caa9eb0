"""What a session does at its end, however it ends."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from allfuse.store.run import AVERAGE
from allfuse.training.averaging import complete
from allfuse.training.snapshot import export_models

if TYPE_CHECKING:
    from allfuse.training.session import Session


def end(s: Session, error: BaseException | None) -> None:
    """Save and export if nothing went wrong, tell of it, and give all back."""
    with contextlib.ExitStack() as closing:  # the last is called first
        for closer in reversed(s.closers):
            closing.callback(closer)
        closing.callback(lambda: s.place.close(error))
        closing.callback(s.rounds.close)
        if s.apart is not None:
            closing.callback(s.apart.close)
        try:
            if error is None:
                finish(s)
                s.place.world.step = None  # a script that goes on does not train
        except BaseException as failure:
            error = failure
            raise
        finally:
            with contextlib.suppress(Exception):
                s.keeper.tell_outcomes()
            closing.callback(s.keeper.close, abandon=error is not None)
            s.teller.end(error)


def finish(s: Session) -> None:
    """What a session does at its end when nothing went wrong."""
    s.course.close_learned_step()
    if s.teller.began is None:
        return
    complete(s)
    if s.apart is not None:
        if s.apart.finishes:
            export_models(s, s.apart.folder)
            s.apart.save()
        return

    def export() -> None:
        with s.rounds.fused_for_a_moment(s.models.values()):
            if s.keeper.path is not None:
                export_models(s, s.keeper.folder)
        if s.averages and s.keeper.path is not None:
            with s.averaged():
                export_models(s, s.keeper.folder, AVERAGE)

    s.survival.leave_together(export)
    s.save(block=True)
