"""What outputs of a model say about classes, for methods that need probabilities."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from allfuse.base.errors import MergeError


def find_scores(outputs: Any, needed_by: str) -> Tensor:
    """The logits in a model's outputs, (..., classes).

    Of one number for each sample, (n,) or (n, 1), the logit of yes against no, (n, 2).

    Raises:
        MergeError: there are none.
    """
    scores = outputs.logits if hasattr(outputs, "logits") else outputs
    if not isinstance(scores, Tensor) or not scores.is_floating_point() or not scores.dim():
        kind = type(outputs).__name__
        raise MergeError(
            f"{needed_by} needs scores of classes, and the model gives a {kind}; allowed: a "
            "floating-point tensor (samples, ..., classes), or an object with such logits; next: a "
            "forward in the job that returns them"
        )
    if scores.dim() == 1 or scores.shape[-1] == 1:
        single = scores.reshape(-1)
        return torch.stack([torch.zeros_like(single), single], dim=-1)
    return scores


def has_classes(outputs: Any, batch: Any) -> bool:
    """Whether outputs are scores of the classes that a batch's labels are numbers of."""
    scores = outputs.logits if hasattr(outputs, "logits") else outputs
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if isinstance(batch, list | tuple) and len(batch) > 1:
        labels = batch[1]
    return (
        isinstance(scores, Tensor)
        and isinstance(labels, Tensor)
        and not labels.is_floating_point()
        and scores.is_floating_point()
        and scores.dim() > 1
        and scores.shape[:-1] == labels.shape
    )


def entropy(scores: Tensor) -> Tensor:
    """The mean over samples of -sum(p log p), in nats, p being the softmax of the scores."""
    logs = scores.log_softmax(-1)
    return -(logs.exp() * logs).sum(-1).mean()
