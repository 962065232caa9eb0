"""A worker's copy of what servers hold: the weights as they were read, and those it works on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from allfuse.base.torch_private import foreach_copy
from allfuse.link.post import Malformed
from allfuse.roles.blueprint import Blueprint, read_codec
from allfuse.roles.cutting import cut, view_all
from allfuse.roles.messages import Weights
from allfuse.roles.readers import add_message
from allfuse.roles.rotation import ALL


class Replica:
    """Flat tensors, one for each block of a blueprint; empty ones for blocks that its rank has not.

    Args:
        rank: of the worker, whose ranks may share the model.

    Attributes:
        sent: the weights as they came from the servers.
        read: those that this worker has taken in, to which its changes are: `sent` itself, but
            where the weights are taken in fragment by fragment.
        live: those to train with. Of blocks whose gradients are pushed they are `read` itself; of
            blocks whose changes are pushed they are memory of their own.
        tensors: views of `live` by name, of the shapes of the model.
        sequence: the newest version of which something came.

    Example:
        replica = Replica(blueprint, servers=2)
        replica.load(dict(model.named_parameters()))
        model.weight.data = replica.tensors["weight"]
    """

    def __init__(
        self,
        blueprint: Blueprint,
        servers: int,
        device: torch.device | str = "cpu",
        rank: int = 0,
    ) -> None:
        self.blueprint, self.rank = blueprint, rank
        blocks = blueprint.blocks
        self.shards = cut(blocks, servers)
        sizes = [block.elements if rank in block.ranks else 0 for block in blocks]
        self.sent = [
            torch.zeros(size, dtype=block.dtype, device=device)
            for size, block in zip(sizes, blocks, strict=True)
        ]
        self.read = self.sent
        if blueprint.fragments > 1:
            self.read = [flat.clone() for flat in self.sent]
        self.live = [
            flat.clone() if blueprint.pushes_changes(number) else flat
            for number, flat in enumerate(self.read)
        ]
        self.tensors = view_all(blocks, self.live)
        self.sequence = -1
        self._codec = read_codec(blueprint.codec)
        self._arrived: set[tuple[int, int]] = set()
        self._versions: dict[tuple[int, int], int] = {}
        self._wanted: dict[int, set[tuple[int, int]]] = {}  # pieces of each fragment, and of all
        for server, pieces in enumerate(self.shards):
            for number, piece in enumerate(pieces):
                for fragment in (piece.fragment, ALL) if rank in piece.ranks else ():
                    self._wanted.setdefault(fragment, set()).add((server, number))
        self._begun: list[Tensor] = []

    @torch.no_grad()
    def load(self, values: Mapping[str, Tensor]) -> None:
        """Begin with these weights, by name."""
        foreach_copy(list(self.tensors.values()), [values[name] for name in self.tensors])
        for sent, read, live in zip(self.sent, self.read, self.live, strict=True):
            for flat in (sent, read):
                if flat is not live:
                    flat.copy_(live)

    def is_whole(self, sequence: int, fragment: int = ALL) -> bool:
        """Whether all pieces of a fragment, or all there are for this rank, are of that version."""
        wanted = self._wanted.get(fragment, set())
        return not wanted or (sequence == self.sequence and wanted <= self._arrived)

    @property
    def progress(self) -> tuple[int, int]:
        """The newest version of which something came, and how many pieces of it."""
        return self.sequence, len(self._arrived)

    @torch.no_grad()
    def take(self, server: int, message: Weights) -> bool:
        """Take a piece in; whether it was new. Older versions than the newest are left out, and
        differences to what is not here.

        Raises:
            Malformed: it is no piece of that server's shard.
        """
        tensors = self._check(server, message)
        place = server, message.piece
        if message.sequence < self.sequence:
            return False
        if message.sequence > self.sequence:
            self.sequence = message.sequence
            self._arrived.clear()
        if place in self._arrived or message.base not in (-1, self._versions.get(place)):
            return False
        self._versions[place] = -1  # until all spans are in
        for span, tensor in zip(self.shards[server][message.piece], tensors, strict=True):
            flat = self.sent[span.block][span.start : span.stop]
            flat.copy_(tensor if message.base < 0 else self._decode(tensor, flat))
        self._versions[place] = message.sequence
        self._arrived.add(place)
        return True

    def _check(self, server: int, message: Weights) -> Sequence[Tensor]:
        pieces = self.shards[server]
        if message.pieces != len(pieces) or not 0 <= message.piece < len(pieces):
            raise Malformed(f"piece {message.piece} of {message.pieces} of {len(pieces)}")
        spans = pieces[message.piece]
        fits = len(message.tensors) == len(spans) and self.rank in spans.ranks
        for span, tensor in zip(spans, message.tensors, strict=False):
            dtype, elements = self.sent[span.block].dtype, span.elements
            if message.base >= 0:
                size = self._codec.encoded_bytes(elements) if self._codec else -1
                fits = fits and tensor.dtype == torch.uint8 and tensor.shape == (size,)
            else:
                fits = fits and tensor.dtype == dtype and tensor.shape == (elements,)
        if not fits:
            raise Malformed(f"piece {message.piece} holds other tensors than {len(spans)} spans")
        return message.tensors

    def _decode(self, tensor: Tensor, flat: Tensor) -> Tensor:
        assert self._codec is not None
        try:
            return add_message(self._codec, tensor.to(flat.device), flat)
        except (ValueError, IndexError, RuntimeError) as error:
            raise Malformed(f"a difference that cannot be decoded: {error}") from error

    @torch.no_grad()
    def settle(self, own: float = 0.0, fragment: int = ALL) -> None:
        """Take in the weights of a fragment, or all, as they were sent; keep a share of those
        worked on."""
        each = zip(self.blueprint.blocks, self.sent, self.read, self.live, strict=True)
        for block, sent, read, live in each:
            if fragment not in (ALL, block.fragment):
                continue
            if sent is not read:
                read.copy_(sent)
            if read is not live:
                live.copy_(torch.lerp(read, live, own) if own else read)

    @torch.no_grad()
    def show(self) -> None:
        """Have the weights as they were sent in `live`, until that is written back."""
        for sent, live in zip(self.sent, self.live, strict=True):
            if sent is not live:
                live.copy_(sent)

    @torch.no_grad()
    def remember(self) -> None:
        """Work begins here, of weights that were taken in fragment by fragment."""
        if self.read is not self.sent:
            self._begun = self._begun or [torch.empty_like(live) for live in self.live]
            foreach_copy(self._begun, self.live)

    @torch.no_grad()
    def rewind(self) -> None:
        """Go back to where work began last."""
        if self._begun:
            foreach_copy(self.live, self._begun)

    def copy(self, server: int, piece: int) -> tuple[Tensor, ...]:
        """A copy of the weights of a piece, which this rank has, as they were sent, on the CPU."""
        spans = self.shards[server][piece]
        return tuple(self.sent[s.block][s.start : s.stop].cpu().clone() for s in spans)
