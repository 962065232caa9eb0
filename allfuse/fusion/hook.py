"""Fusions for loops that belong to others: a communication hook for DistributedDataParallel."""

from __future__ import annotations

import inspect
import math
import weakref
from dataclasses import dataclass
from typing import Any, TypedDict

import torch
import torch.distributed as dist
from torch import Tensor

from allfuse.base.errors import UserError
from allfuse.codec.memory import Memory
from allfuse.fusion.axis import read_axis
from allfuse.fusion.base import Fusion
from allfuse.fusion.fuser import Fuser
from allfuse.fusion.residuals import Remainder, Residuals
from allfuse.fusion.roster import find_layout
from allfuse.link import Link, Work
from allfuse.link.borrowed import BorrowedLink
from allfuse.link.lone import LoneLink
from allfuse.plan import Data
from allfuse.plan.plan import PlanLike
from allfuse.rule import SumRule


class State(TypedDict):
    """What a rank must keep to go on: rounds done, and what was not sent of each parameter."""

    round: int
    codec: str
    parameters: list[Remainder]


@dataclass
class Turn:
    """One bucket of the backward pass that runs."""

    buffer: Tensor
    operation: str
    memory: Memory | None
    future: torch.futures.Future[Tensor]
    work: Work | None = None


class CommHook:
    """What DistributedDataParallel calls for each bucket. See `comm_hook`.

    Phases of one backward pass, for buckets in the order in which they are full:
      1. the bucket is prepared with the weight 1/n and set off; the backward pass goes on beside;
      2. at the last bucket all are waited for, and DistributedDataParallel takes the results.
    A rule that needs the norm of the whole gradient sets all buckets off at the last one.
    """

    def __init__(self, fusion: Fusion, group: Any, timeout_s: float) -> None:
        self.fusion, self.group, self.timeout_s = fusion, group, timeout_s
        self.size = dist.get_world_size(group)
        self.round = 0
        self._fuser: Fuser | None = None
        self._residuals = Residuals(self._make_memory)
        self._turns: list[Turn] = []
        # DistributedDataParallel reads these of a hook, and compares annotations themselves where
        # there are any, not their text.
        self.__name__ = self.__qualname__ = "allfuse.comm_hook"
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        names = ("state", "bucket")
        self.__signature__ = inspect.Signature([inspect.Parameter(name, kind) for name in names])

    def __call__(self, state: object, bucket: Any) -> torch.futures.Future[Tensor]:
        """Fuse a bucket (dist.GradBucket) in place.

        Raises:
            PeerLost: at the last bucket, in which the others are waited for.
        """
        buffer: Tensor = bucket.buffer()
        if buffer.layout != torch.strided:
            raise UserError(
                "comm_hook: a gradient is sparse; allowed: dense gradients; next: build the "
                "embedding with sparse=False"
            )
        fuser = self._fuser = self._fuser or self._meet(buffer.device)
        if bucket.index() == 0:
            self._turns = []  # of a backward pass that ended half-way
            fuser.link.step = self.round
        rule = self.fusion.rule
        waits_for_norm = isinstance(rule, SumRule) and rule.needs_norm
        if buffer.is_cuda and not fuser.needs_own_link and not waits_for_norm:
            return self._queue(buffer)
        turn = self._take(bucket, buffer)
        self._turns.append(turn)
        if not waits_for_norm:
            self._start(turn)
        if bucket.is_last():
            self._finish(waits_for_norm)
        return turn.future

    def _meet(self, device: torch.device) -> Fuser:
        """Open the way to the others: in the first bucket, where all of them are."""
        if self.size == 1:
            return Fuser(self.fusion, LoneLink(dist.get_rank(self.group)))
        if not Fuser(self.fusion, LoneLink()).needs_own_link:
            link: Link = BorrowedLink(self.group, timeout_s=self.timeout_s)
            return Fuser(self.fusion, link)
        link = BorrowedLink.beside(self.group, timeout_s=self.timeout_s)
        said = f"{self.fusion.rule}, {self.fusion.topology}, {self.fusion.codec}"
        fuser = Fuser(self.fusion, link, find_layout(link, device, said))
        weakref.finalize(self, fuser.close).atexit = False
        return fuser

    def _make_memory(
        self, shapes: list[tuple[int, ...]], dtype: torch.dtype, device: torch.device
    ) -> Memory:
        assert self._fuser is not None
        memory = self._fuser.memory(shapes, dtype, device)
        assert memory is not None
        return memory

    def _take(self, bucket: Any, buffer: Tensor) -> Turn:
        lossy = self.size > 1 and not self.fusion.codec.lossless
        parameters = bucket.parameters() if lossy else []
        memory = self._residuals.of(bucket.index(), parameters, buffer) if lossy else None
        devices: Any = [buffer.device] if buffer.is_cuda else None
        future: torch.futures.Future[Tensor] = torch.futures.Future(devices=devices)
        return Turn(buffer, f"fuse gradients, bucket {bucket.index()}", memory, future)

    def _start(self, turn: Turn) -> None:
        assert self._fuser is not None
        if isinstance(rule := self.fusion.rule, SumRule):
            rule.prepare(turn.buffer, 1.0 / self.size)
        _settle(turn.buffer)
        turn.work = self._fuser.start(
            turn.buffer, turn.operation, round=self.round, memory=turn.memory
        )

    def _finish(self, waits_for_norm: bool) -> None:
        """Wait for all buckets. Here, and not in a thread: so an error keeps its type."""
        turns, self._turns, rule = self._turns, [], self.fusion.rule
        if waits_for_norm and isinstance(rule, SumRule):
            squares = [turn.buffer.double().square().sum() for turn in turns]
            factor = rule.shrink(float(torch.stack(squares).sum().sqrt()))
            for turn in turns:
                turn.buffer.mul_(factor)
                self._start(turn)
        for turn in turns:
            assert turn.work is not None
            turn.work.wait()
            _settle(turn.buffer)
            if isinstance(rule, SumRule):
                rule.finish(turn.buffer, 1.0)
            if turn.memory is not None:
                _heal(turn.buffer, turn.memory)
            turn.future.set_result(turn.buffer)
        self.round += 1

    def _queue(self, buffer: Tensor) -> torch.futures.Future[Tensor]:
        """On a GPU the group's own all-reduce is queued, as DistributedDataParallel does by itself:
        nobody waits, and deadlines are the group's own."""
        rule = self.fusion.rule
        assert isinstance(rule, SumRule)
        rule.prepare(buffer, 1.0 / self.size)
        work: Any = dist.all_reduce(buffer, group=self.group, async_op=True)
        future: torch.futures.Future[Any] = work.get_future()
        return future.then(lambda done: rule.finish(done.value()[0], 1.0))

    def state_dict(self) -> State:
        """What lossy codecs have not sent yet, of this rank; each rank saves its own.

        Plain numbers, lists and tensors. Empty before the first step, and without a lossy codec.
        """
        parameters = self._residuals.state_dict()
        return State(round=self.round, codec=str(self.fusion.codec), parameters=parameters)

    def load_state_dict(self, state: State) -> None:
        """Go on from what `state_dict` gave to the same rank, for the same model. What another
        codec remembered for itself is left out.

        Raises:
            UserError: the parameters are others; known at the first step only, if none was yet.
        """
        parameters, self.round = state["parameters"], state["round"]
        if state["codec"] != str(self.fusion.codec):
            parameters = [Remainder(residual=each["residual"], kept=None) for each in parameters]
        self._residuals.load_state_dict(parameters)

    def close(self) -> None:
        """End the hook's own thread. Waits for nobody; groups end when their owner ends all."""
        if self._fuser is not None:
            self._fuser.close()


