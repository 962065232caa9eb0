"""How n values become one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from allfuse.base.choice import Choice
from allfuse.rule.sift import Sift, Stretch

if TYPE_CHECKING:  # plans are read without loading torch
    from torch import Tensor

SLICE = 1 << 14


@dataclass(frozen=True)
class Rule(Choice, ABC):
    """Pure tensor math on one block; the same object serves a stream, a shard and a round.

    fuses_weights: whether it makes weights of weights, or has a meaning for gradients only.
    linear: whether what is missing in one round may be added later, as error feedback does.
    of_changes: whether it fuses what changed since a base that all come from, to which the fused
        change is added; else the values themselves.
    base_optional: whether it fuses either: changes where there is a base, else the values.
    models: how many it fuses, where it is not any number.
    weighted: whether it looks at the weights.
    gathers: whether it needs every peer's value of an element at once; it travels only where a
        topology brings them together (`Topology.gathers`).
    """

    fuses_weights: ClassVar[bool] = True
    linear: ClassVar[bool] = False
    of_changes: ClassVar[bool] = False
    base_optional: ClassVar[bool] = False
    models: ClassVar[int | None] = None
    weighted: ClassVar[bool] = True
    gathers: ClassVar[bool] = False

    def sift(self, count: int) -> Sift | None:
        """What is left out of one model's tensor of so many numbers first; None: nothing."""
        return None

    @property
    def of_tensors(self) -> bool:
        """Whether it measures whole tensors, so that their pieces would come to something else."""
        return self.sift(MANY) is not None


MANY = 1 << 20  # numbers of a tensor in which any share is some of them


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
    """A rule that needs every peer's value of an element at once, and nothing of its neighbours."""

    gathers: ClassVar[bool] = True

    @abstractmethod
    def fuse(self, values: Tensor, weights: Tensor) -> Tensor:
        """The fused value (k,) of those of n peers: values (n, k), their weights (n,)."""


@dataclass(frozen=True)
class JointRule(Rule):
    """A rule that measures a whole tensor of all models together, before it fuses any of it.

    In each turn `measure` is asked of every block and the answers are summed; `found` holds the
    sums of the turns before. Of turns in `running` it holds the sum over the blocks before this
    one. The `values` of a stretch are (n, k): a row for each model.
    """

    gathers: ClassVar[bool] = True
    running: ClassVar[frozenset[int]] = frozenset()

    def turns(self, count: int) -> int:
        """How often a tensor of so many numbers is measured."""
        return 1

    @abstractmethod
    def measure(self, turn: int, stretch: Stretch, found: Sequence[Tensor]) -> Tensor:
        """A block's part of a statistic: int64, or float64 where it is summed in order."""

    @abstractmethod
    def fuse(self, stretch: Stretch, weights: Tensor, found: Sequence[Tensor]) -> Tensor:
        """The fused value (k,) of a block, by the models' weights (n,)."""

    @property
    def of_tensors(self) -> bool:
        return True


@dataclass(frozen=True)
class SpanRule(JointRule):
    """A rule that gives sum(c_i x_i), where the c follow from the lengths of the x and the angles
    between them: of the Gram matrix of a whole tensor.
    """

    @abstractmethod
    def coefficients(self, gram: Tensor, weights: Tensor) -> Tensor:
        """The c, float64 (n,), from gram[i, j] = <x_i, x_j>, float64 (n, n), and weights (n,)."""

    def measure(self, turn: int, stretch: Stretch, found: Sequence[Tensor]) -> Tensor:
        import torch

        n = len(stretch.values)
        gram: Tensor = stretch.values.new_zeros(n, n, dtype=torch.float64)
        for part in stretch.values.split(SLICE, dim=1):  # so that it stays in the cache
            wide = part.double()
            gram.addmm_(wide, wide.T)
        return gram

    def fuse(self, stretch: Stretch, weights: Tensor, found: Sequence[Tensor]) -> Tensor:
        shares = self.coefficients(found[0], weights.double()).tolist()
        total: Tensor = stretch.values[0] * shares[0]
        for value, share in zip(stretch.values[1:], shares[1:], strict=True):
            total.add_(value, alpha=share)
        return total
