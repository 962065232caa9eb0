"""The best pairing of units: a linear assignment problem."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

from allfuse.base.errors import MergeError


def require_solver() -> None:
    """Refuse early what a missing package would make fail later. Raises MergeError."""
    if find_spec("scipy") is None:
        raise MergeError(
            "scipy, which pairs units, is not installed; next: pip install scipy, or allfuse[align]"
        )


def assign(scores: Tensor) -> Tensor:
    """The order (n,) for which sum(scores[i, order[i]]) is largest, of scores (n, n)."""
    from scipy.optimize import linear_sum_assignment

    _, columns = linear_sum_assignment(scores.double().cpu().numpy(), maximize=True)
    return torch.from_numpy(columns).to(torch.int64)
