"""What codecs do to updates and weights on their way, with error feedback in both directions.

Written out again for the replay. Shared with the code under test are the codecs themselves, the
keys that they draw by, and where a tensor is cut: each run of elements that travels in one piece is
encoded by itself.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from allfuse.base.keys import mix
from allfuse.roles.blueprint import Blueprint, read_codec
from allfuse.roles.cutting import Span, cut

Named = dict[str, Tensor]


def flatten(blueprint: Blueprint, values: Mapping[str, Tensor]) -> list[Tensor]:
    """Copies of the tensors end to end, for each block, in float32 or wider."""
    return [
        wide(torch.cat([values[name].reshape(-1) for name in block.names])).clone()
        for block in blueprint.blocks
    ]


def name_again(blueprint: Blueprint, flats: Sequence[Tensor]) -> Named:
    found: Named = {}
    for block, flat in zip(blueprint.blocks, flats, strict=True):
        found |= block.views(flat)
    return found


def wide(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


class Inward:
    """The updates of one worker on their way to the servers: what one loses the next one brings."""

    def __init__(self, blueprint: Blueprint, servers: int, worker: str) -> None:
        self.blueprint, self.codec = blueprint, read_codec(blueprint.codec)
        self.shards = cut(blueprint.blocks, servers)
        self.key = zlib.crc32(worker.encode())
        self._left: list[Tensor] = []
        self._before: list[Tensor] = []

    def undo(self, own: float) -> None:
        """A share of the last update is still in the worker's weights: so much of what was not
        sent stays as it was."""
        if self._before:
            pairs = zip(self._left, self._before, strict=True)
            self._left = [torch.lerp(left, before, own) for left, before in pairs]
            self._before = []

    @torch.no_grad()
    def bring(self, lease: int, clock: int, values: Named) -> Named:
        """What arrives of an update."""
        if self.codec is None or not self.codec.encodes(clock):
            return values
        flats = flatten(self.blueprint, values)
        self._left = self._left or [torch.zeros_like(flat) for flat in flats]
        self._before = [left.clone() for left in self._left]
        for span, number in spans_of(self.shards):
            part = slice(span.start, span.stop)
            whole = self._left[span.block][part] + flats[span.block][part]
            seed = mix(self.key, lease, span.block, span.start, number)
            message = self.codec.encode(whole, seed)
            arrived = flats[span.block][part]
            self.codec.decode(message, arrived)
            lost = whole - arrived
            self._left[span.block][part] = lost.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        return name_again(self.blueprint, flats)


class Outward:
    """Weights on their way to workers, as differences to what each of them has."""

    def __init__(self, blueprint: Blueprint, servers: int) -> None:
        self.blueprint, self.codec = blueprint, read_codec(blueprint.codec)
        self.shards = cut(blueprint.blocks, servers)
        self._sent: dict[str, tuple[int, Named]] = {}
        self._worked_from: dict[str, int] = {}

    def confirm(self, worker: str, sequence: int) -> None:
        """A worker has made an update of a version, so that it is known to have it."""
        self._worked_from[worker] = sequence

    @torch.no_grad()
    def send(self, worker: str, sequence: int, weights: Named) -> Named:
        """What a worker then has."""
        if self.codec is None:
            return weights
        base, held = self._sent.get(worker, (-1, {}))
        arrived = weights
        if base >= 0 and self._worked_from.get(worker) == base and self.codec.encodes(sequence):
            arrived = self._add_difference(sequence, held, weights)
        self._sent[worker] = sequence, arrived
        return arrived

    def _add_difference(self, sequence: int, held: Named, weights: Named) -> Named:
        assert self.codec is not None
        before, now = flatten(self.blueprint, held), flatten(self.blueprint, weights)
        for server, pieces in enumerate(self.shards):
            for number, piece in enumerate(pieces):
                for place, span in enumerate(piece):
                    part = slice(span.start, span.stop)
                    difference = now[span.block][part] - before[span.block][part]
                    seed = mix(sequence, server, number, place)
                    message = self.codec.encode(difference, seed)
                    self.codec.decode(message, difference)
                    before[span.block][part] += difference
        flats = [
            flat.to(block.dtype) for flat, block in zip(before, self.blueprint.blocks, strict=True)
        ]
        return name_again(self.blueprint, flats)


def spans_of(shards: Sequence[Sequence[Sequence[Span]]]) -> list[tuple[Span, int]]:
    """Every run of elements that travels by itself, with its number in its piece."""
    return [
        (span, number) for pieces in shards for piece in pieces for number, span in enumerate(piece)
    ]
