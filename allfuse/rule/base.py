"""How n values become one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from allfuse.base.choice import Choice

if TYPE_CHECKING:  # plans are read without loading torch
    from torch import Tensor


@dataclass(frozen=True)
class Rule(Choice, ABC):
    """Pure tensor math on one block; the same object serves a stream, a shard and a round.

    fuses_weights: whether it makes weights of weights, or has a meaning for gradients only.
    linear: whether what is missing in one round may be added later, as error feedback does.
    """

    fuses_weights: ClassVar[bool] = True
    linear: ClassVar[bool] = False


@dataclass(frozen=True)
class SumRule(Rule):
    """A rule whose statistic is summed over the peers, in any order, by any topology.

    The fused value is `finish(sum(prepare(value_i, weight_i)), sum(weight_i))`.
    """

    needs_norm: ClassVar[bool] = False

    def shrink(self, norm: float) -> float:
        """What a peer's value is multiplied by first, by the L2 norm of all of it.

        Asked only where `needs_norm`: nothing can be sent then before all of it is known.
        """
        return 1.0

    @abstractmethod
    def prepare(self, value: Tensor, weight: float) -> Tensor:
        """What this peer adds to the sum. Works in place on `value` and returns it."""

    @abstractmethod
    def finish(self, total: Tensor, weight: float) -> Tensor:
        """The fused value from the sum and the sum of weights. Works in place on `total`."""


@dataclass(frozen=True)
class GatherRule(Rule):
    """A rule that needs every peer's value of an element at once.

    It travels only where a topology brings them together (`Topology.gathers`).
    """

    @abstractmethod
    def fuse(self, values: Tensor, weights: Tensor) -> Tensor:
        """The fused value (k,) of those of n peers: values (n, k), their weights (n,)."""
