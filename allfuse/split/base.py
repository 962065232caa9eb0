"""Cuts model and data, and tells when a local gradient is final."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

from torch import Tensor
from torch.nn import Parameter


class Split(ABC):
    """How one replica's model lies on its ranks."""

    @abstractmethod
    def watch(self, parameters: Sequence[Parameter], final: Callable[[int], None]) -> None:
        """Call `final(i)` when parameter i's gradient is final in a backward pass that is last."""

    @abstractmethod
    def backward(self, loss: Tensor, inputs: Sequence[Parameter], last: bool) -> None:
        """Differentiate `loss` into the gradients of `inputs` (all, when empty).

        `last` says that nothing more is added to them in this step.
        """
