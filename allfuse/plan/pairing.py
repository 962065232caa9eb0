"""Which rules travel over which topologies."""

from __future__ import annotations

from allfuse.base.errors import PlanError
from allfuse.rule import GatherRule, Mean, Rule
from allfuse.topology import Topology


def refuse_pairing(rule: Rule, topology: Topology | None) -> None:
    """Refuse a rule and a topology that have no meaning together; None is chosen to fit.

    Raises:
        PlanError: says with which topology, or which rule, it can be.
    """
    if topology is None:
        return
    given = f"rule={rule}, topology={topology}"
    if isinstance(rule, GatherRule) and not topology.gathers:
        nearest = f"rule={rule}, topology=central"
        raise PlanError(
            given, f"{rule} needs every peer's value at once and {topology} only sums", nearest
        )
    if not topology.exact and not isinstance(rule, Mean):
        why = f"{topology} mixes by weights of its own, which make a mean"
        raise PlanError(given, why, f"rule=mean, topology={topology}")
