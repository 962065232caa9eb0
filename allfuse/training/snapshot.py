"""Writes models to a run folder: the trained one, its average, and snapshots along the way."""

from __future__ import annotations

from typing import TYPE_CHECKING

from allfuse.base.errors import PlanError, UserError
from allfuse.plan import Plan
from allfuse.store.run import MODEL, SNAPSHOTS

if TYPE_CHECKING:
    from allfuse.store.run import RunFolder
    from allfuse.training.session import Session


def export_models(s: Session, folder: RunFolder | None, stem: str = MODEL) -> None:
    """Write the models of a session as they are, as `Keeper.export` does. All ranks call it."""
    if not s.split.cuts:
        s.keeper.export(s.weights(), folder, stem=stem)
        return
    from allfuse.training.exporting import export_shared

    export_shared(s, folder, stem)


def write_snapshot(s: Session) -> None:
    """What `Session.snapshot` does; see there."""
    refuse_snapshots(s.plan)
    s.course.close_learned_step()
    if s.keeper.path is None:
        return
    if s.keeper.checkpoints is None:
        raise UserError(
            "snapshot(): training has not begun, so there is no run folder yet; next: ask in or "
            "after a loop over s.batches(...)"
        )

    def work() -> None:
        with s.rounds.fused_for_a_moment(s.models.values()):
            export_models(s, s.keeper.folder, f"{SNAPSHOTS}/step-{s.steps:06d}")

    s.survival.together("all", work)
    s._note_weights()  # those of sites became their mean meanwhile


def refuse_snapshots(plan: Plan) -> None:
    """Refuse snapshots where no rank has the weights of a step.

    Raises:
        PlanError: says with which plan there can be some.
    """
    if plan.outer is not None:
        why = "replicas are out of step, and none has the weights of every step"
        raise PlanError(f"snapshots under {plan}", why, f"data({plan.workers})")
