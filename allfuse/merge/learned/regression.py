"""The least-squares problem of one layer: weights whose outputs are nearest to those of n models,
each on its own inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from allfuse.base.errors import MergeError
from allfuse.merge.learned.layers import Layer

SMALLEST = 1e-7
"""Of the pivots of a Cholesky factor, the smallest to the largest: below, digits are lost."""


class Regression:
    """Sums over models of one layer, float64 on the layer's device.

    With G_i the mean of x x^T over a model's inputs, off its diagonal times `alpha`, it gives

        W = (sum(w_i G_i) + r I)^-1 (sum(w_i G_i W_i) + r sum(w_i W_i)),  r = ridge * mean(diag)

    (Jin et al. 2023, arXiv:2212.09849, equation 2 and section 4.2; there r is 0). The ridge draws
    to the mean of the weights, which is what inputs that are always 0 get.
    """

    def __init__(self, layer: Layer, alpha: float, ridge: float) -> None:
        self.layer, self.alpha, self.ridge = layer, alpha, ridge
        size = (layer.groups, layer.size)
        self._gram = layer.weight.new_zeros(*size, layer.size, dtype=torch.float64)
        self._right = layer.weight.new_zeros(*size, layer.outputs, dtype=torch.float64)
        self._mean = torch.zeros_like(self._right)

    def add(self, share: float, gram: Tensor, rows: int, weight: Tensor) -> None:
        """A model: its Gram matrix (groups, size, size), a sum over rows, and its weight."""
        matrices = self.layer.matrices(weight)
        scaled = gram * (self.alpha * share / rows)
        ends = gram.diagonal(dim1=1, dim2=2) * (share / rows)
        scaled.diagonal(dim1=1, dim2=2).copy_(ends)
        self._gram += scaled
        self._right += scaled @ matrices
        self._mean.add_(matrices, alpha=share)

    def solve(self) -> Tensor:
        """The layer's weight.

        Raises:
            MergeError: more than one would be the nearest.
        """
        gram, size = self._gram, self.layer.size
        ridge = self.ridge * gram.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
        ridge = torch.where(ridge > 0, ridge, float(self.ridge > 0))  # nothing comes in: the mean
        factor, failed = torch.linalg.cholesky_ex(gram + ridge * torch.eye(size).to(gram))
        pivots = factor.diagonal(dim1=1, dim2=2)
        if bool(failed.any()) or bool((pivots.amin(1) < SMALLEST * pivots.amax(1)).any()):
            raise MergeError(
                f"what comes into {self.layer.parameter} leaves it open: the Gram matrix of "
                f"{size} x {size} has no inverse (alpha={self.alpha}, ridge={self.ridge}); next: "
                "more --examples, alpha below 1, or a ridge such as 1e-6"
            )
        return self.layer.as_weight(torch.cholesky_solve(self._right + ridge * self._mean, factor))
