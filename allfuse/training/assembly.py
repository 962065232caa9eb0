"""Tensors of which the ranks of a replica have pieces: whole on the first of them, and back.

Where several replicas make up a group, those of the first one gather and scatter, and each of its
ranks hands on what it has to those of the others that have the same.

Sent, for B bytes of tensors on n ranks, a few megabytes at a time:
  gather: by each rank what it has of them and no rank before it has, B (n - 1) / n in all;
  scatter: by the first rank what each other one has, and then by each rank what it has itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from allfuse.base.tensors import map_nest
from allfuse.roles.messages import Save
from allfuse.roles.wrapping import unwrap, wrap
from allfuse.store.tree import pack, unpack
from allfuse.training.joined import join_states

if TYPE_CHECKING:
    from allfuse.split.parted import Held
    from allfuse.split.piece import Piece
    from allfuse.training.place import Place

CHUNK_BYTES = 16_000_000  # of whole tensors that travel as one


class Assembly:
    """Brings tensors of a model that is cut to the rank that speaks for all, and back.

    Args:
        held: of each tensor the pieces of all ranks of a replica.
    """

    def __init__(self, place: Place, held: Mapping[str, Held]) -> None:
        self.held, self.device = held, place.device
        self.mates, self.alike = place.mates, place.data
        self.leads, self.is_of_first = place.rank == 0, place.rank < place.plan.replica_size

    # To the first rank.

    def gather(
        self, own: Mapping[str, Tensor | None], names: Iterable[str]
    ) -> Iterator[dict[str, Tensor]]:
        """Whole tensors on the first rank, some at a time; elsewhere nothing of them.

        Args:
            own: what this rank has of each that it has anything of; None counts as zeros.
        """
        for chunk in self._chunks(names) if self.is_of_first else ():
            if self.leads:
                yield self._joined(own, chunk)
                continue
            rank = self.mates.rank
            parts = [self._part(own, name) for name in chunk if self.held[name].counts(rank)]
            if parts:
                self.mates.send(torch.cat(parts), 0, "gather pieces").wait()
            yield {}

    def _part(self, own: Mapping[str, Tensor | None], name: str) -> Tensor:
        """This rank's piece of a tensor, laid flat."""
        value, held = own[name], self.held[name]
        if value is not None:
            return value.detach().reshape(-1)
        piece = held.pieces[self.mates.rank]
        assert piece is not None
        return torch.zeros(prod(piece.own), dtype=held.dtype, device=self.device)

    def _joined(self, own: Mapping[str, Tensor | None], chunk: list[str]) -> dict[str, Tensor]:
        found = {name: self._empty(name, self.held[name].whole) for name in chunk}
        for rank in range(self.mates.size):
            pieces = {
                name: piece
                for name, piece in self._pieces(chunk, rank).items()
                if self.held[name].counts(rank)
            }
            if rank == 0:
                parts = [self._part(own, name) for name in pieces]
            else:
                parts = self._received(pieces, rank)
            for (name, piece), part in zip(pieces.items(), parts, strict=True):
                piece.put(part, found[name])
        return found

    # From there.

    @torch.no_grad()
    def scatter(
        self, whole: Mapping[str, Tensor], own: Mapping[str, Tensor], names: Iterable[str]
    ) -> None:
        """Give every rank of the group its pieces, in place.

        Args:
            whole: the tensors, on the first rank. own: those that are to have the pieces.
        """
        rank = self.mates.rank
        for chunk in self._chunks(names):
            pieces = self._pieces(chunk, rank)
            if self.leads:
                for other in range(1, self.mates.size):
                    sent = self._taken(whole, self._pieces(chunk, other))
                    if sent:
                        self.mates.send(torch.cat(sent), other, "scatter pieces").wait()
                parts = self._taken(whole, pieces)
            elif self.is_of_first:
                parts = self._received(pieces, 0, "scatter pieces")
            else:
                parts = []
            for (name, _), part in zip(pieces.items(), self._shared(pieces, parts), strict=True):
                own[name].detach().copy_(part.view_as(own[name]))

    def _taken(self, whole: Mapping[str, Tensor], pieces: Mapping[str, Piece]) -> list[Tensor]:
        return [piece.take(whole[name]).reshape(-1) for name, piece in pieces.items()]

    def _shared(self, pieces: Mapping[str, Piece], parts: list[Tensor]) -> list[Tensor]:
        """What this rank has got, or one of another replica that has the same pieces."""
        if self.alike.size == 1 or not pieces:
            return parts
        sizes = [prod(piece.own) for piece in pieces.values()]
        flat = torch.cat(parts) if parts else self._empty(next(iter(pieces)), (sum(sizes),))
        self.alike.broadcast(flat, "spread pieces").wait()
        return list(flat.split(sizes))

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

    # States.

    def join(self, state: dict[str, Any]) -> dict[str, Any]:
        """The state of the first replica as one rank would have it, on its first rank; elsewhere
        nothing. Those of all its ranks are in memory there meanwhile.

        Raises:
            CheckpointError: something in it cannot be saved, or is missing.
        """
        if not self.is_of_first:
            return {}
        if not self.leads:
            self._send(state)
            return {}
        live = {kind: state[kind] for kind in ("optimizers", "fusions", "rounds")}
        own = {**state, **map_nest(lambda leaf: leaf, live)}  # of which parts are replaced
        return join_states([own, *(self._receive(rank) for rank in range(1, self.mates.size))])

    def _send(self, state: dict[str, Any]) -> None:
        messages = wrap(*pack(state), sequence=0, done=0, score=None)
        text = torch.frombuffer(bytearray(messages[0].content.encode()), dtype=torch.uint8)
        flat = torch.cat([tensor for message in messages for tensor in message.tensors])
        sizes = torch.tensor([text.numel(), flat.numel()])
        for part in (sizes, text, flat):
            if part.numel():
                self.mates.send(part.to(self.device), 0, "gather states").wait()

    def _receive(self, rank: int) -> dict[str, Any]:
        def take(size: int, dtype: torch.dtype) -> Tensor:
            part = torch.empty(size, dtype=dtype, device=self.device)
            if size:
                self.mates.receive(part, rank, "gather states").wait()
            return part.cpu()

        text, flat = take(2, torch.int64).tolist()
        content = take(text, torch.uint8).numpy().tobytes().decode()
        message = Save(
            sequence=0,
            done=0,
            score=None,
            piece=0,
            pieces=1,
            content=content,
            tensors=(take(flat, torch.uint8),),
        )
        state: dict[str, Any] = unpack(*unwrap([message]))
        return state
