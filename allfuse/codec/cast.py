"""Shorter floating-point types."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

from allfuse.codec.base import Error, MessageCodec, whole_words

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Cast(MessageCodec):
    """Each value rounded to the nearest one of a type of two bytes; larger ones to its largest.

    Sums are taken in float32 or wider: summed in the short type they would lose a part that no
    peer could add again.
    """

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype: ...

    @property
    def error(self) -> Error:
        return "bounded"

    def encoded_bytes(self, elements: int) -> int:
        return whole_words(2 * elements)

    def encode(self, values: Tensor, seed: int) -> Tensor:
        import torch

        message = values.new_zeros(self.encoded_bytes(len(values)) // 2, dtype=self.dtype)
        message[: len(values)] = values
        largest = torch.finfo(self.dtype).max
        low, high = (float(end) for end in values.aminmax())
        if not (-largest <= low and high <= largest):
            cut = values.clamp(-largest, largest)  # infinite values stay: they are to be noticed
            message[: len(values)] = cut.where(values.isfinite(), values)
        return message.view(torch.uint8)

    def decode(self, message: Tensor, values: Tensor) -> None:
        values.copy_(message.view(self.dtype)[: len(values)])
