"""What a method that looks at data promises."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor, nn

from allfuse.base.choice import Choice

if TYPE_CHECKING:
    from allfuse.merge.learned.ingredients import Ingredients


@dataclass(frozen=True)
class Learned(Choice, ABC):
    """A method of fusing that looks at what models do with their data.

    of_changes: whether it fuses what changed since a base, and needs one.
    """

    of_changes: ClassVar[bool] = False

    @abstractmethod
    def fuse(self, mix: Ingredients) -> dict[str, Tensor]:
        """The fused tensors by the names of the module's parameters; of others the mean is taken.

        Raises:
            MergeError: models or data that it cannot fuse by.
        """

    @abstractmethod
    def held_bytes(self, module: nn.Module, models: int) -> int:
        """What it holds in memory at most, beside activations."""


def float_bytes(module: nn.Module) -> int:
    """Bytes of all parameters and buffers in float32."""
    return sum(4 * tensor.numel() for tensor in (*module.parameters(), *module.buffers()))
