"""Gradients of each replica where BatchNorm ties them: over the rows of all, in one process."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

DEADLINE_S = 300.0  # for the slowest replica to come to the same BatchNorm


def has_batch_norm(model: nn.Module) -> bool:
    return any(isinstance(module, _BatchNorm) for module in model.modules())


class Together:
    """A copy of the model for each replica, so that each has gradients of its own.

    Their forward passes run in threads and meet in each BatchNorm, where a plain one works on the
    rows of all. The backward pass of the sum of their losses is one: what statistics pass on from
    one replica to another is in it.
    """

    def __init__(self, model: nn.Module, replicas: int) -> None:
        self.model = model
        self.copies = [copy.deepcopy(model) for _ in range(replicas)]
        self._barrier = threading.Barrier(replicas)
        self._rows: list[Tensor] = [torch.empty(0)] * replicas
        for replica, each in enumerate(self.copies):
            for module in each.modules():
                if isinstance(module, _BatchNorm):
                    setattr(module, "forward", self._meeting(module, replica))  # noqa: B010

    def _meeting(self, module: _BatchNorm, replica: int) -> Callable[[Tensor], Tensor]:
        def forward(own: Tensor) -> Tensor:
            plain: Callable[[_BatchNorm, Tensor], Tensor] = type(module).forward
            if not module.training:
                return plain(module, own)
            self._rows[replica] = own
            self._barrier.wait(DEADLINE_S)
            rows = list(self._rows)
            self._barrier.wait(DEADLINE_S)  # before the next one is written
            normalized = plain(module, torch.cat(rows))
            parts: tuple[Tensor, ...] = normalized.split([len(each) for each in rows])
            return parts[replica]

        return forward

    def run(
        self, work: Callable[[nn.Module, Any, int], Any], pieces: Sequence[tuple[Any, int]]
    ) -> list[Any]:
        """`work(copy, *piece)` of all replicas at the same time; what they return.

        Raises:
            What the first of them raised that did not only wait for another.
        """
        outcomes: list[Any] = [None] * len(self.copies)

        def one(replica: int) -> None:
            try:
                outcomes[replica] = work(self.copies[replica], *pieces[replica])
            except BaseException as error:
                outcomes[replica] = error
                self._barrier.abort()

        threads = [
            threading.Thread(target=one, args=(n,), daemon=True) for n in range(len(self.copies))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        errors = [each for each in outcomes if isinstance(each, BaseException)]
        for error in sorted(errors, key=lambda e: isinstance(e, threading.BrokenBarrierError)):
            raise error
        return outcomes

    def gradients(self, held: list[Tensor]) -> list[list[Tensor | None]]:
        """Of each replica, those of parameters `held` of the model."""
        names = {id(p): name for name, p in self.model.named_parameters()}
        own = [dict(each.named_parameters()) for each in self.copies]
        return [[named[names[id(p)]].grad for p in held] for named in own]

    @torch.no_grad()
    def keep_buffers(self) -> None:
        """Running statistics, which are those of all rows in every copy."""
        first = dict(self.copies[0].named_buffers())
        for name, buffer in self.model.named_buffers():
            buffer.copy_(first[name])
