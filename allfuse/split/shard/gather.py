"""Brings the rows of all ranks together for as long as a block of the model needs them.

For B bytes of a block's parameters on n ranks each rank sends (n-1)/n B when the block runs, as
much again when its gradient is computed, and as much to sum the gradients, of which each gets its
own rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from itertools import accumulate
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import Parameter

from allfuse.base.torch_private import is_fake
from allfuse.link import Link, Work
from allfuse.split.shard.memory import Place, Spare
from allfuse.split.shard.rows import Rows, own_rows

LARGE_BYTES = 1 << 18
"""Of the rows of one rank: from here on a transfer of its own costs less than to copy them once
more, and less memory."""

Owner = tuple[nn.Module, str]
"""A module, and the name that a parameter has in it."""


class Block:
    """Parameters that are brought together at once, of which this rank keeps rows.

    Args:
        name: of the module that needs them.
        owners: of each parameter all modules that have it.
        shortens: whether autocast would make a shorter type of them anyway; then that travels.
        again: whether they are gathered again for the backward pass; else autograd keeps them
            until then, as it does by itself.
        home: where rows and their gradients are; None is where the parameters were. They are
            brought together and used where the parameters were.
        spare: shared by the blocks of a model.

    The parameters, all of one type, stay the same objects; from now on they hold this rank's rows.
    """

    def __init__(
        self,
        name: str,
        parameters: Sequence[Parameter],
        owners: Sequence[list[Owner]],
        link: Link,
        shortens: bool = False,
        again: bool = True,
        home: torch.device | None = None,
        spare: Spare | None = None,
    ) -> None:
        self.name, self.link, self.shortens, self.again = name or "the model", link, shortens, again
        order = sorted(range(len(parameters)), key=lambda at: _is_large(parameters[at], link.size))
        self.parameters, self.owners = (
            [parameters[at] for at in order],
            [owners[at] for at in order],
        )
        shapes = [tuple(parameter.shape) for parameter in self.parameters]
        count = sum(not _is_large(parameter, link.size) for parameter in parameters)
        self.rows, self.small = Rows(shapes, link.size), Rows(shapes[:count], link.size)
        self.large = range(count, len(shapes))
        dtype, self.device = parameters[0].dtype, parameters[0].device
        self.home = home or self.device
        pinned = self.home.type == "cpu" and self.device.type == "cuda"
        length = self.rows.length
        self.part = torch.zeros(length, dtype=dtype, device=self.home, pin_memory=pinned)
        own = self.rows.own(self.part, link.rank)
        self._memory = Place(self.part, spare or Spare(), pinned)
        with torch.no_grad():
            for parameter, view in zip(self.parameters, own, strict=True):
                view.copy_(own_rows(parameter.detach(), link.size, link.rank))
                parameter.data = view

    @property
    def numbers(self) -> int:
        """How many there are in all."""
        return sum(prod(row.shape) for row in self.rows.rows)

    @property
    def dtype(self) -> torch.dtype:
        """The type in which the parameters are needed now."""
        kind = self.device.type
        if self.shortens and torch.is_autocast_enabled(kind):
            return torch.get_autocast_dtype(kind)
        return self.part.dtype

    @torch.no_grad()
    def gather(self, dtype: torch.dtype) -> list[Tensor]:
        """The whole parameters, in one new piece of memory. Large ones travel to their places, the
        others together."""
        whole = self._empty(dtype)
        if is_fake(whole[0]):  # a pass that is only followed
            return whole
        works = []
        for at in self.large:
            row = self.rows.rows[at]
            parts = whole[at].view(self.link.size, row.length)
            works += self._spread(parts, self.part[row.begin : row.stop])
        if self.small.rows:
            parts = self._new(self.link.size, self.small.length, dtype=dtype)
            works += self._spread(parts, self.part[: self.small.length])
        for work in works:
            work.wait()
        if self.small.rows:
            self.small.join(parts, whole[: len(self.small.rows)])
        return whole

    def _spread(self, parts: Tensor, own: Tensor) -> list[Work]:
        """Bring the parts of all ranks here, one row for each, and this rank's part to them."""
        parts[self.link.rank].copy_(own)
        roots = range(self.link.size)
        return [self.link.broadcast(parts[root], f"gather {self.name}", root) for root in roots]

    def reduce(self, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        """This rank's rows of the sum of what all ranks have found, at home; None of what nobody
        used.

        Phases:
          1. the gradients of small parameters together, and who has found which;
          2. those of each large one that somebody used, straight from where autograd left it.
        """
        memory, size, length = self._memory.take(), self.link.size, self.small.length
        sums = memory if self.home == self.device else self._new(self.rows.length)
        flags = torch.tensor([float(each is not None) for each in gradients])
        parts = self._new(size, length + len(gradients))
        parts[:, length:] = flags.to(parts)
        self.small.cut(gradients[: len(self.small.rows)], parts[:, :length])
        own = torch.empty_like(parts[0])
        self._sum(own, parts).wait()
        used = own[length:].tolist()
        sums[:length].copy_(own[:length])
        works = []
        for at in self.large:
            row, gradient = self.rows.rows[at], gradients[at]
            if used[at]:
                whole = self._new(*row.shape).zero_() if gradient is None else gradient.to(parts)
                parts_here = whole.contiguous().view(size, row.length)
                works.append(self._sum(sums[row.begin : row.stop], parts_here))
        for work in works:
            work.wait()
        if sums is not memory:
            memory.copy_(sums)
        mine = self.rows.own(memory, self.link.rank)
        return [each if flag else None for each, flag in zip(mine, used, strict=True)]

    def _sum(self, target: Tensor, parts: Tensor) -> Work:
        return self.link.reduce_scatter(target, parts, f"sum the gradients of {self.name}")

    def _new(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Memory where the parameters are used."""
        return torch.empty(shape, dtype=dtype or self.part.dtype, device=self.device)

    def _empty(self, dtype: torch.dtype) -> list[Tensor]:
        """Places for the whole parameters, in one new piece of memory."""
        rows = self.rows.rows
        numbers = [prod(row.shape) for row in rows]
        memory = self._new(sum(numbers), dtype=dtype)
        if is_fake(memory):
            return [self._new(*row.shape, dtype=dtype) for row in rows]
        whole: list[Tensor] = []
        for row, begin in zip(rows, [0, *accumulate(numbers)], strict=False):
            # not views: each is an output of its own to autograd
            own: Any = self._new(0, dtype=dtype)
            whole.append(own.set_(memory.untyped_storage(), begin, row.shape))
        return whole


def _is_large(parameter: Tensor, n: int) -> bool:
    """Whether all ranks have as many rows, and enough for a transfer of its own."""
    if not parameter.dim() or parameter.shape[0] % n:
        return False
    return parameter.nbytes >= n * LARGE_BYTES


class Visit:
    """One pass through a block: what is gathered for it, and again for its gradient."""

    def __init__(self, block: Block) -> None:
        self.block, self.dtype = block, block.dtype
        self._again: list[Tensor] | None = None

    def gather(self) -> list[Tensor]:
        return self.block.gather(self.dtype)

    def again(self) -> Tensor:
        """One of the whole parameters, in whose memory the others are, too."""
        if self._again is None:
            self._again = self.gather()
        return self._again[0]

    def reduce(self, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The gradients were found, so that the parameters are not needed any more."""
        self._again = None
        return self.block.reduce(gradients)


class _Gather(torch.autograd.Function):
    """Forward the whole parameters; backward this rank's rows of the sum of gradients."""

    @staticmethod
    def forward(context: Any, visit: Visit, *own: Tensor) -> tuple[Tensor, ...]:
        context.visit = visit
        context.set_materialize_grads(False)
        whole = visit.gather()
        learned = context.needs_input_grad[1:]
        frozen = [each for each, learns in zip(whole, learned, strict=True) if not learns]
        context.mark_non_differentiable(*frozen)
        return tuple(whole)

    @staticmethod
    @once_differentiable
    def backward(context: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        return None, *context.visit.reduce(gradients)


@contextmanager
def gathered(blocks: Sequence[Block]) -> Iterator[None]:
    """While in force, the modules have the whole parameters of these blocks of one module.

    Raises:
        PeerLost: from here, and from the backward pass.
    """
    memories: dict[int, Visit] = {}
    try:
        for block in blocks:
            visit = Visit(block)
            whole = _Gather.apply(visit, *block.parameters)  # type: ignore[no-untyped-call]
            if block.again and torch.is_grad_enabled():
                memories[whole[0].untyped_storage().data_ptr()] = visit
            for parameter, tensor, owners in zip(
                block.parameters, whole, block.owners, strict=True
            ):
                tensor.gathered_from = parameter
                _give(tensor, owners)
        del whole, tensor  # so that the modules alone hold them
        with _leaving_out(memories) if memories else nullcontext():
            yield
    finally:
        for block in blocks:
            for parameter, owners in zip(block.parameters, block.owners, strict=True):
                _give(parameter, owners)


def _give(tensor: Tensor, owners: list[Owner]) -> None:
    for module, name in owners:
        module._parameters[name] = tensor  # type: ignore[assignment]
        if isinstance(module, nn.RNNBase):  # which has a list of them besides
            names = module._flat_weights_names
            module._flat_weights = [getattr(module, each, None) for each in names]


def _leaving_out(memories: Mapping[int, Visit]) -> Any:
    """While in force, autograd keeps of whole parameters only where they were in their memory."""

    def pack(tensor: Tensor) -> Any:
        visit = None
        if tensor.layout == torch.strided:
            visit = memories.get(tensor.untyped_storage().data_ptr())
        if visit is None:
            return tensor.detach()
        return visit, tensor.shape, tensor.stride(), tensor.storage_offset()

    def unpack(kept: Any) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        visit, *place = kept
        found: Tensor = visit.again().as_strided(*place)
        return found

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)
