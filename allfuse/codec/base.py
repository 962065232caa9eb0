"""Fewer bytes, with a declared error."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import TYPE_CHECKING, ClassVar, Literal, TypeAlias

from allfuse.base.choice import Choice
from allfuse.base.errors import PlanError

if TYPE_CHECKING:  # plans are read without loading torch
    from torch import Tensor

    from allfuse.codec.memory import Memory

Error: TypeAlias = Literal["exact", "unbiased", "bounded"]
"""exact: decoding gives every bit back. unbiased: its error has the mean 0. bounded: what is lost
is smaller than what was to be sent, so that error feedback brings all of it sooner or later."""

Shapes: TypeAlias = Sequence[tuple[int, ...]]
"""The shapes of the tensors that lie end to end in a block."""

WORD_BYTES = 4


@dataclass(frozen=True)
class Codec(Choice, ABC):
    """How values are encoded for the way."""

    @property
    @abstractmethod
    def error(self) -> Error:
        """What is lost."""

    @property
    def lossless(self) -> bool:
        return self.error == "exact"

    def encodes(self, round: int) -> bool:
        """Whether a round, of 0, 1, 2, ..., is encoded. All peers know by its number."""
        return not self.lossless

    @abstractmethod
    def payload_bytes(self, shapes: Shapes, element_bytes: int) -> int:
        """Bytes that stand for a block of tensors of these shapes on the way."""


@dataclass(frozen=True)
class LossyCodec(Codec):
    """A codec with error feedback around it.

    warm: rounds before the first one that is encoded, while gradients are large and turn quickly,
    and an optimizer that divides by their size (Adam) gets to know it (as start_powerSGD_iter of
    torch's PowerSGD; Tang et al. 2021, arXiv:2102.02888, 1-bit Adam). They leave the residual as
    it is.
    """

    warm: int = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        if type(self.warm) is not int or self.warm < 0:
            raise PlanError(
                str(self),
                "warm is how many rounds come before the first encoded one, a whole number from 0",
                str(replace(self, warm=0)),
            )

    def encodes(self, round: int) -> bool:
        return round >= self.warm and super().encodes(round)


@dataclass(frozen=True)
class MessageCodec(LossyCodec):
    """A codec whose messages cannot be summed: who sums decodes, and encodes the sum again.

    spreads: the messages of peers tell of different values, so that their sum is as long as all of
    them together, and would lose most if it were encoded again.
    """

    spreads: ClassVar[bool] = False

    @abstractmethod
    def encoded_bytes(self, elements: int) -> int:
        """Bytes of the message of so many values: a multiple of `WORD_BYTES`, known beforehand."""

    @abstractmethod
    def encode(self, values: Tensor, seed: int) -> Tensor:
        """The message (encoded_bytes,) of uint8 for values (k,) of float32 or float64, k > 0.

        `seed` is for codecs that draw. Values that are not finite must not decode to finite ones.
        """

    @abstractmethod
    def decode(self, message: Tensor, values: Tensor) -> None:
        """Write what a message says into `values` (k,).

        Raises:
            ValueError, IndexError, RuntimeError: it is no message for so many values.
        """

    def payload_bytes(self, shapes: Shapes, element_bytes: int) -> int:
        return self.encoded_bytes(sum(map(prod, shapes)))


@dataclass(frozen=True)
class SumCodec(LossyCodec):
    """A codec whose encoded values are summed, by any topology and in any order."""

    @abstractmethod
    def rounds(self, block: Tensor, error: Tensor, memory: Memory, seed: int) -> Iterator[Tensor]:
        """The program of one fusion: yields tensors (k,), each to be summed over the peers.

        At last `block` (m,), of float32 or float64, holds the sum of what all peers sent, and
        `error` (m,) what of this peer's values was not sent. `seed` is the same on all peers.
        """

    @abstractmethod
    def summed_elements(self, shapes: Shapes) -> int:
        """How many values are summed for a block, all rounds together."""

    def payload_bytes(self, shapes: Shapes, element_bytes: int) -> int:
        return self.summed_elements(shapes) * element_bytes


def whole_words(count: int) -> int:
    """So many bytes, filled up so that what comes after them is aligned.

    >>> whole_words(5), whole_words(8)
    (8, 8)
    """
    return -(-count // WORD_BYTES) * WORD_BYTES
