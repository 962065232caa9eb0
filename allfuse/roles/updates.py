"""What a worker brings to the servers: gradients and changes, cut into pieces and encoded."""

from __future__ import annotations

import zlib
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from allfuse.base.keys import mix
from allfuse.base.torch_private import foreach_copy, foreach_multiply, storage_users
from allfuse.codec import MessageCodec
from allfuse.roles.blueprint import Blueprint, read_codec
from allfuse.roles.cutting import Span, overlaps, view_all
from allfuse.roles.readers import to_exact
from allfuse.roles.replica import Replica
from allfuse.roles.rotation import ALL


class Sheet:
    """Memory for one update of a rank: a flat tensor for each block, empty where it is not this
    rank that pushes it, and views by name."""

    def __init__(self, blueprint: Blueprint, device: torch.device, rank: int) -> None:
        blocks = blueprint.blocks
        self.flats = [
            torch.empty(b.elements * (b.ranks[0] == rank), dtype=b.dtype, device=device)
            for b in blocks
        ]
        self.tensors = view_all(blocks, self.flats)
        self._users = [storage_users(flat) for flat in self.flats]

    @property
    def is_idle(self) -> bool:
        """Whether no message holds a part of it."""
        return [storage_users(flat) for flat in self.flats] == self._users


class Updates:
    """The updates of one worker, lease by lease: of those blocks that its rank pushes.

    Phases of one update, for B bytes:
      1. `put`: gradients that are final are copied into flat memory (B read and written once); a
         piece whose gradients are all there may travel while others are still computed.
      2. `rest`: gradients that never came count as zero; changes are taken (weights as read less
         weights now); everything else may travel.
      3. `piece`: a piece as it travels. Under a codec what is lost is kept and added to the next
         update (error feedback), once `keep` says that this one counts; else it is as if nothing
         had been sent.

    Args:
        name: of the worker, for codecs that draw.
    """

    def __init__(self, replica: Replica, name: str) -> None:
        self.blueprint, self.replica = replica.blueprint, replica
        self.codec: MessageCodec | None = read_codec(self.blueprint.codec)
        self.device = replica.read[0].device if replica.read else torch.device("cpu")
        self.key = zlib.crc32(name.encode())
        blocks = self.blueprint.blocks
        self._homes = overlaps(blocks, replica.shards)
        self.own = [number for number, block in enumerate(blocks) if block.ranks[0] == replica.rank]
        self.pushed = [
            name
            for number in self.own
            for name in blocks[number].names
            if not self.blueprint.pushes_changes(number)
        ]
        self._sheets: list[Sheet] = []
        self.sheet = self._idle_sheet()
        self._waits: dict[tuple[int, int], int] = {}
        self._came: set[str] = set()
        self._left = self._new = self._zeros()
        if self.codec is not None:
            self._new = self._zeros()
        self.clock, self.lease, self._has_encoded, self._was_kept = 0, -1, False, False
        self._fragment = ALL

    def _zeros(self) -> list[Tensor]:
        if self.codec is None:
            return []
        return [torch.zeros_like(to_exact(flat)) for flat in self.sheet.flats]

    def _idle_sheet(self) -> Sheet:
        idle = next((sheet for sheet in self._sheets if sheet.is_idle), None)
        if idle is None:
            idle = Sheet(self.blueprint, self.device, self.replica.rank)
            self._sheets.append(idle)
        return idle

    @property
    def residuals(self) -> dict[str, Tensor]:
        """What was not sent yet, by name: live tensors, none where nothing is lost."""
        return view_all(self.blueprint.blocks, self._left) if self._left else {}

    def begin(self, lease: int, clock: int, fragment: int = ALL) -> None:
        """The next update is that of a lease, of one fragment or of all. What an earlier one still
        needs stays as it is."""
        self.sheet = self._idle_sheet()
        self.lease, self.clock, self._has_encoded = lease, clock, False
        self._fragment = fragment
        self._came = set()
        self._waits = {
            (server, number): 0
            for server, pieces in enumerate(self.replica.shards)
            for number, piece in enumerate(pieces)
            if fragment in (ALL, piece.fragment) and piece.ranks[0] == self.replica.rank
        }
        for homes in self._homes.values():
            for home in homes:
                if home in self._waits:
                    self._waits[home] += 1

    @property
    def _blocks(self) -> list[int]:
        """Those that the update is of."""
        blocks = self.blueprint.blocks
        return [n for n in self.own if self._fragment in (ALL, blocks[n].fragment)]

    @torch.no_grad()
    def put(self, gradients: Mapping[str, Tensor], scale: float = 1.0) -> list[tuple[int, int]]:
        """Take final gradients in, by name, multiplied by `scale`; which pieces, as (server,
        piece), are whole now."""
        own = [self.sheet.tensors[name] for name in gradients]
        foreach_copy(own, list(gradients.values()))
        if scale != 1.0 and own:
            foreach_multiply(own, scale)
        return self._arrive(gradients.keys())

    def _arrive(self, names: Collection[str]) -> list[tuple[int, int]]:
        ready = []
        for name in names:
            if name in self._came:
                continue
            self._came.add(name)
            for home in self._homes[name]:
                self._waits[home] -= 1
                if self._waits[home] == 0:
                    ready.append(home)
        return ready

    @torch.no_grad()
    def rest(self) -> list[tuple[int, int]]:
        """Take in what is left; which pieces are whole now, those without elements too."""
        empty = [home for home, count in self._waits.items() if count == 0 and self._is_empty(home)]
        for name in self.pushed:
            if name not in self._came:
                self.sheet.tensors[name].zero_()
        for number in self._blocks:
            read, live = self.replica.read[number], self.replica.live[number]
            if read is not live:
                torch.sub(read, live, out=self.sheet.flats[number])
        blocks = self.blueprint.blocks
        return empty + self._arrive([name for n in self._blocks for name in blocks[n].names])

    def _is_empty(self, home: tuple[int, int]) -> bool:
        server, piece = home
        return not self.replica.shards[server][piece]

    def piece(self, server: int, piece: int) -> tuple[Tensor, ...]:
        """The tensors of a piece as they travel, on the CPU. To be asked for once an update."""
        spans = self.replica.shards[server][piece]
        codec = self.codec
        if codec is None or not codec.encodes(self.clock):
            return tuple(self.sheet.flats[s.block][s.start : s.stop].cpu() for s in spans)
        self._has_encoded = True
        return tuple(self._encode(codec, span, number) for number, span in enumerate(spans))

    @torch.no_grad()
    def _encode(self, codec: MessageCodec, span: Span, number: int) -> Tensor:
        block, part = span.block, slice(span.start, span.stop)
        values = self._left[block][part] + self.sheet.flats[block][part]
        message = codec.encode(values, mix(self.key, self.lease, block, span.start, number))
        sent = torch.empty_like(values)
        codec.decode(message, sent)
        lost = torch.sub(values, sent, out=self._new[block][part])
        lost.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)  # it was never to be sent
        return message.cpu()

    def keep(self) -> None:
        """The update counts: what its encoding lost is added to the next one."""
        if self._has_encoded:
            for n in self._blocks:
                self._left[n], self._new[n] = self._new[n], self._left[n]
            self._has_encoded, self._was_kept = False, True

    @torch.no_grad()
    def undo(self, own: float) -> None:
        """A share of what the last update brought is still in the weights that are worked on, and
        will be brought again: of what was not sent the same share stays as it was before."""
        if self._was_kept and own:
            for n in self._blocks:
                self._left[n].lerp_(self._new[n], own)
        self._was_kept = False
