"""A fusion at work: blocks of values of all peers of an axis become one."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from allfuse.base.keys import mix
from allfuse.codec import MessageCodec, SumCodec
from allfuse.codec.base import Shapes
from allfuse.codec.memory import Memory
from allfuse.execute import Encoding, Gather, Plot, plot, run, segments_of
from allfuse.fusion.auto import Auto
from allfuse.fusion.base import Fusion
from allfuse.link.runner import Runner
from allfuse.rule import GatherRule, Rule
from allfuse.topology import Layout, Native, Topology
from allfuse.topology.central import Central
from allfuse.topology.exchange import Exchange

if TYPE_CHECKING:
    from torch import Tensor

    from allfuse.link import Link, Work


class Fuser:
    """A fusion on the link of its axis.

    Blocks are fused in the order in which they are started, which is the same on all peers. The
    link's own all-reduce runs wherever the link runs it; all else runs in a thread beside the
    caller, who alone must not use the link meanwhile.

    Args:
        layout: which peers share a host; None is one host for all.
        seed: of topologies and codecs that draw (gossip in random pairs, random places).
        auto: picks the topology of each block, in place of the fusion's own.
    """

    def __init__(
        self,
        fusion: Fusion,
        link: Link,
        layout: Layout | None = None,
        seed: int = 0,
        auto: Auto | None = None,
    ) -> None:
        self.fusion, self.link, self.auto = fusion, link, auto
        self.layout = layout or Layout.of(link.size)
        self.seed = seed
        self._runner = Runner(f"allfuse-fuse-{link.rank}")

    @property
    def mixes(self) -> bool:
        """Whether peers come closer only, and do not end equal."""
        return not self.fusion.topology.exact

    @property
    def needs_own_link(self) -> bool:
        """Whether it works beside the caller, who must leave the link to it."""
        only_sums = isinstance(self.fusion.topology, Native) and self.fusion.codec.lossless
        return not only_sums or self.auto is not None

    def topology(self, block: Tensor, tail: int = 0) -> Topology:
        """Over which a block of this size goes, its tail not counted. The first time may measure
        the link."""
        if self.auto is None:
            return self.fusion.topology
        return self.auto.pick(block.numel() - tail, block.element_size()).topology

    def memory(
        self, shapes: Shapes, dtype: torch.dtype, device: torch.device | str
    ) -> Memory | None:
        """What is kept of a block of tensors of these shapes from round to round.

        None where nothing is lost. Its residual has the size of the block.
        """
        if self.link.size == 1 or self.fusion.codec.lossless:
            return None
        return Memory(shapes, dtype, torch.device(device))

    def encodes(self, round: int) -> bool:
        """Whether what has a memory is encoded in this round."""
        return self.link.size > 1 and self.fusion.codec.encodes(round)

    def start(
        self,
        block: Tensor,
        operation: str,
        *,
        round: int = 0,
        weights: Sequence[float] = (),
        memory: Memory | None = None,
        tail: int = 0,
        rule: Rule | None = None,
    ) -> Work:
        """Start to sum a contiguous block over the peers, in place; or to mix it.

        A rule that gathers (by default the fusion's) fuses it with the peers' `weights` (all alike
        if there are none), unless it measures whole tensors: then it is summed, too. With a
        `memory` it is encoded, once the codec's `warm` rounds are over, and what that loses is kept
        there. The last `tail` elements are summed as they are whatever the rule and the codec.
        2 (n-1)/n of its bytes are sent by each peer with native; see each topology for its own, and
        each codec for what stands for them.
        """
        link = self.link
        if link.size == 1 or not self.needs_own_link:
            return link.all_reduce(block, operation)
        self.topology(block, tail)  # what is to be measured is measured before others use the link
        if memory is None or not self.encodes(round):
            gather = self._gather(rule or self.fusion.rule, block, weights)
            return self._runner.start(
                lambda: self._fuse(block, operation, round, gather=gather, tail=tail)
            )
        encode = self._send_sums if isinstance(self.fusion.codec, SumCodec) else self._send_messages
        seed = mix(self.seed, round, zlib.crc32(operation.encode()))
        return self._runner.start(
            lambda: _with_feedback(
                block, memory, tail, lambda values: encode(values, operation, memory, tail, seed)
            )
        )

    def grams(self, blocks: Sequence[Tensor], operation: str) -> list[Tensor]:
        """Of each block the Gram matrix <x_i, x_j> of what the peers have there: float64 (n, n),
        the same bits on all. Blocks stay as they are.

        Phases, for B bytes of blocks on n peers, all with a deadline:
          1. each peer multiplies a slice of the values of all: (n-1)/n B sent by each;
          2. these are summed: 8 n^2 bytes for each block.
        """
        link = self.link
        found = torch.zeros(len(blocks), link.size, link.size, dtype=torch.float64)

        def multiply(values: Tensor, number: int) -> Tensor:
            wide = values.double()
            found[number] += (wide @ wide.T).cpu()
            return values[0]  # goes nowhere

        def work() -> None:
            whole = self._plot(Central(), 0)
            there = Plot(whole.chunks, whole.turns[:1])  # nothing comes back
            for number, block in enumerate(blocks):
                gather = functools.partial(multiply, number=number)
                run(there, link, block.clone(), operation, gather=gather)

        self._runner.start(work).wait()
        total = found.to(blocks[0].device) if blocks else found
        link.all_reduce(total, operation).wait()
        return list(total.cpu())

    def _gather(self, rule: Rule, block: Tensor, weights: Sequence[float]) -> Gather | None:
        """How the values of all peers become one, where a rule needs them all."""
        if not isinstance(rule, GatherRule):
            return None
        exact = torch.promote_types(block.dtype, torch.float32)
        told = weights or [1.0] * self.link.size
        return functools.partial(
            rule.fuse, weights=torch.tensor(told, dtype=exact, device=block.device)
        )

    def _fuse(
        self,
        block: Tensor,
        operation: str,
        round: int = 0,
        *,
        gather: Gather | None = None,
        tail: int = 0,
    ) -> None:
        topology = self._for_whole_values(self.topology(block, tail))
        if isinstance(topology, Native):
            self.link.all_reduce(block, operation).wait()
        else:
            self._run(topology, block, operation, round, gather=gather, tail=tail)

    def _for_whole_values(self, topology: Topology) -> Topology:
        """Where an exchange was taken for short messages, what is not encoded takes central."""
        if isinstance(topology, Exchange) and isinstance(self.fusion.codec, MessageCodec):
            return min(topology, Central(), key=lambda t: t.bytes_per_peer(self.layout, 1))
        return topology

    def _run(
        self,
        topology: Topology,
        block: Tensor,
        operation: str,
        round: int = 0,
        *,
        gather: Gather | None = None,
        encoding: Encoding | None = None,
        tail: int = 0,
    ) -> None:
        mine = self._plot(topology, round)
        elements = block.numel() - tail
        moved = elements * block.element_size()
        if encoding is not None:
            moved = encoding.codec.encoded_bytes(max(elements, 1))
        segments = segments_of(topology, moved)
        run(
            mine,
            self.link,
            block,
            operation,
            segments,
            gather=gather,
            encoding=encoding,
            tail=tail,
        )

    def _plot(self, topology: Topology, round: int) -> Plot:
        number = 0 if topology.exact else round  # the others do the same in every round
        return plot(topology, self.layout, self.link.rank, number, self.seed)

    def _send_messages(
        self, values: Tensor, operation: str, memory: Memory, tail: int, seed: int
    ) -> None:
        """Values travel as messages; sums are encoded again, or all messages go to all peers,
        whichever sends fewer bytes (one encoding loses less, so that is taken at a tie)."""
        codec, topology = self.fusion.codec, self.topology(values, tail)
        assert isinstance(codec, MessageCodec)
        everywhere = Exchange()
        if everywhere.bytes_per_peer(self.layout, 1) <= topology.bytes_per_peer(self.layout, 1):
            topology = everywhere
        encoding = Encoding(codec=codec, error=memory.residual, seed=seed)
        self._run(topology, values, operation, encoding=encoding, tail=tail)

    def _send_sums(
        self, values: Tensor, operation: str, memory: Memory, tail: int, seed: int
    ) -> None:
        """What the codec's program yields is summed; the tail goes with its first sum."""
        codec = self.fusion.codec
        assert isinstance(codec, SumCodec)
        own, last = values.split([len(values) - tail, tail])
        for summed in codec.rounds(own, memory.residual, memory, seed):
            if len(last):
                together = torch.cat([summed, last])
                self._fuse(together, operation)
                summed.copy_(together[: len(summed)])
                last.copy_(together[len(summed) :])
                last = last[:0]
            else:
                self._fuse(summed, operation)

    def close(self) -> None:
        """Waits for nobody."""
        self._runner.close()


def _with_feedback(
    block: Tensor, memory: Memory, tail: int, send: Callable[[Tensor], None]
) -> None:
    """Send a block together with what is left from the rounds before.

    `send(values)` makes values and tail what they are for all peers, and adds what it loses to the
    residual, which is empty by then. In float32 or wider.
    """
    values = block if block.dtype == memory.residual.dtype else block.to(memory.residual.dtype)
    values[: len(values) - tail] += memory.residual
    memory.residual.zero_()
    send(values)
    if values is not block:
        block.copy_(values)
