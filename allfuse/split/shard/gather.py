"""Brings the rows of all ranks together for as long as a block of the model needs them.

For B bytes of a block's parameters on n ranks each rank sends (n-1)/n B when the block runs, as
much again when its gradient is computed, and 2 (n-1)/n B to sum the gradients.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import Parameter

from allfuse.link import Link
from allfuse.split.shard.rows import Rows, own_rows

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
    ) -> None:
        self.name, self.link, self.owners = name or "the model", link, list(owners)
        self.parameters, self.shortens, self.again = list(parameters), shortens, again
        self.rows = Rows([tuple(p.shape) for p in parameters], link.size)
        first = parameters[0]
        self.part = torch.zeros(self.rows.length, dtype=first.dtype, device=first.device)
        own = self.rows.own(self.part, link.rank)
        with torch.no_grad():
            for parameter, view in zip(parameters, own, strict=True):
                view.copy_(own_rows(parameter.detach(), link.size, link.rank))
                parameter.data = view

    @property
    def numbers(self) -> int:
        """How many there are in all."""
        return sum(prod(row.shape) for row in self.rows.rows)

    @property
    def dtype(self) -> torch.dtype:
        """The type in which the parameters are needed now."""
        kind = self.part.device.type
        if self.shortens and torch.is_autocast_enabled(kind):
            return torch.get_autocast_dtype(kind)
        return self.part.dtype

    @torch.no_grad()
    def gather(self, dtype: torch.dtype) -> list[Tensor]:
        """The whole parameters, in one new piece of memory."""
        link, operation = self.link, f"gather {self.name}"
        parts = self.part.new_empty(link.size, self.rows.length, dtype=dtype)
        parts[link.rank].copy_(self.part)
        works = [link.broadcast(parts[root], operation, root) for root in range(link.size)]
        shapes = [row.shape for row in self.rows.rows]
        numbers = [prod(shape) for shape in shapes]
        memory = self.part.new_empty(sum(numbers), dtype=dtype).untyped_storage()
        whole, begin = [], 0
        for shape, size in zip(shapes, numbers, strict=True):
            # not views: each is an output of its own to autograd
            own: Any = self.part.new_empty(0, dtype=dtype)
            whole.append(own.set_(memory, begin, shape))
            begin += size
        for work in works:
            work.wait()
        self.rows.join(parts, whole)
        return whole

    def reduce(self, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        """This rank's rows of the sum of what all ranks have found; None of what nobody used."""
        link, count, length = self.link, len(self.rows.rows), self.rows.length
        numbers = self.part.new_empty(link.size * length + count)
        flags = numbers[link.size * length :]
        flags.copy_(torch.tensor([float(each is not None) for each in gradients]))
        parts = numbers[: link.size * length].view(link.size, length)
        self.rows.cut(gradients, parts)
        link.all_reduce(numbers, f"sum the gradients of {self.name}").wait()
        own = self.rows.own(parts[link.rank].clone(), link.rank)
        used = flags.tolist()
        return [each if flag else None for each, flag in zip(own, used, strict=True)]


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
            if block.again:
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
