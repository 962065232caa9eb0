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
from allfuse.roles.rotation import ALL
from allfuse.verify.layout import Layout

Named = dict[str, Tensor]


def flatten(blueprint: Blueprint, values: Mapping[str, Tensor]) -> dict[int, Tensor]:
    """Copies of the tensors end to end, for each block of which there are values, in float32 or
    wider."""
    return {
        number: wide(torch.cat([values[name].reshape(-1) for name in block.names])).clone()
        for number, block in enumerate(blueprint.blocks)
        if block.names[0] in values
    }


def name_again(blueprint: Blueprint, flats: Mapping[int, Tensor]) -> Named:
    found: Named = {}
    for number, flat in flats.items():
        found |= blueprint.blocks[number].views(flat)
    return found


def wide(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


class Inward:
    """The updates of one worker on their way to the servers: what one loses the next one brings."""

    def __init__(self, layout: Layout, servers: int, worker: str) -> None:
        self.layout, self.blueprint = layout, layout.blueprint
        blueprint, self.codec = layout.blueprint, read_codec(layout.blueprint.codec)
        self.shards = cut(blueprint.blocks, servers)
        self.key = zlib.crc32(worker.encode())
        self._left: dict[int, Tensor] = {}  # by block
        self._before: dict[int, Tensor] = {}

    def forget(self) -> None:
        """The worker is a new one."""
        self._left.clear()
        self._before.clear()

    def undo(self, own: float) -> None:
        """A share of the last update is still in the worker's weights: so much of what was not
        sent stays as it was."""
        for number, before in self._before.items():
            self._left[number] = torch.lerp(self._left[number], before, own)
        self._before = {}

    @torch.no_grad()
    def bring(self, lease: int, clock: int, values: Named) -> Named:
        """What arrives of an update."""
        if self.codec is None or not self.codec.encodes(clock):
            return values
        flats = flatten(self.blueprint, self.layout.part(values))
        for number, flat in flats.items():
            self._left.setdefault(number, torch.zeros_like(flat))
        self._before = {number: self._left[number].clone() for number in flats}
        for span, number in spans_of(self.shards):
            if span.block not in flats:
                continue
            part = slice(span.start, span.stop)
            whole = self._left[span.block][part] + flats[span.block][part]
            seed = mix(self.key, lease, span.block, span.start, number)
            message = self.codec.encode(whole, seed)
            arrived = flats[span.block][part]
            self.codec.decode(message, arrived)
            lost = whole - arrived
            self._left[span.block][part] = lost.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        return self.layout.join(name_again(self.blueprint, flats))


class Outward:
    """Weights on their way to workers, as differences to what each server knows them to have."""

    def __init__(self, layout: Layout, servers: int) -> None:
        self.layout, self.blueprint = layout, layout.blueprint
        blueprint, self.codec = layout.blueprint, read_codec(layout.blueprint.codec)
        self.shards = cut(blueprint.blocks, servers)
        self._sent: dict[tuple[str, int, int], int] = {}  # sequences, by worker, fragment, shard
        self._held: dict[str, Named] = {}
        self._worked_from: set[tuple[str, int]] = set()

    def confirm(self, worker: str, sequence: int) -> None:
        """A worker has made an update of a version, so that it is known to have it."""
        self._worked_from.add((worker, sequence))

    def forget(self, shard: int) -> None:
        """A shard's server is a new one, which knows nothing of what workers have."""
        self._sent = {place: sent for place, sent in self._sent.items() if place[2] != shard}

    def forget_all(self) -> None:
        self._sent.clear()

    def _knows(self, worker: str, fragment: int, shard: int) -> bool:
        """Whether a server has sent a worker weights that it is known to have."""
        sent = self._sent.get((worker, fragment, shard))
        return sent is not None and (worker, sent) in self._worked_from

    @torch.no_grad()
    def send(self, worker: str, sequence: int, weights: Named, fragment: int = ALL) -> Named:
        """What a worker then has of all that it was sent: newest of that fragment."""
        if self.codec is None and self.blueprint.fragments == 1:
            return weights
        held, weights = dict(self._held.get(worker, {})), self.layout.part(weights)
        for each in range(self.blueprint.fragments):
            if fragment not in (ALL, each):
                continue
            own, servers = names_of(self.blueprint, each), range(len(self.shards))
            known = {shard for shard in servers if self._knows(worker, each, shard)}
            arrived = {name: weights[name] for name in own}
            if self.codec is not None and known and self.codec.encodes(sequence):
                before = {name: held[name] for name in own}
                arrived = self._add_differences(sequence, each, known, before, arrived)
            self._sent |= dict.fromkeys(((worker, each, shard) for shard in servers), sequence)
            held |= arrived
        self._held[worker] = held
        return self.layout.join(held)

    def _add_differences(
        self, sequence: int, fragment: int, known: set[int], held: Named, weights: Named
    ) -> Named:
        """What arrives of the weights: those of shards that are not known come whole."""
        assert self.codec is not None
        before, now = flatten(self.blueprint, held), flatten(self.blueprint, weights)
        for server in sorted(known):
            for number, piece in enumerate(self.shards[server]):
                for place, span in enumerate(piece if piece.fragment == fragment else ()):
                    part = slice(span.start, span.stop)
                    difference = now[span.block][part] - before[span.block][part]
                    seed = mix(sequence, server, number, place)
                    message = self.codec.encode(difference, seed)
                    self.codec.decode(message, difference)
                    now[span.block][part] = before[span.block][part] + difference
        blocks = self.blueprint.blocks
        flats = {number: flat.to(blocks[number].dtype) for number, flat in now.items()}
        return name_again(self.blueprint, flats)


def names_of(blueprint: Blueprint, fragment: int) -> list[str]:
    """The tensors of a fragment, or all."""
    return [
        name
        for block in blueprint.blocks
        if fragment in (ALL, block.fragment)
        for name in block.names
    ]


def spans_of(shards: Sequence[Sequence[Sequence[Span]]]) -> list[tuple[Span, int]]:
    """Every run of elements that travels by itself, with its number in its piece."""
    return [
        (span, number) for pieces in shards for piece in pieces for number, span in enumerate(piece)
    ]
