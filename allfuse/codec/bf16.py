"""bfloat16."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from allfuse.codec.cast import Cast

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Bf16(Cast):
    """8 bits of precision with the range of float32: half the bytes, an error of 2^-9 at most."""

    name: ClassVar[str] = "bf16"

    @property
    def dtype(self) -> torch.dtype:
        import torch

        return torch.bfloat16
