"""Tensors of which the ranks of a replica have pieces: whole on the first of them, and back.

Sent, for B bytes of tensors on n ranks, a few megabytes at a time:
  gather: by each rank what it has of them and no rank before it has, B (n - 1) / n in all;
  scatter: by the first rank what each other one has.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from allfuse.link import Link
from allfuse.split.piece import Piece

CHUNK_BYTES = 16_000_000  # of whole tensors that travel as one


@dataclass(frozen=True)
class Held:
    """Of one parameter or buffer: its type, and the piece that each rank of the replica has. None
    where one has nothing of it."""

    dtype: torch.dtype
    pieces: tuple[Piece | None, ...]

    @property
    def whole(self) -> tuple[int, ...]:
        """Its shape in the plain model."""
        return next(piece for piece in self.pieces if piece is not None).whole

    def counts(self, rank: int) -> bool:
        """Whether it is a rank's to speak for what it has: it is the first that has just that."""
        own = self.pieces[rank]
        return own is not None and bool(prod(own.own)) and own not in self.pieces[:rank]


class Assembly:
    """Brings tensors of a model that is cut to the first rank of a replica, and back.

    Args:
        held: of each tensor the pieces of all ranks of a replica.
        mates: a link to all of these.
    """

    def __init__(self, held: Mapping[str, Held], mates: Link, device: torch.device) -> None:
        self.held, self.mates, self.device = held, mates, device

    # To the first rank.

    def gather(
        self, own: Mapping[str, Tensor], names: Iterable[str]
    ) -> Iterator[dict[str, Tensor]]:
        """Whole tensors on the first rank, some at a time; elsewhere nothing of them. All ask, for
        the same in the same order.

        Args:
            own: what this rank has of each that it has anything of.
        """
        for chunk in self._chunks(names):
            if self.mates.rank == 0:
                yield self._joined(own, chunk)
                continue
            mine = [name for name in chunk if self.held[name].counts(self.mates.rank)]
            parts = [own[name].detach().reshape(-1).to(self.device) for name in mine]
            if parts:
                self.mates.send(torch.cat(parts), 0, "gather pieces").wait()
            yield {}

    def _joined(self, own: Mapping[str, Tensor], chunk: list[str]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name in chunk:
            whole, piece = self.held[name].whole, self.held[name].pieces[0]
            if piece is not None and piece.own == whole:  # then the others have no more
                found[name] = own[name].detach()
                continue
            found[name] = self._empty(name, whole)
            if piece is not None and self.held[name].counts(0):
                piece.put(own[name].detach(), found[name])
        for rank in range(1, self.mates.size):
            pieces = {
                name: piece
                for name, piece in self._pieces(chunk, rank).items()
                if self.held[name].counts(rank)
            }
            parts = self._received(pieces, rank)
            for (name, piece), part in zip(pieces.items(), parts, strict=True):
                piece.put(part, found[name])
        return found

    # From there.

    @torch.no_grad()
    def scatter(
        self, whole: Mapping[str, Tensor], own: Mapping[str, Tensor], names: Iterable[str]
    ) -> None:
        """Give every rank its pieces, in place. All ask.

        Args:
            whole: the tensors, on the first rank. own: those that are to have the pieces.
        """
        rank = self.mates.rank
        for chunk in self._chunks(names):
            pieces = self._pieces(chunk, rank)
            if rank == 0:
                for other in range(1, self.mates.size):
                    sent = self._taken(whole, self._pieces(chunk, other))
                    if sent:
                        self.mates.send(torch.cat(sent), other, "scatter pieces").wait()
                parts = self._taken(whole, pieces)
            else:
                parts = self._received(pieces, 0, "scatter pieces")
            for (name, _), part in zip(pieces.items(), parts, strict=True):
                own[name].detach().copy_(part.view_as(own[name]))

    def _taken(self, whole: Mapping[str, Tensor], pieces: Mapping[str, Piece]) -> list[Tensor]:
        return [piece.take(whole[name]).reshape(-1) for name, piece in pieces.items()]

    # Both ways.

    def _received(
        self, pieces: Mapping[str, Piece], rank: int, operation: str = "gather pieces"
    ) -> list[Tensor]:
        """Pieces of tensors of one type that another rank sends, laid flat."""
        if not pieces:
            return []
        sizes = [prod(piece.own) for piece in pieces.values()]
        flat = self._empty(next(iter(pieces)), (sum(sizes),))
        self.mates.receive(flat, rank, operation).wait()
        return list(flat.split(sizes))

    def _pieces(self, names: Iterable[str], rank: int) -> dict[str, Piece]:
        """What a rank of the replica has anything of."""
        pieces = {name: self.held[name].pieces[rank] for name in names}
        return {name: p for name, p in pieces.items() if p is not None and 0 not in p.own}

    def _chunks(self, names: Iterable[str]) -> Iterator[list[str]]:
        """Names of tensors of one type, of which about `CHUNK_BYTES` travel as one."""
        chunk: list[str] = []
        size = 0
        for name in names:
            dtype = self.held[name].dtype
            if chunk and (size > CHUNK_BYTES or dtype != self.held[chunk[0]].dtype):
                yield chunk
                chunk, size = [], 0
            numbers = prod(self.held[name].whole)
            chunk.append(name)
            size += numbers * dtype.itemsize
        if chunk:
            yield chunk

    def _empty(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return torch.empty(shape, dtype=self.held[name].dtype, device=self.device)
