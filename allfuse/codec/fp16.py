"""IEEE half precision."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from allfuse.codec.cast import Cast

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Fp16(Cast):
    """11 bits of precision: half the bytes, an error of 2^-12 for values from 6e-5 to 65504.

    Smaller values lose digits and larger ones are cut off; feedback brings the rest later.
    """

    name: ClassVar[str] = "fp16"

    @property
    def dtype(self) -> torch.dtype:
        import torch

        return torch.float16
