"""The largest values alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from allfuse.base.errors import PlanError
from allfuse.codec.base import Codec, Error, MessageCodec

if TYPE_CHECKING:
    from torch import Tensor

SAMPLE = 4096


@dataclass(frozen=True)
class TopK(MessageCodec):
    """The `fraction` of the values that are largest in size, with their places: 8 bytes for each.

    At least one of each message is sent. Which one of equal values is taken is not said (Aji and
    Heafield 2017, arXiv:1704.05021; with feedback Stich et al. 2018, arXiv:1809.07599).
    """

    name: ClassVar[str] = "topk"
    spreads: ClassVar[bool] = True
    fraction: float

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fraction(self, self.fraction)

    @property
    def error(self) -> Error:
        return "bounded"

    def kept(self, elements: int) -> int:
        return max(1, round(self.fraction * elements))

    def encoded_bytes(self, elements: int) -> int:
        return 8 * self.kept(elements)

    def encode(self, values: Tensor, seed: int) -> Tensor:
        import torch

        places = find_largest(values.abs(), self.kept(len(values)))
        parts = (places.to(torch.int32), values[places].to(torch.float32))
        return torch.cat([part.view(torch.uint8) for part in parts])

    def decode(self, message: Tensor, values: Tensor) -> None:
        import torch

        places, kept = message.view(2, -1)
        found = places.view(torch.int32).long()
        if int(found.min()) < 0 or int(found.max()) >= len(values):
            raise ValueError(f"a place is not one of {len(values)} values")
        values.zero_()
        values[found] = kept.view(torch.float32).to(values.dtype)


def find_largest(sizes: Tensor, k: int) -> Tensor:
    """The places of the k largest of sizes (m,); NaN counts as larger than all.

    Of a long list only those are sorted that pass a bar, which is read off an even sample. Where
    the sample was wrong, all are: the result is the same.
    """
    stride = len(sizes) // SAMPLE
    if stride > 1 and k < len(sizes) // 8:
        sample = sizes[::stride]
        bar = sample.topk(min(len(sample), 16 + 3 * k // (2 * stride)), sorted=False).values.min()
        found = (sizes < bar).logical_not_().nonzero().squeeze(1)
        if k <= len(found):
            return found[sizes[found].topk(k, sorted=False).indices]
    return sizes.topk(k, sorted=False).indices


def check_fraction(codec: Codec, fraction: object) -> None:
    """Refuse what is no part of a whole.

    Raises:
        PlanError: the fraction is not above 0 and at most 1.
    """
    if not isinstance(fraction, int | float) or isinstance(fraction, bool) or not 0 < fraction <= 1:
        raise PlanError(
            f"{codec.name}({fraction})",
            "the fraction is above 0 and at most 1",
            f"{codec.name}(0.01)",
        )
