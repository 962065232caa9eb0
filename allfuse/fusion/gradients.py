"""Fusion of gradients: every step, bucket by bucket, while the backward pass still runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from ctypes import c_float
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from allfuse.base.errors import UserError
from allfuse.base.tensors import split_buckets
from allfuse.codec.memory import Memory, capture_all, restore_all
from allfuse.fusion.bucket import Bucket
from allfuse.fusion.fuser import Fuser
from allfuse.rule import Mean, SumRule

BUCKET_BYTES = 25_000_000
FIRST_BUCKET_BYTES = 1_000_000  # small, so that the first transfer starts early
NUMBERS = 4  # that a rank may tell its peers with the first bucket


class GradientFusion:
    """Fuses the gradients of some parameters over the peers of a replica axis.

    Each peer's gradients must carry its weight already: the loss that is differentiated is the
    peer's sum of losses over the count of the whole batch. The weighted mean is then a plain sum.
    Other rules make of it the mean over the peer's own count first (see `weigh`).

    A codec that loses something has a memory for each bucket, which is the state of training.

    Phases of one step, for a payload of B bytes on n peers:
      1. `final(i)`: parameter i is final and is copied into its bucket's flat tensor (B read and
         written once), a small one together with the others of its bucket; the sum of a full
         bucket is started, always in the order of the buckets.
         Overlaps with backward. 2 (n-1)/n B bytes sent for each peer with native.
      2. `finish()`: starts what is left (unused parameters count as zero), waits, and makes each
         `grad` a view into what comes out. Nothing is copied back. A `grad` that a script keeps
         beyond the step keeps its values: its bucket then moves to other memory.

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
        self._scale, self._weights = 1.0, [1.0] * self.link.size
        self._shrink = 1.0
        self.rounds = 0
        self._owed: dict[str, Tensor] = {}
        if self.link.size > 1 or not self.is_mean:
            self._build(bucket_bytes, first_bucket_bytes)

    @property
    def is_mean(self) -> bool:
        """Whether the gradient of the whole batch comes out, to rounding or with feedback."""
        return isinstance(self.fuser.fusion.rule, Mean)

    @property
    def is_plain(self) -> bool:
        """Whether gradients may come in any scale: nothing is lost or kept from step to step."""
        return self.is_mean and self.fuser.fusion.codec.lossless

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
                first = parameters[0]
                shapes = [tuple(parameter.shape) for parameter in parameters]
                memory = self.fuser.memory(shapes, first.dtype, first.device)
                bucket = Bucket(len(self.buckets), names, parameters, words, memory)
                self.buckets.append(bucket)
                for place, index in enumerate(members):
                    self._home[index] = (bucket, place)

    def _count_words(self, first: Parameter) -> int:
        """Two for each number of each rank, where the first bucket can hold them exactly."""
        exact = first.dtype in (torch.float32, torch.float64) and first.device.type == "cpu"
        return 2 * NUMBERS * self.link.size if exact else 0

    @property
    def carries(self) -> bool:
        """Whether `carry` may be used: the first bucket has not left yet."""
        return bool(self.buckets) and self.buckets[0].words.numel() > 0 and not self._started

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
        if self._waits_for_all:
            return
        while self._started < len(self.buckets) and not self.buckets[self._started].missing:
            self._start()

    def _start(self, fill: bool = True) -> None:
        """Send the next bucket on its way."""
        bucket = self.buckets[self._started]
        if fill:
            bucket.fill()
            self._prepare(bucket)
            self._add_owed(bucket)
        if self._started == 0 and self.carries:
            self._write_words(bucket.words)
        bucket.work = self.fuser.start(
            bucket.flat,
            bucket.operation,
            round=self.rounds,
            weights=self._weights,
            memory=bucket.memory,
            tail=bucket.tail,
        )
        self._started += 1

    def weigh(self, reference: float, count: float, weights: Sequence[float]) -> None:
        """Before the last backward pass of a step, for rules other than the mean.

        Args:
            reference: what the gradients of this peer were divided by.
            count: what its own mean is over; 0 where it has no samples.
            weights: of all peers: their samples.
        """
        self._scale = reference / count if count else 0.0
        self._weights = list(weights)

    @property
    def _waits_for_all(self) -> bool:
        rule = self.fuser.fusion.rule
        return isinstance(rule, SumRule) and rule.needs_norm

    def _prepare(self, bucket: Bucket) -> None:
        """Make of a peer's part of the mean what its rule fuses."""
        rule = self.fuser.fusion.rule
        if self.is_mean:
            return
        bucket.values.mul_(self._scale * self._shrink)
        if isinstance(rule, SumRule):
            rule.prepare(bucket.values, self._weights[self.link.rank])

    def _measure(self) -> None:
        """How much a rule shortens this peer's whole gradient."""
        rule = self.fuser.fusion.rule
        assert isinstance(rule, SumRule)
        for bucket in self.buckets:
            bucket.fill()
        norms = torch.stack([bucket.values.norm().double() for bucket in self.buckets])
        self._shrink = rule.shrink(float(norms.norm()) * self._scale)

    def _start_rest(self, fill: bool = True) -> None:
        if fill and self._started == 0 and self._waits_for_all and self.buckets:
            self._measure()
        while self._started < len(self.buckets):
            self._start(fill)

    def finish(self) -> None:
        """Wait for all. After it each `grad` holds what the rule makes of those of the peers."""
        self._start_rest()
        for bucket in self.buckets:
            assert bucket.work is not None
            bucket.work.wait()
            self._conclude(bucket)
            bucket.hand_out()
        if not self.buckets:
            self._add_owed_alone()
        self._owed.clear()
        self._rest()

    def _add_owed(self, bucket: Bucket) -> None:
        """What a codec of an earlier leg of the run had not sent goes with the first step."""
        for place, name in enumerate(bucket.names):
            if name in self._owed:
                bucket.views[place].add_(self._owed[name].view(bucket.views[place].shape))
                bucket.flags[place] = 1.0

    def _add_owed_alone(self) -> None:
        for name, parameter in zip(self.names, self.parameters, strict=True):
            if name in self._owed:
                owed = self._owed[name].to(parameter).view(parameter.shape)
                parameter.grad = owed if parameter.grad is None else parameter.grad.add_(owed)

    def _conclude(self, bucket: Bucket) -> None:
        rule = self.fuser.fusion.rule
        if isinstance(rule, SumRule) and not self.is_mean:
            rule.finish(bucket.values, sum(self._weights))

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
            if bucket.memory is not None:
                bucket.memory.heal()
        self._rest()
        for parameter in self.parameters:
            parameter.grad = None

    @property
    def _memories(self) -> list[tuple[list[str], Memory]]:
        return [(each.names, each.memory) for each in self.buckets if each.memory is not None]

    def capture(self) -> dict[str, Any] | None:
        """What codecs keep, by the names of parameters: live tensors. None where nothing is."""
        if not self._memories and not self._owed:
            return None
        kept: dict[str, Any] = capture_all(self._memories)
        kept["residuals"] |= self._owed
        return {"rounds": self.rounds, "codec": str(self.fuser.fusion.codec), **kept}

    def restore(self, state: Mapping[str, Any] | None) -> None:
        """Take back what fits: parameters that are new have no past.

        What a codec had not sent is added to what is sent next, also where there is none any more.
        """
        self._owed.clear()
        if state is None:
            return
        self.rounds = state["rounds"]
        restore_all(self._memories, read_state(state, self.fuser))
        kept = {name for names, _ in self._memories for name in names}
        sizes = {n: p.numel() for n, p in zip(self.names, self.parameters, strict=True)}
        for name, residual in state["residuals"].items():
            if name not in kept and sizes.get(name) == residual.numel() and residual.any():
                self._owed[name] = residual.clone()

    def _rest(self) -> None:
        self._started = 0
        self.rounds += 1
        self._is_final = [False] * len(self.parameters)


def read_state(state: Mapping[str, Any], fuser: Fuser) -> Mapping[str, Any]:
    """What a codec can go on from: what was not sent by any, and what it remembers itself. The
    memory of another means nothing to it (of lowrank: that of another rank)."""
    same = state.get("codec") == str(fuser.fusion.codec)
    return state if same else {**state, "kept": {}}
