"""How n values become one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

from allfuse.base.choice import Choice

if TYPE_CHECKING:  # plans are read without loading torch
    from torch import Tensor


@dataclass(frozen=True)
class Rule(Choice, ABC):
    """Pure tensor math on one block; the same object serves a stream, a shard and a round."""


@dataclass(frozen=True)
class SumRule(Rule):
    """A rule whose statistic is summed over the peers, in any order, by any topology.

    The fused value is `finish(sum(prepare(value_i, weight_i)), sum(weight_i))`.
    """

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
