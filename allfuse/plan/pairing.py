"""Which rules and codecs travel over which topologies, in and out of step."""

from __future__ import annotations

from allfuse.base.errors import PlanError
from allfuse.codec import Codec, MessageCodec, SumCodec
from allfuse.plan.parse import clip
from allfuse.rule import Mean, Rule
from allfuse.sync import Asp, Sync
from allfuse.topology import Native, Topology
from allfuse.topology.central import Central
from allfuse.topology.gossip import Gossip


def refuse_pairing(
    rule: Rule, topology: Topology | None, codec: Codec, sync: Sync | None = None
) -> None:
    """Refuse a rule, a topology and a codec that have no meaning together; None is chosen to fit.

    sync: in step where it is not told.

    Raises:
        PlanError: says with which topology, rule or codec it can be.
    """
    if not codec.lossless and not rule.linear:
        why = (
            f"{codec} sends later what it leaves out now, which only a mean can add up, and {rule} "
            "is none"
        )
        raise PlanError(f"rule={rule}, codec={codec}", why, f"rule={rule}, codec=identity")
    if topology is None:
        return
    given = f"rule={rule}, topology={topology}"
    if rule.gathers and not topology.gathers:
        nearest = f"rule={rule}, topology=central"
        raise PlanError(
            given, f"{rule} needs every peer's value at once and {topology} only sums", nearest
        )
    if not topology.exact and not isinstance(rule, Mean):
        why = f"{topology} mixes by weights of its own, which make a mean"
        raise PlanError(given, why, f"rule=mean, topology={topology}")
    given = f"topology={topology}, codec={codec}"
    in_step = sync is None or sync.bound == 0
    if not topology.exact and not codec.lossless and in_step:
        why = (
            f"{topology} mixes weights, and in step nobody would add again what {codec} leaves "
            "out; with sync=asp two workers keep account of it"
        )
        raise PlanError(given, why, f"topology={topology}, codec=identity")
    if isinstance(topology, Native) and isinstance(codec, MessageCodec):
        why = f"messages of {codec} cannot be summed, and {topology} only sums"
        raise PlanError(given, why, f"topology=central, codec={codec}")


def refuse_out_of_step(
    axis: str, n: int, sync: Sync, topology: Topology | None, rule: Rule, codec: Codec
) -> None:
    """Refuse choices that nobody can carry out where peers are out of step, or have servers.

    Raises:
        PlanError: says what can be, in or out of step.
    """
    named = isinstance(topology, Central) and topology.servers is not None
    if sync.bound == 0 and not named:
        return
    given = f"{axis}({n}, topology={topology or 'auto'}, sync={sync})"
    if isinstance(topology, Gossip):
        if isinstance(sync, Asp) and sync.scaled:
            why = f"{topology} has no updates that could count less: two peers meet at their mean"
            raise PlanError(given, why, f"{axis}({n}, topology={topology}, sync=asp)")
        if isinstance(codec, SumCodec):
            why = f"{codec} encodes a sum of all peers together, and here two meet at a time"
            raise PlanError(f"{given[:-1]}, codec={codec})", why, f"{given[:-1]}, codec=int8)")
        return
    if not (topology is None or isinstance(topology, Central)):
        why = f"{topology} needs all peers at once, and sync={sync} lets none wait for another"
        raise PlanError(given, why, f"{axis}({n}, topology=central, sync={sync})")
    if not isinstance(rule, Mean):
        why = f"servers take updates one by one, and {rule} needs those of all peers"
        raise PlanError(f"{given[:-1]}, rule={rule})", why, f"{axis}({n}, rule={rule})")
    if isinstance(codec, SumCodec):
        why = f"{codec} encodes a sum of all peers together, and servers take updates one by one"
        raise PlanError(f"{given[:-1]}, codec={codec})", why, f"{given[:-1]}, codec=int8)")


def refuse_balance(axis: str, n: int, balance: object, has_roles: bool) -> None:
    """Refuse what is no way to share out batches, and shares by speed where others hand out work.

    Raises:
        PlanError: says what can be.
    """
    if balance not in ("even", "speed"):
        why = f"there is no balance {clip(repr(balance), 40)}"
        raise PlanError(f"data({n}, balance=...)", why, allowed="even, speed")
    if balance == "speed" and has_roles:
        why = (
            "a scheduler hands out the work in equal parts, to whoever is ready for more; "
            "balance=speed is for replicas in step, without servers"
        )
        raise PlanError(axis, why, f"data({n}, balance=speed)")
