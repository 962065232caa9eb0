"""A fusion: a rule, across a topology, when sync says, encoded by a codec, over a link."""

from __future__ import annotations

from dataclasses import dataclass, field

from allfuse.codec import Codec, Identity, MessageCodec
from allfuse.plan.pairing import refuse_pairing
from allfuse.rule import Mean, Rule
from allfuse.sync import Bsp, Sync
from allfuse.topology import Native, Topology
from allfuse.topology.central import Central
from allfuse.topology.exchange import Exchange


@dataclass(frozen=True, kw_only=True)
class Fusion:
    """The four choices that a replica axis makes, put together.

    Raises:
        PlanError: the choices have no meaning together.
    """

    rule: Rule = field(default_factory=Mean)
    topology: Topology = field(default_factory=Native)
    sync: Sync = field(default_factory=Bsp)
    codec: Codec = field(default_factory=Identity)

    def __post_init__(self) -> None:
        refuse_pairing(self.rule, self.topology, self.codec, self.sync)


def choose(
    rule: Rule, topology: Topology | None, sync: Sync, codec: Codec, peers: int
) -> tuple[Fusion, str | None]:
    """The fusion of an axis of so many peers, and why its topology was taken when the plan left it
    open (auto)."""
    if topology is not None:
        return Fusion(rule=rule, topology=topology, sync=sync, codec=codec), None
    if rule.gathers:
        fusion = Fusion(rule=rule, topology=Central(), sync=sync, codec=codec)
        return fusion, f"central: {rule} needs every peer's value at once"
    if tells_all(codec, peers):
        fusion = Fusion(rule=rule, topology=Exchange(), sync=sync, codec=codec)
        return fusion, f"exchange: a sum of {codec} would lose most if it were encoded again"
    if isinstance(codec, MessageCodec):
        fusion = Fusion(rule=rule, topology=Central(), sync=sync, codec=codec)
        return fusion, f"central: sums of {codec} are encoded again at one place only"
    fusion = Fusion(rule=rule, topology=Native(), sync=sync, codec=codec)
    return fusion, "native: the link's own all-reduce"


def tells_all(codec: Codec, peers: int) -> bool:
    """Whether each message goes to all peers: while that is no more than a ring sends of values as
    they are."""
    if not (isinstance(codec, MessageCodec) and codec.spreads):
        return False
    part = codec.encoded_bytes(MANY) / (4 * MANY)
    return part * peers <= 2


MANY = 1_000_000  # values, of which a codec's usual share can be told
