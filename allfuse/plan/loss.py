"""What may become of a plan when a replica is lost: which plans permit which policy."""

from __future__ import annotations

import math
from dataclasses import replace

from allfuse.base.errors import PlanError, UserError
from allfuse.launcher.generation import LossPolicy, check_on_loss
from allfuse.plan.axes import Axis, Data, Site
from allfuse.plan.plan import Plan


def losable(plan: Plan) -> Axis | None:
    """The axis whose replicas the others can go on without: the outermost that divides the batch
    among more than one. None without one."""
    shared = (axis for axis in plan.axes if axis.replicates and axis.divides_batch)
    return next((axis for axis in shared if axis.n > 1), None)


def group_size(plan: Plan) -> int:
    """Ranks that leave together when one of them is lost: a replica of the outermost axis."""
    axis = losable(plan)
    return plan.workers if axis is None else plan.workers // axis.n


def least_replicas(plan: Plan) -> int:
    """How many replicas of the outermost axis must be left: its `min`."""
    axis = losable(plan)
    return (axis.min or 1) if isinstance(axis, Data | Site) else 1


def without_lost(plan: Plan, workers: int) -> Plan:
    """The plan of the workers that are left.

    >>> str(without_lost(Plan.parse("site(3, every=5) * data(2)"), 4))
    'site(2, every=5) * data(2)'
    """
    axis = losable(plan)
    if axis is None:
        return plan
    others = math.prod(each.n for each in plan.axes if each is not axis)
    left = tuple(replace(e, n=workers // others) if e is axis else e for e in plan.axes)
    return Plan(left)


def refuse_survival(plan: Plan, device: str) -> None:
    """Refuse to go on after losses where that was never seen to work.

    Raises:
        PlanError: ranks are on GPUs.
    """
    if device != "cpu" and plan.workers > 1:
        why = (
            f"--on-loss continue: ranks run on {device}, where it is not known yet whether those "
            "that are left can meet again; next: --on-loss restart"
        )
        raise PlanError(str(plan), why, "the same with --device cpu")


def loss_policy(plan: Plan, on_loss: str | None) -> LossPolicy:
    """What a killed worker means to the others, under a plan without servers. None: all stop.

    Raises:
        UserError: the plan does not permit it; says what can be.
    """
    policy = check_on_loss(on_loss or "stop")
    given = f"--on-loss {policy}"
    axis = losable(plan)
    if policy == "continue" and axis is None:
        raise UserError(
            f"{given}: {plan} has no second replica that could go on without the first; allowed: "
            "stop, restart, or a plan with several replicas, such as data(2)"
        )
    if policy == "continue" and isinstance(axis, Site) and axis.delay:
        raise UserError(
            f"{given}: under {plan} weights are on their way in the background when a worker is "
            "lost, and some sites would have taken them in and others not; allowed: stop, restart, "
            f"or {replace(axis, delay=0)}"
        )
    return LossPolicy(on_loss=policy, group=group_size(plan), least=least_replicas(plan))
