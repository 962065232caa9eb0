"""BatchNorm's running statistics anew, for weights that no training step has seen."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from allfuse.base.errors import DataError
from allfuse.job import default_forward


def estimate_statistics(
    model: nn.Module,
    batches: Iterable[Any],
    forward: Callable[[nn.Module, Any], Any] | None = None,
) -> int:
    """Replace the running statistics of every BatchNorm by their mean over some batches; how many
    modules there are. Without any no batch is asked for.

    Weights that were averaged or merged have other activations than those that the statistics were
    taken of (Izmailov et al. 2018, arXiv:1803.05407, section 3.2). The model runs as in training,
    without gradients, and all batches count alike, as in torch.optim.swa_utils.update_bn. Modules
    that keep no statistics are left alone. If a batch raises, the old statistics are back.

    Args:
        batches: as the job has them, on the model's device.
        forward: `forward(model, batch)`; by default as for `Job`.

    Raises:
        DataError: there are no batches.
    """
    norms = norms_of(model)
    if not norms:
        return 0
    run = forward or default_forward
    modes = {module: module.training for module in model.modules()}
    momenta = [norm.momentum for norm in norms]
    before = [[buffer.clone() for buffer in norm.buffers(recurse=False)] for norm in norms]
    seen = 0
    try:
        model.train()
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # a cumulative mean
        with torch.no_grad():
            for batch in batches:
                run(model, batch)
                seen += 1
        if not seen:
            raise DataError(
                "statistics of BatchNorm are to be estimated, and there are no batches; next: "
                "training data with samples"
            )
    except BaseException:
        _put_back(norms, before)
        raise
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module, mode in modes.items():
            module.training = mode
    return len(norms)


def norms_of(model: nn.Module) -> list[_BatchNorm]:
    """The modules of a model that keep running statistics of batches."""
    return [
        module
        for module in model.modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    ]


@torch.no_grad()
def _put_back(norms: list[_BatchNorm], before: list[list[torch.Tensor]]) -> None:
    for norm, kept in zip(norms, before, strict=True):
        for buffer, value in zip(norm.buffers(recurse=False), kept, strict=True):
            buffer.copy_(value)
