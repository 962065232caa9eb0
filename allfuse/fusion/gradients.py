"""Fusion of gradients: every step, bucket by bucket, while the backward pass still runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Parameter

from allfuse.base.errors import UserError
from allfuse.base.tensors import split_buckets
from allfuse.base.torch_private import foreach_copy
from allfuse.fusion.base import Fusion
from allfuse.link import Link, Work

BUCKET_BYTES = 25_000_000
FIRST_BUCKET_BYTES = 1_000_000  # small, so that the first transfer starts early


@dataclass
class Bucket:
    """Gradients of some parameters end to end in one flat tensor, then one flag for each.

    A flag is 1 where this rank has a gradient. Summed, it says whether any rank has one, as one
    process would: a parameter that nobody used keeps `grad=None`, so its optimizer skips it.
    """

    indices: list[int]
    flat: Tensor
    views: list[Tensor]
    flags: Tensor
    missing: int = 0
    work: Work | None = None


class GradientFusion:
    """Sums the gradients of some parameters over the peers of a replica axis.

    Each peer's gradients must carry its weight already: the loss that is differentiated is the
    peer's sum of losses over the count of the whole batch. The weighted mean is then a plain sum.

    Phases of one step, for a payload of B bytes on n peers:
      1. `final(i)`: parameter i is final; a full bucket is copied into its flat tensor (B read and
         written once) and its sum is started, always in the order of the buckets. Overlaps with
         backward. 2 (n-1)/n B bytes sent for each peer with native.
      2. `finish()`: starts what is left (unused parameters count as zero), waits, and makes each
         `grad` a view into the sums. Nothing is copied back.

    Parameters must be listed alike on every peer. Peers that use different parameters in a step
    neither hang nor differ: every bucket travels in every step.
    """

    def __init__(
        self,
        names: Sequence[str],
        parameters: Sequence[Parameter],
        fusion: Fusion,
        link: Link,
        *,
        bucket_bytes: int = BUCKET_BYTES,
        first_bucket_bytes: int = FIRST_BUCKET_BYTES,
    ) -> None:
        self.names, self.parameters = list(names), list(parameters)
        self.fusion, self.link = fusion, link
        self.buckets: list[Bucket] = []
        self._home: dict[int, Bucket] = {}
        self._started = 0
        self._is_final = [False] * len(self.parameters)
        if link.size > 1:
            self._build(bucket_bytes, first_bucket_bytes)

    def _build(self, bucket_bytes: int, first_bucket_bytes: int) -> None:
        # Reversed: gradients become final from the last layer to the first.
        kinds: dict[tuple[torch.dtype, torch.device], list[int]] = {}
        for index in reversed(range(len(self.parameters))):
            parameter = self.parameters[index]
            if parameter.is_complex():
                raise UserError(
                    f"parameter {self.names[index]} is complex; allowed: real parameters; "
                    "next: store it as torch.view_as_real"
                )
            kinds.setdefault((parameter.dtype, parameter.device), []).append(index)
        for (dtype, device), indices in kinds.items():
            sizes = [self.parameters[index].nbytes for index in indices]
            for positions in split_buckets(sizes, bucket_bytes, first_bucket_bytes):
                members = [indices[position] for position in positions]
                counts = [self.parameters[index].numel() for index in members]
                flat = torch.zeros(sum(counts) + len(counts), dtype=dtype, device=device)
                *pieces, flags = flat.split([*counts, len(counts)])
                views = [
                    piece.view_as(self.parameters[index])
                    for piece, index in zip(pieces, members, strict=True)
                ]
                bucket = Bucket(members, flat, views, flags, missing=len(members))
                self.buckets.append(bucket)
                for index in members:
                    self._home[index] = bucket

    @property
    def payload_bytes(self) -> int:
        return sum(bucket.flat.nbytes for bucket in self.buckets)

    def final(self, index: int) -> None:
        """The gradient of parameter `index` will not change any more in this step."""
        if self.link.size == 1:
            return
        if self._is_final[index]:
            raise UserError(
                f"the gradient of {self.names[index]} became final twice in one step; allowed: one "
                "backward pass for each step; next: pass every loss of the step to one backward, "
                "or use torch.utils.checkpoint with use_reentrant=False"
            )
        self._is_final[index] = True
        bucket = self._home[index]
        bucket.missing -= 1
        while self._started < len(self.buckets) and self.buckets[self._started].missing == 0:
            self._start(self.buckets[self._started])

    def _start(self, bucket: Bucket) -> None:
        targets: list[Tensor] = []
        sources: list[Tensor] = []
        for view, index in zip(bucket.views, bucket.indices, strict=True):
            gradient = self.parameters[index].grad
            if gradient is None:
                view.zero_()
                continue
            if gradient.is_sparse:
                raise UserError(
                    f"the gradient of {self.names[index]} is sparse; allowed: dense gradients; "
                    "next: build the embedding with sparse=False"
                )
            if gradient.data_ptr() != view.data_ptr():
                targets.append(view)
                sources.append(gradient)
        if targets:
            foreach_copy(targets, sources)
        if bucket.missing == 0:
            bucket.flags.fill_(1)
        else:
            has = [float(self.parameters[index].grad is not None) for index in bucket.indices]
            bucket.flags.copy_(torch.tensor(has))
        operation = f"fuse gradients, bucket {self._started}"
        bucket.work = self.fusion.start_sum(bucket.flat, self.link, operation)
        self._started += 1

    def finish(self) -> None:
        """Wait for all sums. After it each `grad` holds the sum over the peers."""
        while self._started < len(self.buckets):
            self._start(self.buckets[self._started])
        for bucket in self.buckets:
            assert bucket.work is not None
            bucket.work.wait()
            used = None if bucket.missing == 0 else bucket.flags.tolist()
            for place, index in enumerate(bucket.indices):
                parameter = self.parameters[index]
                parameter.grad = bucket.views[place] if used is None or used[place] else None
                self._is_final[index] = False
            bucket.work, bucket.missing = None, len(bucket.indices)
        self._started = 0

    def forget(self) -> None:
        """Drop a step that was begun and will not be finished."""
        for bucket in self.buckets:
            bucket.work, bucket.missing = None, len(bucket.indices)
        self._is_final = [False] * len(self.parameters)
        self._started = 0
