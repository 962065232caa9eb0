"""How weights of workers that gossip become one. Pure tensor math."""

from __future__ import annotations

import torch


def half_way(theirs: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """Half of what they are ahead."""
    return torch.sub(theirs, own).mul_(0.5)


def mean_of(values: list[torch.Tensor]) -> torch.Tensor:
    """The mean, in this order, added up in float32 or wider."""
    first = values[0]
    total = first.to(torch.promote_types(first.dtype, torch.float32), copy=True)
    for other in values[1:]:
        total.add_(other)
    return total.div_(len(values)).to(first.dtype)
