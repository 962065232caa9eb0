"""Whole numbers with a scale for each block of values."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

from allfuse.base.errors import PlanError
from allfuse.base.keys import mix
from allfuse.codec.base import Error, MessageCodec, whole_words

if TYPE_CHECKING:
    from torch import Tensor

MOST = 1 << 20  # values that share a scale
PIECE = 1 << 15  # values at a time: what lies between stays in the cache
GPU_PIECE = 1 << 24  # where each piece costs a dozen launches


@dataclass(frozen=True)
class Scaled(MessageCodec):
    """Message: one float32 scale for each block of `block` values, then the numbers of all blocks.

    The last block may be short. A value that is not finite makes its block so.
    """

    block: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
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
    def scale(self, blocks: Tensor) -> Tensor:
        """The scale (b,) of blocks (b, block)."""

    def correct(self, count: int) -> float:
        """What the scale of a short block of `count` values is multiplied by: it ends in zeros."""
        return 1.0

    @abstractmethod
    def pack(self, ratios: Tensor, seed: int) -> Tensor:
        """Numbers as bytes, from values (m,) over their scale; m is a multiple of `block`."""

    @abstractmethod
    def unpack(self, numbers: Tensor, elements: int) -> Tensor:
        """The numbers (elements,) that bytes hold, as floats or whole numbers."""

    def encoded_bytes(self, elements: int) -> int:
        return 4 * -(-elements // self.block) + whole_words(self.number_bytes(elements))

    def most(self, values: Tensor) -> int:
        """How many blocks are worked on at a time."""
        return max(1, (GPU_PIECE if values.is_cuda else PIECE) // self.block)

    def encode(self, values: Tensor, seed: int) -> Tensor:
        import torch

        size, count = len(values), -(-len(values) // self.block)
        message = values.new_zeros(self.encoded_bytes(size), dtype=torch.uint8)
        scales, numbers = message[: 4 * count].view(torch.float32), message[4 * count :]
        most = self.most(values)
        for first in range(0, count, most):
            part = values[first * self.block : (first + most) * self.block]
            if len(part) % self.block:  # the last block is short
                part = torch.nn.functional.pad(part, (0, -len(part) % self.block))
            blocks = part.view(-1, self.block)
            own = scales[first : first + len(blocks)]
            own.copy_(self.scale(blocks))
            if first + len(blocks) == count:
                own[-1:] *= self.correct(size - (count - 1) * self.block)
            factors = own.to(values.dtype).reciprocal()
            factors.masked_fill_(own == 0, 1.0)  # of nothing but zeros
            packed = self.pack((blocks * factors[:, None]).view(-1), mix(seed, first))
            start = self.number_bytes(first * self.block)
            used = self.number_bytes(min(size, (first + most) * self.block)) - start
            numbers[start : start + used] = packed[:used]
        return message

    def decode(self, message: Tensor, values: Tensor) -> None:
        import torch

        size, count = len(values), -(-len(values) // self.block)
        scales = message[: 4 * count].view(torch.float32).to(values.dtype)
        numbers = message[4 * count :]
        step = self.most(values) * self.block
        for first in range(0, size, step):
            part = values[first : first + step]
            part.copy_(self.unpack(numbers[self.number_bytes(first) :], len(part)))
            whole = len(part) - len(part) % self.block
            own = scales[first // self.block :]
            part[:whole].view(-1, self.block).mul_(own[: whole // self.block, None])
            if whole < len(part):
                part[whole:].mul_(scales[-1])


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

    def scale(self, blocks: Tensor) -> Tensor:
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
        # what comes of NaN does not matter: the scale of its block says so
        return ratios.clamp_(-self.steps, self.steps).to(torch.int8)
