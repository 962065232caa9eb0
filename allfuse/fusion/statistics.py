"""Batch statistics over the global batch: BatchNorm that gives the numbers of one process.

torch's own SyncBatchNorm refuses CPU tensors, so this is written here, for every device.
"""

from __future__ import annotations

import copy
import time
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin

from allfuse.base.errors import UserError
from allfuse.link import Link


class Normalize(torch.autograd.Function):
    """(x - mean) / sqrt(var + eps) * gain + bias, over all peers' rows of each channel.

    x: (rows, channels, positions). Phases:
      forward:  each peer fills its slot of (n, 3, channels) with count, mean and sum of squared
                deviations, one sum over the link; combined pairwise (Chan et al. 1979), which loses
                no digits to cancellation as a sum of squares would.
      backward: one sum of (2, channels): sum(dy) and sum(dy * normalized).
    Both compute in float32 or wider. The gradients of gain and bias are this peer's own.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gain: Tensor | None, bias: Tensor | None, norm: GlobalBatchNorm
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        link, weight = norm.link, norm.weight_of_rows
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        slots = wide.new_zeros(link.size, 3, x.shape[1])
        if count := weight * x.shape[0] * x.shape[2]:
            variance, mean = torch.var_mean(wide, dim=(0, 2), correction=0)
            slots[link.rank, 0] = count
            slots[link.rank, 1] = mean
            slots[link.rank, 2] = variance * count
        norm.fuse(slots, "batch statistics")
        counts, means, squares = slots.unbind(dim=1)
        total = counts.sum(dim=0)
        if count <= 1 and total.max() <= 1:
            raise ValueError(
                f"Expected more than 1 value per channel when training, got {int(total.max())} in "
                "the batch of all workers"
            )
        mean = (counts * means).sum(dim=0) / total
        variance = (squares + counts * (means - mean).square()).sum(dim=0) / total
        scale = torch.rsqrt(variance + norm.eps)
        out = (wide - mean[:, None]) * (scale if gain is None else scale * gain)[:, None]
        if bias is not None:
            out += bias[:, None]
        ctx.save_for_backward(x, mean, scale, total, gain)
        ctx.norm, ctx.weight = norm, weight
        ctx.types = [None if tensor is None else tensor.dtype for tensor in (gain, bias)]
        ctx.mark_non_differentiable(mean, variance, total)
        return out.to(x.dtype), mean, variance, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, scale, total, gain = ctx.saved_tensors
        normalized = (x.to(mean.dtype) - mean[:, None]) * scale[:, None]
        wide = dy.to(mean.dtype)
        own = torch.stack([wide.sum(dim=(0, 2)), (wide * normalized).sum(dim=(0, 2))])
        if not ctx.weight:  # what a stand-in holds may even be infinite
            own = torch.zeros_like(own)
        sums = own.clone()
        ctx.norm.fuse(sums, "gradients of batch statistics")
        mean_dy, mean_dy_normalized = sums * (ctx.weight / total)
        dx = wide - mean_dy[:, None] - normalized * mean_dy_normalized[:, None]
        dx *= (scale if gain is None else scale * gain)[:, None]
        gain_type, bias_type = ctx.types
        return (
            dx.to(x.dtype),
            None if gain_type is None else own[1].to(gain_type),
            None if bias_type is None else own[0].to(bias_type),
            None,
        )


class GlobalBatchNorm(_BatchNorm):
    """BatchNorm over the global batch, in any number of spatial dims.

    `weight_of_rows` is 1, or 0 on a rank that only stands in for a batch without samples: then its
    rows take part in the transfers and in nothing else. `waited_s` counts the seconds in them. A
    copy keeps the link; what is pickled is the plain module again, for other processes have other
    links or none.
    """

    link: Link
    whose: str = ""
    weight_of_rows: float = 1.0
    waited_s: float = 0.0
    plain: ClassVar[type[_BatchNorm]]

    def fuse(self, values: Tensor, what: str) -> None:
        """Sum over all peers, in place."""
        begin = time.perf_counter()
        self.link.all_reduce(values, f"fuse {what}{self.whose}").wait()
        self.waited_s += time.perf_counter() - begin

    def forward(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)  # type: ignore[no-untyped-call]
        if not self.training and self.running_mean is not None:
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
        rows = input.flatten(2) if input.dim() > 2 else input.unsqueeze(2)
        made: tuple[Tensor, Tensor, Tensor, Tensor]
        made = Normalize.apply(rows, self.weight, self.bias, self)  # type: ignore[no-untyped-call]
        out, mean, variance, total = made
        if self.training and self.track_running_stats:
            self._remember(mean, variance, total)
        return out.reshape(input.shape)

    @torch.no_grad()
    def _remember(self, mean: Tensor, variance: Tensor, total: Tensor) -> None:
        """Running statistics as torch keeps them: with the unbiased variance."""
        momentum = self.momentum
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if momentum is None:
                momentum = 1.0 / float(self.num_batches_tracked)
        if self.running_mean is None or self.running_var is None or momentum is None:
            return
        unbiased = variance * (total / (total - 1))
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), momentum)

    def __deepcopy__(self, memo: dict[int, Any]) -> GlobalBatchNorm:
        made = self.__class__.__new__(self.__class__)
        memo[id(self)] = made
        made.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return made

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        ours = ("link", "whose", "weight_of_rows", "waited_s")
        state = {name: value for name, value in self.__dict__.items() if name not in ours}
        return object.__new__, (self.plain,), state


_twins: dict[type[nn.Module], type[GlobalBatchNorm]] = {}


def _global_twin(plain: type[nn.Module]) -> type[GlobalBatchNorm]:
    """The global twin of a class, of which it still is an instance to scripts that ask.

    Compilers leave its forward alone: transfers cannot be traced.
    """
    if plain not in _twins:
        forward = torch.compiler.disable(GlobalBatchNorm.forward)
        parts = {"plain": plain, "forward": forward, "__module__": __name__}
        _twins[plain] = type(f"Global{plain.__name__}", (GlobalBatchNorm, plain), parts)
    return _twins[plain]


def globalize_batch_norm(model: nn.Module, link: Link) -> list[GlobalBatchNorm]:
    """Make every BatchNorm of a model use the statistics of the global batch, in place.

    Parameters, buffers and names stay the same objects, so optimizers that were built before and
    checkpoints fit as they are.

    Raises:
        UserError: a module that this cannot be done to without changing what it computes.
    """
    found = [(name, module) for name, module in model.named_modules() if _is_local(module)]
    for name, module in found:
        if isinstance(module, LazyModuleMixin):
            _refuse(name, module, "has not seen a batch yet", "run the model once before s.model")
        if type(module).forward is not _BatchNorm.forward:
            _refuse(name, module, "has a forward of its own", "use torch's own BatchNorm")
    changed = []
    for name, module in found:
        module.__class__ = _global_twin(type(module))
        assert isinstance(module, GlobalBatchNorm)
        module.link, module.whose = link, f" of {name}"
        changed.append(module)
    return changed


def _is_local(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) and not isinstance(
        module, nn.SyncBatchNorm | GlobalBatchNorm
    )


def _refuse(name: str, module: object, why: str, remedy: str) -> None:
    raise UserError(
        f"{name} is a {type(module).__name__} that {why}, so it cannot use the statistics of the "
        f'global batch; next: {remedy}, or allow each worker its own: batch_statistics="local"'
    )
