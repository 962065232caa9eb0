"""Fusion of gradients: every step, bucket by bucket, while the backward pass still runs."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from ctypes import c_float

import torch
from torch import Tensor
from torch.nn import Parameter

from allfuse.base.errors import UserError
from allfuse.base.tensors import split_buckets
from allfuse.base.torch_private import foreach_copy, storage_users
from allfuse.fusion.fuser import Fuser
from allfuse.link import Work

BUCKET_BYTES = 25_000_000
FIRST_BUCKET_BYTES = 1_000_000  # small, so that the first transfer starts early
SMALL_BYTES = 32_000  # gradients below are copied together: one call costs more than the bytes
NUMBERS = 4  # that a rank may tell its peers with the first bucket


class Bucket:
    """Gradients of some parameters end to end in one flat tensor, then one flag for each.

    A flag is 1 where this rank has a gradient. Summed, it says whether any rank has one, as one
    process would: a parameter that nobody used keeps `grad=None`, so its optimizer skips it.

    After the flags there may be words: numbers that ranks tell each other (see `carry`).
    """

    def __init__(
        self, number: int, names: list[str], parameters: list[Parameter], words: int = 0
    ) -> None:
        self.names, self.parameters, self._words = names, parameters, words
        self.operation = f"fuse gradients, bucket {number}"
        self.missing = len(parameters)
        self.large = [parameter.nbytes >= SMALL_BYTES for parameter in parameters]
        self.work: Work | None = None
        self._small = [place for place, is_large in enumerate(self.large) if not is_large]
        self._has_all = True
        self._begun = False  # whether a gradient of this step is in
        self._allocate()

    def _allocate(self) -> None:
        counts = [parameter.numel() for parameter in self.parameters]
        first = self.parameters[0]
        sizes = [*counts, len(counts), self._words]
        flat = torch.zeros(sum(sizes), dtype=first.dtype, device=first.device)
        *pieces, self.flags, self.words = flat.split(sizes)
        self.flat = flat
        self.views = [
            piece.as_strided(parameter.shape, torch.empty_like(parameter, device="meta").stride())
            for piece, parameter in zip(pieces, self.parameters, strict=True)
        ]  # with the strides of the parameters, as autograd makes gradients
        del pieces  # what is left is held by this bucket alone
        self._holders, self._users = _count_holders(list(self.views)), storage_users(flat)

    def _is_kept(self) -> bool:
        """Whether a script still holds gradients that live here and would be written over."""
        stale = [
            view
            for view, parameter in zip(self.views, self.parameters, strict=True)
            if parameter.grad is not view
        ]
        return bool(stale) and (
            _count_holders(stale) > self._holders or storage_users(self.flat) > self._users
        )

    def take(self, places: Sequence[int]) -> None:
        """Copy gradients in: large ones each as soon as it is final, while still in the cache.

        What a script keeps of the step before stays as it is. A gradient that is its view already
        (after zero_grad(set_to_none=False), or taken before) stays too.
        """
        if not self._begun:
            self._begun = True
            if self._is_kept():
                self._allocate()
        views: list[Tensor] = []
        gradients: list[Tensor] = []
        for place in places:
            parameter, view = self.parameters[place], self.views[place]
            gradient = parameter.grad
            if gradient is view:
                continue
            if gradient is None:
                view.zero_()
                self._has_all = False
                continue
            if gradient.layout != torch.strided:
                raise UserError(
                    f"the gradient of {self.names[place]} is sparse; allowed: dense gradients; "
                    "next: build the embedding with sparse=False"
                )
            views.append(view)
            gradients.append(gradient.detach() if gradient.requires_grad else gradient)
            parameter.grad = view  # frees what autograd made, for the layers that still come
        if views:
            foreach_copy(views, gradients)

    def fill(self) -> None:
        """Take what is not taken yet, and say where there are gradients."""
        if self.missing:  # some were never said to be final, small or large
            self.take(range(len(self.parameters)))
        elif self._small:
            self.take(self._small)
        if self._has_all:
            self.flags.fill_(1)
        else:
            has = [float(parameter.grad is not None) for parameter in self.parameters]
            self.flags.copy_(torch.tensor(has))

    def hand_out(self) -> None:
        """Make each `grad` a view into the sums; None where no rank had one."""
        used = None if self._has_all else self.flags.tolist()
        for place, parameter in enumerate(self.parameters):
            fused = self.views[place] if used is None or used[place] else None
            if parameter.grad is not fused:
                parameter.grad = fused
        self.reset()

    def reset(self) -> None:
        self.work, self.missing = None, len(self.parameters)
        self._begun, self._has_all = False, True


def _count_holders(views: list[Tensor]) -> int:
    """The most that one of them is referred to."""
    return max(map(sys.getrefcount, views))


class GradientFusion:
    """Sums the gradients of some parameters over the peers of a replica axis.

    Each peer's gradients must carry its weight already: the loss that is differentiated is the
    peer's sum of losses over the count of the whole batch. The weighted mean is then a plain sum.

    Phases of one step, for a payload of B bytes on n peers:
      1. `final(i)`: parameter i is final and is copied into its bucket's flat tensor (B read and
         written once), a small one together with the others of its bucket; the sum of a full
         bucket is started, always in the order of the buckets.
         Overlaps with backward. 2 (n-1)/n B bytes sent for each peer with native.
      2. `finish()`: starts what is left (unused parameters count as zero), waits, and makes each
         `grad` a view into the sums. Nothing is copied back. A `grad` that a script keeps beyond
         the step keeps its values: its bucket then moves to other memory.

    The first bucket also carries a few numbers of each rank, which saves a transfer of their own:
    on a busy host a small one costs about 0.3 ms of processor time.

    Parameters must be listed alike on every peer. Peers that use different parameters in a step
    neither hang nor differ: every bucket travels in every step.
    """

    def __init__(
        self,
        names: Sequence[str],
        parameters: Sequence[Parameter],
        fuser: Fuser,
        *,
        bucket_bytes: int = BUCKET_BYTES,
        first_bucket_bytes: int = FIRST_BUCKET_BYTES,
    ) -> None:
        self.names, self.parameters = list(names), list(parameters)
        self.fuser, self.link = fuser, fuser.link
        self.buckets: list[Bucket] = []
        self._home: dict[int, tuple[Bucket, int]] = {}
        self.listening = False
        self._started = 0
        self._own: Sequence[float] | None = None
        self._is_final = [False] * len(self.parameters)
        if self.link.size > 1:
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
        for indices in kinds.values():
            sizes = [self.parameters[index].nbytes for index in indices]
            for positions in split_buckets(sizes, bucket_bytes, first_bucket_bytes):
                members = [indices[position] for position in positions]
                names = [self.names[index] for index in members]
                parameters = [self.parameters[index] for index in members]
                words = 0 if self.buckets else self._count_words(parameters[0])
                bucket = Bucket(len(self.buckets), names, parameters, words)
                self.buckets.append(bucket)
                for place, index in enumerate(members):
                    self._home[index] = (bucket, place)

    def _count_words(self, first: Parameter) -> int:
        """Two for each number of each rank, where the first bucket can hold them exactly."""
        exact = first.dtype in (torch.float32, torch.float64) and first.device.type == "cpu"
        return 2 * NUMBERS * self.link.size if exact else 0

    @property
    def carries(self) -> bool:
        """Whether `carry` may be used."""
        return bool(self.buckets) and self.buckets[0].words.numel() > 0

    def carry(self, numbers: Sequence[float]) -> None:
        """Tell the peers these `NUMBERS` numbers with the first bucket, before backward.

        Each travels as two words, its value rounded to 24 bits and what that leaves: 48 bits in
        all. Every rank has places of its own and adds zeros elsewhere, so nothing is rounded.
        """
        self._own = numbers

    def carried(self) -> list[list[float]]:
        """What each rank told, in order. Waits for the first bucket."""
        if self._started == 0:
            self._start_rest()
        bucket = self.buckets[0]
        assert bucket.work is not None
        bucket.work.wait()
        words = bucket.words.tolist()
        numbers = [high + low for high, low in zip(words[::2], words[1::2], strict=True)]
        return [numbers[i : i + NUMBERS] for i in range(0, len(numbers), NUMBERS)]

    def _write_words(self, words: Tensor) -> None:
        own = []
        for number in self._own or ():
            high = c_float(number).value if words.dtype == torch.float32 else number
            own += [high, number - high if math.isfinite(high) else 0.0]
        begin = 2 * NUMBERS * self.link.rank
        words.zero_()
        if own:
            words[begin : begin + len(own)] = torch.tensor(own, dtype=words.dtype)
        self._own = None

    @property
    def payload_bytes(self) -> int:
        return sum(bucket.flat.nbytes for bucket in self.buckets)

    def final(self, index: int) -> None:
        """The gradient of parameter `index` will not change any more in this step.

        Ignored while not `listening`: another learner's backward pass may reach the parameter too.
        """
        if not (self.listening and self.buckets):
            return
        if self._is_final[index]:
            raise UserError(
                f"the gradient of {self.names[index]} became final twice in one step; allowed: one "
                "backward pass for each step; next: pass every loss of the step to one backward, "
                "or use torch.utils.checkpoint with use_reentrant=False"
            )
        self._is_final[index] = True
        bucket, place = self._home[index]
        if bucket.large[place]:
            bucket.take((place,))
        bucket.missing -= 1
        while self._started < len(self.buckets) and not self.buckets[self._started].missing:
            self._start()

    def _start(self, fill: bool = True) -> None:
        """Send the next bucket on its way."""
        bucket = self.buckets[self._started]
        if fill:
            bucket.fill()
        if self._started == 0 and self.carries:
            self._write_words(bucket.words)
        bucket.work = self.fuser.start(bucket.flat, bucket.operation)
        self._started += 1

    def _start_rest(self, fill: bool = True) -> None:
        while self._started < len(self.buckets):
            self._start(fill)

    def finish(self) -> None:
        """Wait for all sums. After it each `grad` holds the sum over the peers."""
        self._start_rest()
        for bucket in self.buckets:
            assert bucket.work is not None
            bucket.work.wait()
            bucket.hand_out()
        self._rest()

    def forget(self) -> None:
        """Drop a step that was begun and will not be finished, and its gradients.

        All peers do so together: what is under way cannot be called back, so the rest is sent
        after it, and the next step of all begins with the same bucket.
        """
        self._start_rest(fill=False)
        for bucket in self.buckets:
            assert bucket.work is not None
            bucket.work.wait()
            bucket.reset()
        self._rest()
        for parameter in self.parameters:
            parameter.grad = None

    def _rest(self) -> None:
        self._started = 0
        self._is_final = [False] * len(self.parameters)
