"""Layers that are linear in their weights, and the rows that these multiply.

y = x W + b      rows (n, d), matrix (d, out): a linear layer
                 groups of them for a convolution, whose rows are the patches it sees
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from math import prod

import torch.nn.functional as F
from torch import Tensor, nn

LARGEST = 8192
"""Inputs of a layer up to which its Gram matrix is taken: 512 MB in float64."""


@dataclass(frozen=True)
class Layer:
    """A linear layer, or a convolution over one or two dims.

    Attributes:
        groups, size, outputs: its weight is this many matrices (size, outputs).
    """

    name: str
    module: nn.Module
    groups: int
    size: int
    outputs: int

    @property
    def weight(self) -> Tensor:
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return weight.detach()

    @property
    def parameter(self) -> str:
        """The name of its weight."""
        return f"{self.name}.weight" if self.name else "weight"

    @property
    def gram_bytes(self) -> int:
        return 8 * self.groups * self.size**2

    def matrices(self, weight: Tensor) -> Tensor:
        """Its weight in float64 as matrices (groups, size, outputs)."""
        return weight.double().reshape(self.groups, self.outputs, self.size).transpose(1, 2)

    def as_weight(self, matrices: Tensor) -> Tensor:
        """Matrices as its weight."""
        return matrices.transpose(1, 2).reshape(self.weight.shape).to(self.weight.dtype)

    def gram(self, given: Tensor) -> tuple[Tensor, int]:
        """The Gram matrix of what comes in, float64 (groups, size, size), and how many rows it is
        the sum over."""
        rows = self._rows(given.detach()).double()
        return rows.transpose(1, 2) @ rows, rows.shape[1]

    def _rows(self, given: Tensor) -> Tensor:
        """(groups, n, size) of what comes in."""
        layer = self.module
        if isinstance(layer, nn.Linear):
            return given.reshape(1, -1, self.size)
        assert isinstance(layer, nn.Conv1d | nn.Conv2d)
        spatial = len(layer.kernel_size)
        if given.dim() == spatial + 1:
            given = given.unsqueeze(0)  # a sample without a dim for samples
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        given = F.pad(given, layer._reversed_padding_repeated_twice, mode)
        kernel, stride, dilation = layer.kernel_size, layer.stride, layer.dilation
        if spatial == 1:
            given = given.unsqueeze(2)
            kernel, stride, dilation = (1, *kernel), (1, *stride), (1, *dilation)
        patches = F.unfold(given, kernel, dilation=dilation, stride=stride)
        patches = patches.reshape(len(patches), self.groups, self.size, -1)
        return patches.permute(1, 0, 3, 2).reshape(self.groups, -1, self.size)


def find_layers(module: nn.Module) -> dict[str, Layer]:
    """The layers of a module by name: those whose weight is no other module's too, and whose Gram
    matrix is not too large."""
    uses = Counter(
        id(parameter) for part in module.modules() for parameter in part.parameters(recurse=False)
    )
    found = {}
    for name, part in module.named_modules():
        layer = _layer(name, part)
        if layer is not None and uses[id(part.weight)] == 1 and layer.size <= LARGEST:
            found[name] = layer
    return found


def _layer(name: str, part: nn.Module) -> Layer | None:
    if isinstance(part, nn.Linear):
        return Layer(name, part, 1, part.in_features, part.out_features)
    if isinstance(part, nn.Conv1d | nn.Conv2d):
        size = part.in_channels // part.groups * prod(part.kernel_size)
        return Layer(name, part, part.groups, size, part.out_channels // part.groups)
    return None
