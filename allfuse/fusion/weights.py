"""Fusion of weights: every H steps, between sites that step on their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from allfuse.base.tensors import split_buckets
from allfuse.base.torch_private import foreach_copy
from allfuse.codec.memory import capture_all, restore_all
from allfuse.fusion.fuser import Fuser
from allfuse.fusion.gradients import BUCKET_BYTES, read_state
from allfuse.link import Work
from allfuse.rule import Rule, SumRule


class Bundle:
    """Some tensors of one type, which travel as one.

    With a memory only what has changed since the last round is sent: `agreed` is what all peers
    held then, None before the first.
    """

    def __init__(self, names: list[str], tensors: list[Tensor], fuser: Fuser) -> None:
        self.names, self.tensors = names, tensors
        self.sizes = [tensor.numel() for tensor in tensors]
        shapes = [tuple(tensor.shape) for tensor in tensors]
        self.memory = fuser.memory(shapes, tensors[0].dtype, tensors[0].device)
        self.agreed: Tensor | None = None
        self.flat = tensors[0].new_empty(0)

    def read(self) -> Tensor:
        return torch.cat([tensor.detach().reshape(-1) for tensor in self.tensors])

    def write(self) -> None:
        """Take the fused values, and remember them where changes are sent."""
        if self.memory is not None:
            self.agreed = self.flat
        pieces = self.flat.split(self.sizes)
        views = [piece.view_as(t) for piece, t in zip(pieces, self.tensors, strict=True)]
        foreach_copy([tensor.detach() for tensor in self.tensors], views)


class WeightFusion:
    """Replaces tensors by their fused value over the peers of a `site` axis.

    Phases of one round, for B bytes of tensors on n peers:
      1. copy into flat buckets, prepared by a rule that sums with this peer's weight; under a codec
         that loses something what is sent is the change since the last round, which is small;
      2. fuse over the topology, all buckets under way at once: 2 (n-1)/n B bytes sent by each;
      3. a rule that sums finishes with the sum of weights; copy back.

    Tensors that are not floating point (counters of batches) stay local. Before changes can be sent
    the peers must agree on something: `agree()` where their values are equal, else the first round
    is not encoded.
    """

    def __init__(self, tensors: Sequence[Tensor], fuser: Fuser) -> None:
        self.tensors = [tensor for tensor in tensors if tensor.is_floating_point()]
        self.fuser = fuser
        self.bundles: list[Bundle] = []
        kinds: dict[tuple[torch.dtype, torch.device], list[int]] = {}
        for number, tensor in enumerate(self.tensors):
            kinds.setdefault((tensor.dtype, tensor.device), []).append(number)
        for numbers in kinds.values():
            sizes = [self.tensors[number].nbytes for number in numbers]
            for positions in split_buckets(sizes, BUCKET_BYTES, BUCKET_BYTES):
                held = [numbers[position] for position in positions]
                names = [str(number) for number in held]
                self.bundles.append(Bundle(names, [self.tensors[n] for n in held], fuser))

    def payload_bytes(self, round: int) -> int:
        """What a peer has to say in a round, encoded."""
        codec = self.fuser.fusion.codec
        shapes = [tuple(tensor.shape) for tensor in self.tensors]
        return codec.payload_bytes(shapes, 4) if codec.encodes(round) else self.plain_bytes

    @property
    def plain_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    def agree(self) -> None:
        """The values here are those of all peers."""
        for bundle in self.bundles:
            if bundle.memory is not None:
                bundle.agreed = bundle.read()

    @torch.no_grad()
    def fuse(self, weights: Sequence[float], round: int = 0) -> None:
        """One round, in place. `weights` are those of all peers.

        A topology that mixes brings weights of its own, in which all peers count alike.
        """
        if self.fuser.link.size == 1:
            return
        rule: Rule | None = None if self.fuser.mixes else self.fuser.fusion.rule
        own, total = weights[self.fuser.link.rank], sum(weights)
        encodes = self.fuser.encodes(round)
        under_way: list[tuple[Bundle, Tensor | None, Work]] = []
        for number, bundle in enumerate(self.bundles):
            flat = bundle.flat = bundle.read()
            base = bundle.agreed if encodes else None
            if base is not None:
                flat -= base
            if isinstance(rule, SumRule):
                rule.prepare(flat, own)
            work = self.fuser.start(
                flat,
                f"fuse weights, bucket {number}",
                round=round,
                weights=weights,
                memory=None if base is None else bundle.memory,
            )
            under_way.append((bundle, base, work))
        for bundle, base, work in under_way:
            work.wait()
            if isinstance(rule, SumRule):
                rule.finish(bundle.flat, total)
            if base is not None:
                bundle.flat += base
            bundle.write()

    def capture(self) -> dict[str, Any] | None:
        """What is kept from round to round: live tensors. None where nothing is."""
        memories = [(b.names, b.memory) for b in self.bundles if b.memory is not None]
        if not memories:
            return None
        agreed: dict[str, Tensor] = {}
        for bundle in self.bundles:
            if bundle.agreed is not None:
                agreed |= dict(zip(bundle.names, bundle.agreed.split(bundle.sizes), strict=True))
        codec = str(self.fuser.fusion.codec)
        return {"agreed": agreed, "codec": codec, **capture_all(memories)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take back what is kept."""
        memories = [(b.names, b.memory) for b in self.bundles if b.memory is not None]
        restore_all(memories, read_state(state, self.fuser))
        for bundle in self.bundles:
            found = [state["agreed"].get(name) for name in bundle.names]
            if bundle.memory is not None and all(piece is not None for piece in found):
                bundle.agreed = torch.cat([piece.reshape(-1) for piece in found]).to(bundle.read())
