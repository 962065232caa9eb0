"""A fusion: a rule, across a topology, when sync says, encoded by a codec, over a link."""

from __future__ import annotations

from dataclasses import dataclass, field

from allfuse.base.errors import PlanError
from allfuse.codec import Codec, Identity
from allfuse.rule import Mean, Rule, SumRule
from allfuse.sync import Bsp, Sync
from allfuse.topology import Native, Topology


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
        if not self.topology.exact and not isinstance(self.rule, Mean):
            raise PlanError(
                f"rule={self.rule}, topology={self.topology}",
                f"{self.topology} mixes by weights of its own, which make a mean",
                "rule=mean",
            )
        if not isinstance(self.rule, SumRule):
            raise PlanError(
                f"rule={self.rule}, topology={self.topology}",
                f"{self.rule} needs every peer's value at once and {self.topology} only sums",
                "rule=mean",
            )

    @property
    def sum_rule(self) -> SumRule:
        assert isinstance(self.rule, SumRule)  # what __post_init__ made sure of
        return self.rule


def choose(
    rule: Rule, topology: Topology | None, sync: Sync, codec: Codec
) -> tuple[Fusion, str | None]:
    """The fusion of an axis, and why its topology was taken when the plan left it open (auto)."""
    if topology is not None:
        return Fusion(rule=rule, topology=topology, sync=sync, codec=codec), None
    fusion = Fusion(rule=rule, topology=Native(), sync=sync, codec=codec)
    return fusion, "native: the link's own all-reduce"
