"""What of one model's tensor is left out before it is fused with others.

Trained models differ from their base in many small numbers of which few matter: methods that fuse
changes drop most of them first. What is dropped is found by statistics of a whole tensor that are
summed over its blocks, so that no tensor has to be in memory whole.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, ClassVar

from allfuse.base.choice import Choice
from allfuse.base.errors import PlanError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Stretch:
    """A block of a tensor of one model.

    Attributes:
        values: float32 (k,), whole rows of it.
        begin: the place of the first of them in the tensor.
        shape: of the tensor.
        key: 128 bits that no other tensor of no other model has, for what is drawn at random.
    """

    values: Tensor
    begin: int
    shape: tuple[int, ...]
    key: int = 0

    @property
    def count(self) -> int:
        """Numbers in the whole tensor."""
        return prod(self.shape)

    @property
    def row(self) -> int:
        """Numbers in one row: of the last dim."""
        return self.shape[-1] if self.shape else 1


class Sift(ABC):
    """Leaves out a part of a tensor, after some turns of measuring it.

    In each turn `measure` is asked of every block and the answers are summed; `found` holds the
    sums of the turns before. Of turns in `running` it holds the sum over the blocks before this
    one.
    """

    running: ClassVar[frozenset[int]] = frozenset()

    @property
    def turns(self) -> int:
        """How often a tensor is measured before anything is left out."""
        return 0

    def measure(self, turn: int, stretch: Stretch, found: Sequence[Tensor]) -> Tensor:
        """This block's part of a statistic: int64, or float64 where it is summed in order."""
        raise AssertionError(f"{self} has no turn {turn}")

    @abstractmethod
    def apply(self, stretch: Stretch, found: Sequence[Tensor]) -> Tensor:
        """What is left of a block, (k,). May work in place on its values."""


def check_density(rule: Choice, density: float) -> None:
    """Refuse a density that is none. Raises PlanError."""
    if not 0 < density <= 1:
        raise PlanError(
            str(rule), "density is the part that is kept, above 0 and up to 1", "density=0.5"
        )
