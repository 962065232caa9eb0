"""How large tensors came by their numbers, so that they can come by them again, to the bit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, UntypedStorage

from allfuse.split.draws import Draw
from allfuse.split.record import argument_leaves, map_arguments

EMPTY = frozenset({"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"})
"""Calls that make memory and leave open what is in it."""
SMALLEST_BYTES = 1 << 12
"""Memory up to here is copied whole."""


@dataclass(frozen=True)
class View:
    """How a tensor lies in its memory: its type, sizes, strides and first number."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @classmethod
    def of(cls, tensor: Tensor) -> View:
        return cls(
            tensor.dtype,
            tuple(tensor.shape),
            tuple(tensor.stride()),
            int(tensor.storage_offset()),
        )

    def on(self, memory: UntypedStorage) -> Tensor:
        """A tensor that lies so in some memory."""
        made: Any = torch.empty(0, dtype=self.dtype, device=memory.device)
        found: Tensor = made.set_(memory, self.offset, self.shape, self.stride)
        return found


@dataclass(frozen=True)
class Seen:
    """A tensor in large memory among the arguments of a call."""

    history: History
    view: View


@dataclass(eq=False)
class Write:
    """A call of torch that has changed large memory, or made some.

    Attributes:
        index: how many there were before it.
        arguments: positional and by name, with a `Seen` for each tensor in large memory, and copies
            of the others.
        draw: what it drew from, before it did; None for one that draws nothing.
        changed: what it has changed in place.
        made: what came out of it in memory of its own, by its place among the tensors it gave.
    """

    index: int
    function: Any
    arguments: tuple[tuple[Any, ...], dict[str, Any]]
    draw: Draw | None
    changed: tuple[History, ...] = ()
    made: Mapping[int, int] = field(default_factory=dict)  # by the `id` of the history

    def again(self, target: History, memory: UntypedStorage | None, known: Known) -> UntypedStorage:
        """What `target` holds after the call, of what it held before."""

        def give(leaf: Any) -> Any:
            if isinstance(leaf, Tensor):
                return copied(leaf)  # the call may change it
            if not isinstance(leaf, Seen):
                return leaf
            if leaf.history is target and memory is not None:
                return leaf.view.on(memory)
            held = leaf.history.before(self.index, known)
            return leaf.view.on(held.clone() if leaf.history in self.changed else held)

        placed, named = map_arguments(give, self.arguments)
        with torch.no_grad():
            if self.draw is None:
                result = self.function(*placed, **named)
            else:
                result = self.draw.again(self.function, placed, named)
        if target in self.changed:
            assert memory is not None
            return memory
        given = [leaf for leaf in argument_leaves(result) if isinstance(leaf, Tensor)]
        return given[self.made[id(target)]].untyped_storage()


Known = dict[tuple[int, int], UntypedStorage]
"""What memory held before a call, by the `id` of its history and how many writes it had had."""


@dataclass(eq=False)
class History:
    """The calls that wrote to a piece of memory, in order, the one that made it first.

    Attributes:
        memory: while a model is built: empty where its numbers were given up.
    """

    number: int
    nbytes: int
    memory: UntypedStorage | None
    writes: list[Write] = field(default_factory=list)

    @property
    def is_here(self) -> bool:
        return self.memory is not None and self.memory.nbytes() == self.nbytes

    def again(self) -> UntypedStorage:
        """New memory with the numbers after all its writes."""
        return self._after(len(self.writes), {})

    def refill(self) -> None:
        """Give memory that was emptied its numbers again."""
        assert self.memory is not None
        self.memory.resize_(self.nbytes)
        if self.writes[0].function.overloadpacket.__name__ in EMPTY:
            self._after(len(self.writes), {}, self.memory)
        else:
            self.memory.copy_(self.again())

    def before(self, index: int, known: Known) -> UntypedStorage:
        """What it held before a call, not to be changed."""
        count = sum(write.index < index for write in self.writes)
        if self.is_here and count == len(self.writes) and self.memory is not None:
            return self.memory
        if (id(self), count) not in known:
            known[id(self), count] = self._after(count, known)
        return known[id(self), count]

    def _after(
        self, count: int, known: Known, memory: UntypedStorage | None = None
    ) -> UntypedStorage:
        """After so many writes; with `memory` the first, which only makes it, is done already."""
        for write in self.writes[memory is not None : count]:
            memory = write.again(self, memory, known)
        assert memory is not None
        return memory


def copied(tensor: Tensor) -> Tensor:
    """A tensor that lies in the same way in memory of its own; a small part of large memory lies
    in memory for that part."""
    memory = tensor.untyped_storage()
    if memory.nbytes() > max(tensor.nbytes, SMALLEST_BYTES):
        return tensor.clone()
    return View.of(tensor).on(memory.clone())
