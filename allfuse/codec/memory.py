"""What a codec keeps of one block from round to round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import TypeAlias

import torch
from torch import Tensor


class Memory:
    """Error feedback, and a codec's own memory, of one block of tensors that lie end to end.

    residual: what this peer has not sent yet; it is added to what comes next (Karimireddy et al.
    2019, arXiv:1901.09847, algorithm 2). In float32 or wider, so that small errors add up.
    kept: what the codec remembers, one tensor for each number of a block's tensors.
    """

    def __init__(
        self, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, device: torch.device
    ) -> None:
        self.shapes = [tuple(shape) for shape in shapes]
        self.sizes = [prod(shape) for shape in self.shapes]
        exact = torch.promote_types(dtype, torch.float32)
        self.residual = torch.zeros(sum(self.sizes), dtype=exact, device=device)
        self.kept: dict[int, Tensor] = {}

    def residuals(self) -> list[Tensor]:
        """The residual of each tensor: views (k,)."""
        return list(self.residual.split(self.sizes))

    def heal(self) -> None:
        """Forget what is not finite: it was never to be sent."""
        self.residual.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
        self.kept = {n: kept for n, kept in self.kept.items() if bool(kept.isfinite().all())}


Named: TypeAlias = tuple[Sequence[str], Memory]
"""A memory, and the names of the tensors of its block."""


def capture_all(memories: Sequence[Named]) -> dict[str, dict[str, Tensor]]:
    """What some memories hold, by the names of tensors: live tensors."""
    residuals: dict[str, Tensor] = {}
    kept: dict[str, Tensor] = {}
    for names, memory in memories:
        residuals |= dict(zip(names, memory.residuals(), strict=True))
        kept |= {names[n]: tensor for n, tensor in memory.kept.items()}
    return {"residuals": residuals, "kept": kept}


def restore_all(memories: Sequence[Named], state: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Take back what fits: tensors that are new have no past."""
    for names, memory in memories:
        for n, (name, own) in enumerate(zip(names, memory.residuals(), strict=True)):
            residual, kept = state["residuals"].get(name), state["kept"].get(name)
            if residual is not None and residual.numel() == own.numel():
                own.copy_(residual)
            if kept is not None:
                memory.kept[n] = kept.to(own).clone()
