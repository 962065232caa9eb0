"""A fusion played serially in one process: what all peers would hold, transfer by transfer.

It shares with the code under test what is pure: rules, codecs, schedules, and how a block is cut.
What moves data, keeps residuals and weighs gradients is written out here again, to be checked by
eye.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

from allfuse.base.keys import mix
from allfuse.base.tensors import share, split_buckets
from allfuse.codec import MessageCodec, SumCodec
from allfuse.codec.memory import Memory
from allfuse.execute import segments_of
from allfuse.fusion import choose
from allfuse.plan import Data, Site
from allfuse.rule import Mean, Rule, SumRule
from allfuse.rule.whole import fuse_whole, sift_whole
from allfuse.topology import Layout, Topology
from allfuse.topology.exchange import Exchange


def positions_of(tensors: Sequence[Tensor], most: int, first: int) -> list[list[int]]:
    """Which tensors travel together, by their places: those of one type, in this order."""
    kinds: dict[tuple[torch.dtype, torch.device], list[int]] = {}
    for place, tensor in enumerate(tensors):
        kinds.setdefault((tensor.dtype, tensor.device), []).append(place)
    found = []
    for places in kinds.values():
        sizes = [tensors[place].nbytes for place in places]
        found += [[places[i] for i in each] for each in split_buckets(sizes, most, first)]
    return found


class Replay:
    """The fusion of one axis, whose n peers are all here.

    A peer's residual is kept from round to round under the name of its block.
    """

    def __init__(self, axis: Data | Site, seed: int) -> None:
        self.fusion, _ = choose(axis.rule, axis.topology, axis.sync, axis.codec, axis.n)
        self.n, self.seed = axis.n, seed
        self._memories: dict[str, list[Memory]] = {}

    @property
    def rule(self) -> Rule:
        return self.fusion.rule

    @property
    def loses(self) -> bool:
        """Whether anything is lost and kept, sooner or later."""
        return self.n > 1 and not self.fusion.codec.lossless

    def encodes(self, round: int) -> bool:
        """Whether this round is encoded: the first `warm` ones are not."""
        return self.loses and self.fusion.codec.encodes(round)

    @torch.no_grad()
    def fuse(
        self,
        blocks: list[Tensor],
        weights: Sequence[float],
        shapes: Sequence[tuple[int, ...]],
        name: str,
        round: int,
        rule: Rule | None = None,
    ) -> Tensor:
        """What the rule (by default the fusion's) makes of the blocks, one for each peer, changed,
        by their weights. One that measures whole tensors has one of them in each block.

        Under the mean `weights` are inside the blocks already where they add up to 1.
        """
        rule, total = rule or self.fusion.rule, sum(weights)
        if not isinstance(rule, SumRule):
            left = [sift_whole(rule, block, shapes[0]) for block in blocks]
            told = torch.tensor(weights, dtype=torch.float64, device=blocks[0].device)
            return fuse_whole(rule, torch.stack(left), told, shapes[0])
        for block, weight in zip(blocks, weights, strict=True):
            rule.prepare(block, weight)
        return rule.finish(self.sum(blocks, shapes, name, round), total)

    def sum(
        self, blocks: list[Tensor], shapes: Sequence[tuple[int, ...]], name: str, round: int
    ) -> Tensor:
        """The sum of the blocks (changed) as the codec brings it to all."""
        if not self.encodes(round):
            return torch.stack(blocks).sum(0)
        first = blocks[0]
        memories = self._memories.setdefault(
            name, [Memory(shapes, first.dtype, first.device) for _ in blocks]
        )
        exact = memories[0].residual.dtype
        values = [b.to(exact) + m.residual for b, m in zip(blocks, memories, strict=True)]
        for memory in memories:
            memory.residual.zero_()
        seed = mix(self.seed, round, zlib.crc32(name.encode()))
        if isinstance(self.fusion.codec, SumCodec):
            self._sum_programs(self.fusion.codec, values, memories, seed)
        else:
            self._send_messages(values, [memory.residual for memory in memories], seed)
        return values[0].to(first.dtype)

    def unsent(self, name: str) -> list[Tensor]:
        """What each peer has not sent of a block; empty before its first round."""
        return [memory.residual.clone() for memory in self._memories.get(name, ())]

    def undo(self, name: str, before: list[Tensor], share: float) -> None:
        """Set what was not sent back by a share of the way, to what it was `before` a round."""
        for peer, memory in enumerate(self._memories.get(name, ())):
            past = before[peer] if before else torch.zeros_like(memory.residual)
            memory.residual = share * past + (1 - share) * memory.residual

    def _sum_programs(
        self, codec: SumCodec, values: list[Tensor], memories: list[Memory], seed: int
    ) -> None:
        programs = [
            codec.rounds(own, memory.residual, memory, seed)
            for own, memory in zip(values, memories, strict=True)
        ]
        for sent in zip(*programs, strict=True):
            total = torch.stack(sent).sum(0)
            for each in sent:
                each.copy_(total)

    def _send_messages(self, values: list[Tensor], errors: list[Tensor], seed: int) -> None:
        codec, topology, layout = self.fusion.codec, self.fusion.topology, Layout.of(self.n)
        assert isinstance(codec, MessageCodec)
        if Exchange().bytes_per_peer(layout, 1) <= topology.bytes_per_peer(layout, 1):
            topology = Exchange()
        segments = segments_of(topology, codec.encoded_bytes(max(len(values[0]), 1)))
        for s in range(segments):
            part = slice(*share(len(values[0]), segments, s))
            held, lost = [value[part] for value in values], [error[part] for error in errors]
            seeds = [mix(seed, peer, s) for peer in range(self.n)]
            play(topology, codec, held, lost, seeds)


def play(
    topology: Topology,
    codec: MessageCodec,
    held: list[Tensor],
    lost: list[Tensor],
    seeds: list[int],
) -> None:
    """The transfers of a schedule, one after the other, each chunk as a message."""
    schedule = topology.schedule(Layout.of(len(held)))
    size = len(held[0])
    cuts = [
        slice(size * c // schedule.chunks, size * (c + 1) // schedule.chunks)
        for c in range(schedule.chunks)
    ]
    final: dict[tuple[int, int], Tensor] = {}  # messages of chunks that will not change any more
    for phase in schedule.phases:
        sent: list[tuple[int, int, int, str, Tensor]] = []
        for src, dst, start, stop, op, _ in phase:
            for chunk in range(start, stop):
                own = held[src][cuts[chunk]]
                if not len(own):
                    continue
                message = final.get((src, chunk))
                if message is None:
                    settled = op != "add"
                    message = codec.encode(own, mix(seeds[src], chunk, settled))
                    decoded = torch.empty_like(own)
                    codec.decode(message, decoded)
                    lost[src][cuts[chunk]] += own - decoded
                    if settled:
                        final[src, chunk] = message
                        own.copy_(decoded)
                sent.append((src, dst, chunk, op, message))
        collected: dict[tuple[int, int], dict[int, Tensor]] = {}
        for src, dst, chunk, how, message in sent:
            own = held[dst][cuts[chunk]]
            arrived = torch.empty_like(own)
            codec.decode(message, arrived)
            if how == "add":
                own += arrived
            elif how == "copy":
                own.copy_(arrived)
                final[dst, chunk] = message
            else:
                collected.setdefault((dst, chunk), {dst: own.clone()})[src] = arrived
        for (dst, chunk), values in collected.items():
            total = torch.zeros_like(values[dst])
            for peer in sorted(values):
                total += values[peer]
            held[dst][cuts[chunk]].copy_(total)


def is_plain_mean(replay: Replay) -> bool:
    """Whether the whole batch can be learned from at once: nothing depends on who has what."""
    return isinstance(replay.rule, Mean) and not replay.loses