def _heal(buffer: Tensor, memory: Memory) -> None:
    """A gradient that is not finite is the owner's to skip, and must not come again later."""
    if not math.isfinite(float(buffer.float().sum() + memory.residual.sum())):
        memory.heal()


def _settle(buffer: Tensor) -> None:
    """Threads of fusions work on the default stream: let what a loop queued elsewhere end first."""
    if buffer.is_cuda:
        stream = torch.cuda.current_stream(buffer.device)
        if stream != torch.cuda.default_stream(buffer.device):
            torch.cuda.synchronize(buffer.device)


def comm_hook(
    plan: PlanLike, group: dist.ProcessGroup | None = None, *, timeout_s: float = 300.0
) -> CommHook:
    """A hook that fuses DistributedDataParallel's buckets as a `data(n)` plan says.

        model = DistributedDataParallel(net)
        model.register_comm_hook(None, af.comm_hook("data(4, topology=ring, codec=topk(0.01))"))

    DistributedDataParallel gives every rank the same weight, so a mean is its plain mean; a session
    weighs ranks by their samples. A plan without topology and codec takes the group's own
    all-reduce. All others make a group of their own over the same ranks at the first step, so that
    their transfers do not mix with those of the group's owner.

    Args:
        plan: one data axis, of as many workers as the group has.
        group: the group that DistributedDataParallel was given; None is the default one.
        timeout_s: the deadline of every wait for a peer.

    Raises:
        UserError: there is no process group yet.
        PlanError: the plan has other axes, or another number of workers.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise UserError(
            "comm_hook: there is no process group; next: call torch.distributed.init_process_group "
            "first, or use af.session, which needs none"
        )
    size = dist.get_world_size(group)
    _, fusion = read_axis(
        "comm_hook",
        plan,
        Data,
        size,
        why="DistributedDataParallel fuses gradients of whole models only",
        there=f"the process group has {size} ranks",
    )
    return CommHook(fusion, group or dist.group.WORLD, timeout_s)
