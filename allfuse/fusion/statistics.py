"""Batch statistics over the global batch: BatchNorm that gives the numbers of one process.

torch's own SyncBatchNorm refuses CPU tensors, so this is written here, for every device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from allfuse.link import Link


class Normalize(torch.autograd.Function):
    """(x - mean) / sqrt(var + eps) with mean and variance over all peers' rows of each channel.

    x: (rows, channels, positions). Phases:
      forward:  each peer fills its slot of (n, 3, channels) with count, mean and sum of squared
                deviations, one sum over the link; combined pairwise (Chan et al. 1979), which loses
                no digits to cancellation as a sum of squares would.
      backward: one sum of (2, channels): sum(dy) and sum(dy * normalized).
    Both use float32 or wider.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, link: Link, weight: float, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        count = weight * x.shape[0] * x.shape[2]
        local_mean = wide.mean(dim=(0, 2))
        squares = (wide - local_mean[:, None]).square().sum(dim=(0, 2)) * weight
        slots = wide.new_zeros(link.size, 3, x.shape[1])
        slots[link.rank, 0] = count
        slots[link.rank, 1] = local_mean
        slots[link.rank, 2] = squares
        link.all_reduce(slots, "fuse batch statistics").wait()
        counts, means, all_squares = slots.unbind(dim=1)
        total = counts.sum(dim=0)
        mean = (counts * means).sum(dim=0) / total
        spread = all_squares.sum(dim=0) + (counts * (means - mean).square()).sum(dim=0)
        variance = spread / total
        scale = torch.rsqrt(variance + eps)
        normalized = (wide - mean[:, None]) * scale[:, None]
        ctx.save_for_backward(normalized, scale, total)
        ctx.link, ctx.weight, ctx.dtype = link, weight, x.dtype
        ctx.mark_non_differentiable(mean, variance, total)
        return normalized.to(x.dtype), mean, variance, total

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *unused: Tensor) -> tuple[Tensor | None, None, None, None]:
        normalized, scale, total = ctx.saved_tensors
        wide = dy.to(normalized.dtype)
        sums = torch.stack([wide.sum(dim=(0, 2)), (wide * normalized).sum(dim=(0, 2))])
        ctx.link.all_reduce(sums, "fuse gradients of batch statistics").wait()
        mean_dy, mean_dy_normalized = sums / total
        dx = wide - ctx.weight * (mean_dy[:, None] + normalized * mean_dy_normalized[:, None])
        return (dx * scale[:, None]).to(ctx.dtype), None, None, None


class GlobalBatchNorm(_BatchNorm):
    """BatchNorm over the global batch, in any number of spatial dims. Drop-in for BatchNorm1d-3d.

    `weight_of_rows` is 1, or 0 on a rank that only stands in for a batch without samples: then its
    rows take part in the transfers and in nothing else.
    """

    link: Link
    weight_of_rows: float = 1.0

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"BatchNorm needs at least 2 dims, got {input.dim()}")

    def forward(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        if not self.training and self.track_running_stats:
            frozen: Tensor = F.batch_norm(
                input,
                self.running_mean,
                self.running_var,
                self.weight,
                self.bias,
                False,
                0.0,
                self.eps,
            )
            return frozen
        rows = input.reshape(input.shape[0], input.shape[1], -1)
        made: tuple[Tensor, Tensor, Tensor, Tensor]
        made = Normalize.apply(rows, self.link, self.weight_of_rows, self.eps)  # type: ignore[no-untyped-call]
        normalized, mean, variance, total = made
        if self.training and self.track_running_stats:
            self._remember(mean, variance, total)
        normalized = normalized.reshape(input.shape)
        shape = (1, -1, *(1,) * (input.dim() - 2))
        if self.weight is not None:
            normalized = normalized * self.weight.view(shape)
        if self.bias is not None:
            normalized = normalized + self.bias.view(shape)
        return normalized

    @torch.no_grad()
    def _remember(self, mean: Tensor, variance: Tensor, total: Tensor) -> None:
        """Running statistics as torch keeps them: with the unbiased variance."""
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        momentum = self.momentum
        if momentum is None:
            momentum = 1.0 / float(self.num_batches_tracked)
        unbiased = variance * (total / (total - 1).clamp(min=1))
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), momentum)


def globalize_batch_norm(model: nn.Module, link: Link) -> list[GlobalBatchNorm]:
    """Make every BatchNorm of a model use the statistics of the global batch, in place.

    Parameters, buffers and names stay the same objects, so optimizers that were built before and
    checkpoints fit as they are. Lazy layers must have run once.
    """
    changed = []
    for module in model.modules():
        if isinstance(module, nn.SyncBatchNorm | GlobalBatchNorm):
            continue
        if isinstance(module, _BatchNorm) and not isinstance(
            module, nn.modules.lazy.LazyModuleMixin
        ):
            module.__class__ = GlobalBatchNorm
            assert isinstance(module, GlobalBatchNorm)
            module.link = link
            changed.append(module)
    return changed
