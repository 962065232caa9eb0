"""Fusion of weights: every H steps, between sites that step on their own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from allfuse.base.tensors import split_buckets
from allfuse.base.torch_private import foreach_copy
from allfuse.fusion.fuser import Fuser
from allfuse.fusion.gradients import BUCKET_BYTES
from allfuse.rule import Rule, SumRule


class WeightFusion:
    """Replaces tensors by their fused value over the peers of a `site` axis.

    Phases of one round, for B bytes of tensors on n peers:
      1. copy into flat buckets, prepared by a rule that sums with this peer's weight;
      2. fuse over the topology, all buckets under way at once: 2 (n-1)/n B bytes sent by each;
      3. a rule that sums finishes with the sum of weights; copy back.

    Tensors that are not floating point (counters of batches) stay local.
    """

    def __init__(self, tensors: Sequence[Tensor], fuser: Fuser) -> None:
        self.tensors = [tensor for tensor in tensors if tensor.is_floating_point()]
        self.fuser = fuser
        self.groups: list[list[Tensor]] = []
        kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        for tensor in self.tensors:
            kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor)
        for group in kinds.values():
            sizes = [tensor.nbytes for tensor in group]
            for positions in split_buckets(sizes, BUCKET_BYTES, BUCKET_BYTES):
                self.groups.append([group[position] for position in positions])

    @property
    def payload_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    @torch.no_grad()
    def fuse(self, weights: Sequence[float], round: int = 0) -> None:
        """One round, in place. `weights` are those of all peers.

        A topology that mixes brings weights of its own, in which all peers count alike.
        """
        if self.fuser.link.size == 1:
            return
        rule: Rule | None = None if self.fuser.mixes else self.fuser.fusion.rule
        own, total = weights[self.fuser.link.rank], sum(weights)
        under_way = []
        for number, group in enumerate(self.groups):
            flat = torch.cat([tensor.reshape(-1) for tensor in group])
            if isinstance(rule, SumRule):
                rule.prepare(flat, own)
            work = self.fuser.start(flat, f"fuse weights, bucket {number}", round, weights)
            under_way.append((group, flat, work))
        for group, flat, work in under_way:
            work.wait()
            if isinstance(rule, SumRule):
                rule.finish(flat, total)
            pieces = flat.split([tensor.numel() for tensor in group])
            views = [piece.view_as(tensor) for piece, tensor in zip(pieces, group, strict=True)]
            foreach_copy(group, views)
