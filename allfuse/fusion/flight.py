"""One round of some weights: read, carried over the link, landed in the tensors."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import Parameter

from allfuse.base.torch_private import foreach_copy
from allfuse.fusion.fuser import Fuser
from allfuse.rule import Mean, Rule, SpanRule, SumRule
from allfuse.rule.whole import sift_whole
from allfuse.sync.outer import Outer


class Bundle:
    """Some tensors of one type, which travel as one.

    Attributes:
        agreed: what all peers held after the last round, None before the first. Kept where changes
            are sent (there is a memory) or fused, or where an outer optimizer steps from there.
        rule: by which it is fused. Buffers, which count what batches were like, are averaged where
            it is one of changes.
        momentum: what that optimizer keeps, in float32 or wider; None before its first step.
        buffers: where there are buffers, which it leaves as they were fused.
    """

    def __init__(
        self, number: int, names: list[str], tensors: list[Tensor], fuser: Fuser, steps: bool
    ) -> None:
        self.operation = f"fuse weights, bucket {number}"
        self.names, self.tensors = names, tensors
        self.sizes = [tensor.numel() for tensor in tensors]
        ends = list(itertools.accumulate(self.sizes))
        self.buffers = [
            slice(end - size, end)
            for tensor, size, end in zip(tensors, self.sizes, ends, strict=True)
            if not isinstance(tensor, Parameter)
        ]
        self.steps = steps and len(self.buffers) < len(tensors)
        fused = fuser.fusion.rule
        averages = fused.of_changes and len(self.buffers) == len(tensors)
        self.rule: Rule = Mean() if averages else fused
        self.shapes = [tuple(tensor.shape) for tensor in tensors]
        first = tensors[0]
        self.exact = torch.promote_types(first.dtype, torch.float32)
        self.memory = fuser.memory(self.shapes, first.dtype, first.device)
        self.agreed: Tensor | None = None
        self.momentum: Tensor | None = None

    @property
    def keeps(self) -> bool:
        """Whether what all peers held after a round is needed in the next."""
        return self.memory is not None or self.steps or self.rule.of_changes

    def read(self) -> Tensor:
        """All values end to end: a copy (k,)."""
        return torch.cat([tensor.detach().reshape(-1) for tensor in self.tensors])

    def write(self, flat: Tensor) -> None:
        pieces = flat.split(self.sizes)
        views = [piece.view_as(t) for piece, t in zip(pieces, self.tensors, strict=True)]
        foreach_copy([tensor.detach() for tensor in self.tensors], views)

    def name(self, flat: Tensor) -> dict[str, Tensor]:
        """Views of the tensors in a block, by their names."""
        return dict(zip(self.names, flat.split(self.sizes), strict=True))

    def find(self, named: Mapping[str, Tensor]) -> Tensor | None:
        """The block again; None unless all of its tensors are there."""
        if any(name not in named for name in self.names):
            return None
        pieces = [named[name].reshape(-1) for name in self.names]
        return torch.cat(pieces).to(self.tensors[0].device)


@dataclass
class Load:
    """A bundle on its way.

    base: what its values are the change of; None where they are whole. encoded: what is not sent is
    kept in the bundle's memory. unsent: what was kept there before, where that is needed to land.
    rule: by which it is fused.
    """

    bundle: Bundle
    flat: Tensor
    base: Tensor | None = None
    encoded: bool = False
    unsent: Tensor | None = None
    rule: Rule = field(default_factory=Mean)


class Flight:
    """A round of some bundles, which owns copies of their values.

    `carry` may run in another thread while the tensors go on changing; it is made, and lands, in
    the thread that trains.

    Args:
        encodes: whether the values are encoded in this round, where all peers agree on something.
    """

    def __init__(self, loads: list[Load], fuser: Fuser, round: int, encodes: bool) -> None:
        self.loads, self.fuser, self.round, self._encodes = loads, fuser, round, encodes

    @property
    def payload_bytes(self) -> int:
        """What a peer has to say, encoded."""
        if not self._encodes:
            return sum(load.flat.nbytes for load in self.loads)
        shapes = [shape for load in self.loads for shape in load.bundle.shapes]
        return self.fuser.fusion.codec.payload_bytes(shapes, 4)

    def values(self) -> dict[str, Tensor]:
        """What was fused, by the names of tensors, once it was carried."""
        return {n: v for load in self.loads for n, v in load.bundle.name(load.flat).items()}

    def unsent(self) -> dict[str, Tensor]:
        """What had not been sent before it departed, where that is kept."""
        kept = [(load.bundle, load.unsent) for load in self.loads if load.unsent is not None]
        return {n: v for bundle, unsent in kept for n, v in bundle.name(unsent).items()}

    @torch.no_grad()
    def carry(self, weights: Sequence[float]) -> None:
        """Fuse the values over the link; all blocks are under way at once. Raises PeerLost.

        `weights` are those of all peers. A topology that mixes brings weights of its own, in which
        all peers count alike.
        """
        own, total = weights[self.fuser.link.rank], sum(weights)
        self._measure(weights)
        under_way = []
        for load in self.loads:
            if isinstance(load.rule, SumRule) and not self.fuser.mixes:
                load.rule.prepare(load.flat, own)
            work = self.fuser.start(
                load.flat,
                load.bundle.operation,
                round=self.round,
                weights=weights,
                memory=load.bundle.memory if load.encoded else None,
                rule=load.rule,
            )
            under_way.append(work)
        for load, work in zip(self.loads, under_way, strict=True):
            work.wait()
            if isinstance(load.rule, SumRule) and not self.fuser.mixes:
                load.rule.finish(load.flat, total)
            if load.base is not None:
                load.flat += load.base
                load.base = None

    def _measure(self, weights: Sequence[float]) -> None:
        """What rules need to know of whole tensors: what of them is left out, and by what they are
        multiplied before they are summed."""
        spans: list[tuple[Load, SpanRule]] = []
        for load in self.loads:
            if not load.rule.of_tensors:
                continue
            load.flat = sift_whole(load.rule, load.flat, load.bundle.shapes[0])
            if isinstance(load.rule, SpanRule):
                spans.append((load, load.rule))
        if not spans:
            return
        told = torch.tensor(weights, dtype=torch.float64)
        grams = self.fuser.grams([load.flat for load, _ in spans], "compare weights")
        for (load, rule), gram in zip(spans, grams, strict=True):
            load.flat *= float(rule.coefficients(gram, told)[self.fuser.link.rank])

    @torch.no_grad()
    def land(self, outer: Outer, own: float = 0.0, keep: bool = True) -> None:
        """Take in what came out: the outer optimizer steps from what all agreed on last.

        Args:
            own: the share that the tensors keep of what they hold by now. What a codec has not sent
                becomes the same mean of what it was before the round and after it: a share of the
                round is undone, and what it would have sent is still there. Without steps between
                departure and landing the sum of weights and of what was not sent stays the same.
            keep: go on from here in the next round. Else only the tensors change.
        """
        for load in self.loads:
            bundle, agreed = load.bundle, load.flat
            if bundle.steps and bundle.agreed is not None:
                fused, anchor = agreed.to(bundle.exact), bundle.agreed.to(bundle.exact)
                stepped, momentum = outer.step(fused, anchor, bundle.momentum)
                for buffer in bundle.buffers:
                    stepped[buffer] = fused[buffer]
                agreed = stepped.to(agreed.dtype)
                if keep:
                    bundle.momentum = momentum
            if keep and bundle.keeps:
                bundle.agreed = agreed
            if keep and own and bundle.memory is not None and load.unsent is not None:
                bundle.memory.residual.lerp_(load.unsent, own)
            bundle.write(torch.lerp(agreed, bundle.read(), own) if own else agreed)
