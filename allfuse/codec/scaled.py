"""Whole numbers with a scale for each block of values."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

from allfuse.base.errors import PlanError
from allfuse.codec.base import Error, MessageCodec, whole_words

if TYPE_CHECKING:
    from torch import Tensor

MOST = 1 << 20  # values that share a scale


@dataclass(frozen=True)
class Scaled(MessageCodec):
    """Message: one float32 scale for each block of `block` values, then the numbers of all blocks.

    The last block may be short. A value that is not finite makes its block so.
    """

    block: int = 256

    def __post_init__(self) -> None:
        if type(self.block) is not int or not 8 <= self.block <= MOST or self.block % 8:
            raise PlanError(
                str(self),
                f"a block is a multiple of 8 values, at most {MOST:,}",
                f"{self.name}(block=256)",
            )

    @abstractmethod
    def number_bytes(self, elements: int) -> int:
        """Bytes of the numbers of so many values."""

    @abstractmethod
    def scale(self, blocks: Tensor, counts: Tensor) -> Tensor:
        """The scale (b,) of blocks (b, block), of which `counts` (b,) values are real ones."""

    @abstractmethod
    def pack(self, ratios: Tensor, seed: int) -> Tensor:
        """Numbers as bytes, from values (m,) over their scale; m is a multiple of `block`."""

    @abstractmethod
    def unpack(self, numbers: Tensor, elements: int) -> Tensor:
        """The numbers (elements,) that bytes hold, as floats or whole numbers."""

    def encoded_bytes(self, elements: int) -> int:
        return 4 * -(-elements // self.block) + whole_words(self.number_bytes(elements))

    def encode(self, values: Tensor, seed: int) -> Tensor:
        import torch

        size, count = len(values), -(-len(values) // self.block)
        padded = values
        if size % self.block:
            padded = torch.nn.functional.pad(values, (0, count * self.block - size))
        blocks = padded.view(count, self.block)
        counts = values.new_full((count,), self.block)
        counts[-1] = size - (count - 1) * self.block
        scales = self.scale(blocks, counts).to(torch.float32)
        divisors = scales.to(values.dtype).masked_fill(scales == 0, 1.0)  # of nothing but zeros
        numbers = self.pack((blocks / divisors[:, None]).reshape(-1), seed)
        message = values.new_zeros(self.encoded_bytes(size), dtype=torch.uint8)
        message[: 4 * count] = scales.view(torch.uint8)
        used = self.number_bytes(size)
        message[4 * count : 4 * count + used] = numbers[:used]
        return message

    def decode(self, message: Tensor, values: Tensor) -> None:
        import torch

        size, count = len(values), -(-len(values) // self.block)
        scales = message[: 4 * count].view(torch.float32).to(values.dtype)
        values.copy_(self.unpack(message[4 * count :], size))
        whole = size - size % self.block
        values[:whole].view(-1, self.block).mul_(scales[: whole // self.block, None])
        if whole < size:
            values[whole:].mul_(scales[-1])


@dataclass(frozen=True)
class Rounded(Scaled):
    """Whole numbers from -`steps` to `steps`, of which the largest value of a block gets the last.

    The error of a value is half a scale at most. With `stochastic` it is rounded up or down at
    random, with chances that make the mean right: unbiased, and one scale at most.
    """

    stochastic: bool = False

    @property
    @abstractmethod
    def steps(self) -> int: ...

    @property
    def error(self) -> Error:
        return "unbiased" if self.stochastic else "bounded"

    def scale(self, blocks: Tensor, counts: Tensor) -> Tensor:
        return blocks.abs().amax(1) / self.steps

    def round(self, ratios: Tensor, seed: int) -> Tensor:
        import torch

        if self.stochastic:
            chance = torch.Generator(ratios.device).manual_seed(seed & (2**63 - 1))
            drawn = torch.rand(
                ratios.shape, generator=chance, dtype=ratios.dtype, device=ratios.device
            )
            ratios = (ratios + drawn).floor_()
        else:
            ratios = ratios.round()
        # a block that is not finite shows it by its scale
        return ratios.clamp_(-self.steps, self.steps).nan_to_num_(nan=0.0).to(torch.int8)
