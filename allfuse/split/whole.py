"""The model is whole on each rank: every replica is one rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from allfuse.split.base import Split


class Whole(Split):
    """A gradient is final when autograd has accumulated it in the last pass of a step."""

    def __init__(self) -> None:
        self._last = False

    def watch(self, parameters: Sequence[Parameter], final: Callable[[int], None]) -> None:
        def hook(index: int) -> Callable[[Tensor], None]:
            def accumulated(parameter: Tensor) -> None:
                if self._last:
                    final(index)

            return accumulated

        for index, parameter in enumerate(parameters):
            parameter.register_post_accumulate_grad_hook(hook(index))

    def backward(self, loss: Tensor, inputs: Sequence[Parameter], last: bool) -> None:
        self._last = last
        try:
            torch.autograd.backward(loss, inputs=list(inputs) or None)
        finally:
            self._last = False
