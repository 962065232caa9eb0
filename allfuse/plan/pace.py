"""At which steps sites fuse, in how many fragments and how late: what has a meaning together."""

from __future__ import annotations

from typing import Literal

from allfuse.base.errors import PlanError
from allfuse.plan.parse import clip
from allfuse.sync.outer import Average, Outer
from allfuse.topology import Topology


def refuse_pace(
    given: str,
    n: int,
    every: int | Literal["end"],
    fragments: object,
    delay: object,
    has_roles: bool,
) -> None:
    """Refuse fragments and delays that do not fit into the steps from round to round.

    Args:
        given: the axis as it was said.

    Raises:
        PlanError: says what fits.
    """
    if (fragments, delay) == (1, 0):
        return
    given = clip(given, 200)
    nearest = f"site({n}, every={every})"
    if not (type(fragments) is int and type(delay) is int and fragments >= 1 and delay >= 0):
        why = "fragments is a whole number from 1, and delay a whole number of steps from 0"
    elif every == "end":
        why = "weights that are fused once, at the end, are fused whole and waited for"
    elif fragments > every:
        why = f"each of {fragments} fragments is fused at a step of its own, once in {every} steps"
        nearest = _say(n, every, every, min(delay, every - 1))
    elif delay >= every:
        why = f"what is fused is taken in before it is fused again: delay is below every={every}"
        nearest = _say(n, every, fragments, every - 1)
    elif has_roles and delay >= every // fragments:
        why = (
            "what comes of one fragment is taken in before the next one is handed in: delay is "
            f"below every / fragments, {every} / {fragments}"
        )
        most = every // fragments - 1
        nearest = given.replace(f", delay={delay}", f", delay={most}" if most else "")
    else:
        return
    raise PlanError(given, why, nearest)


def refuse_mixing(
    given: str, n: int, topology: Topology, outer: Outer, fragments: int, delay: int
) -> None:
    """Refuse over a topology that only mixes what needs sites to agree on something.

    Args:
        given: the axis as it was said.

    Raises:
        PlanError: says what can be.
    """
    nearest = f"site({n}, topology={topology})"
    if not isinstance(outer, Average):
        why = (
            f"{outer} steps from what all sites agree on, and {topology} only brings them closer: "
            "their momenta would go apart"
        )
        raise PlanError(f"{nearest[:-1]}, outer={outer})", why, nearest)
    if fragments > 1 or delay:
        nearest = given.replace(f", fragments={fragments}", "").replace(f", delay={delay}", "")
        raise PlanError(clip(given, 200), f"{topology} mixes whole models, at once", nearest)


def _say(n: int, every: int, fragments: int, delay: int) -> str:
    parts = [str(n), f"every={every}"]
    parts += [f"fragments={fragments}"] * (fragments > 1) + [f"delay={delay}"] * (delay > 0)
    return f"site({', '.join(parts)})"
