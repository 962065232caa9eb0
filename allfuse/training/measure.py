"""Figures over a whole data set: every sample once, whatever the number of workers."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from allfuse.base.errors import JobError
from allfuse.base.tensors import map_nest
from allfuse.fusion.statistics import GlobalBatchNorm
from allfuse.job import Metric, MetricFunction
from allfuse.split.elsewhere import ELSEWHERE

if TYPE_CHECKING:
    from allfuse.link import Link
    from allfuse.split.data import IterableLoader, Loader
    from allfuse.split.pipe.pipeline import Pipeline


def sum_and_count(value: Any, rows: int, name: str) -> tuple[Tensor, float, float]:
    """What a loss or metric returned, as (tensor, factor, count): their product is a sum over
    `count` things.

    Allowed: a 0-d tensor or number (mean over the rows), a tensor of one value for each row, or
    (sum, count).

    Raises:
        JobError: something else, or a count that is no number from 0.
    """
    if isinstance(value, tuple) and len(value) == 2:
        tensor, count = _as_float(value[0], name), float(value[1])
        if not (tensor.dim() == 0 and 0 <= count < math.inf):
            raise JobError(
                f"{name} returned (sum, count) with a sum of shape {tuple(tensor.shape)} and a "
                f"count of {count}; allowed: a sum of one number (0-d), and a count from 0"
            )
        return tensor, 1.0, count
    tensor = _as_float(value, name)
    if tensor.dim() == 0:
        return tensor, float(rows), float(rows)
    if tensor.shape[0] == rows and tensor.numel() == rows:
        return tensor.sum(), 1.0, float(rows)
    raise JobError(
        f"{name} returned a tensor of shape {tuple(tensor.shape)} for {rows} samples; allowed: "
        f"a mean (0-d), one value for each sample ({rows},), or (sum, count)"
    )


def _as_float(value: Any, name: str) -> Tensor:
    """A tensor in which sums keep their digits: float32 or wider."""
    if isinstance(value, Tensor) and not value.is_complex():
        short = value.dtype in (torch.bfloat16, torch.float16)
        return value.float() if short or not value.is_floating_point() else value
    if isinstance(value, bool | int | float | np.generic | np.ndarray):
        return torch.as_tensor(value).double()
    kind = f"a {value.dtype} tensor" if isinstance(value, Tensor) else f"a {type(value).__name__}"
    raise JobError(
        f"{name} returned {'None' if value is None else kind}; allowed: a real tensor or number, "
        "or (sum, count)"
    )


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch with its tensors on a device, without waiting for copies from pinned memory."""
    if device.type == "cpu":
        return batch
    return map_nest(
        lambda leaf: leaf.to(device, non_blocking=True) if isinstance(leaf, Tensor) else leaf, batch
    )


@torch.no_grad()
def measure(
    model: nn.Module,
    loader: Loader | IterableLoader,
    metrics: Mapping[str, MetricFunction | Metric],
    *,
    forward: Callable[[nn.Module, Any], Any],
    link: Link,
    device: torch.device,
    autocast: Callable[[], Any],
    pipeline: Pipeline | None = None,
) -> tuple[dict[str, float], int]:
    """The figures, equal on all ranks, and the number of samples they are over.

    Each rank measures its share of every batch; sums and counts are added in float64 in one
    transfer at the end. A rank without samples runs the stand-in of the loader and adds zeros.
    In a pipeline the last stage measures, and tells the others.
    """
    was_training = model.training
    model.eval()
    sums: dict[str, Tensor] = {}
    samples = 0
    norms = [module for module in model.modules() if isinstance(module, GlobalBatchNorm)]
    try:
        for portion in loader.epoch(0):
            for norm in norms:  # those without running statistics use the batch's
                norm.weight_of_rows = float(portion.rows > 0)
            batch = to_device(portion.batch, device)
            rows = max(portion.rows, 1)
            with autocast():
                if pipeline is None:
                    outputs = forward(model, batch)
                else:
                    outputs = pipeline.predict(rows, functools.partial(forward, model, batch))
            samples += sum(portion.shares)
            if outputs is ELSEWHERE:
                continue
            for name, metric in metrics.items():
                part = _measured(name, metric, outputs, batch, rows)
                part = part.to(device=device, dtype=torch.float64)
                if portion.rows == 0:
                    part = torch.zeros_like(part)
                sums[name] = sums[name] + part if name in sums else part
    finally:
        model.train(was_training)
    if sums:
        flat = torch.cat([value.reshape(-1) for value in sums.values()])
        link.all_reduce(flat, "add up metrics").wait()
        pieces = flat.split([value.numel() for value in sums.values()])
        sums = {
            name: piece.view_as(value)
            for (name, value), piece in zip(sums.items(), pieces, strict=True)
        }
    figures = {name: _figure(metrics[name], total) for name, total in sums.items()}
    if pipeline is not None and samples:
        told = pipeline.tell([figures.get(name, math.nan) for name in metrics])
        figures = dict(zip(metrics, told, strict=True))
    return figures, samples


def _measured(
    name: str, metric: MetricFunction | Metric, outputs: Any, batch: Any, rows: int
) -> Tensor:
    if isinstance(metric, Metric):
        return torch.as_tensor(metric.update(outputs, batch)).detach()
    total, factor, count = sum_and_count(metric(outputs, batch), rows, f"metric {name}")
    value = total.double() * factor  # stays on its device: reading it would wait for the batch
    return torch.stack([value, torch.full_like(value, count)])


def _figure(metric: MetricFunction | Metric, total: Tensor) -> float:
    if isinstance(metric, Metric):
        return float(metric.result(total.cpu()))
    return float(total[0] / total[1])


def accuracy(outputs: Any, batch: Any) -> Tensor:
    """One value for each sample: 1 where the largest output is the class in `batch[1]`."""
    target = batch["labels"] if isinstance(batch, Mapping) else batch[1]
    logits = outputs.logits if hasattr(outputs, "logits") else outputs
    right: Tensor = logits.argmax(dim=-1) == target
    return right.float()
