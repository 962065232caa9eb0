"""Follows the calls of one pass through a model: which dims of its tensors move together.

Each operator says it of the tensors that it takes and gives, so nothing needs to be known of
modules. Dims of data, constants and outputs stay as they are. Calls from which no output follows
bind nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from allfuse.base.errors import MergeError
from allfuse.base.tensors import leaves
from allfuse.merge.align.call import Dims
from allfuse.merge.align.factors import Dim, Factors
from allfuse.merge.align.operators import find_operator, makes_uniform
from allfuse.merge.align.recording import Recorded, memory_of

GIVEN = "it is data or a constant"
OUTPUT = "it is of the output"


@dataclass
class Mark:
    """What is known of a tensor.

    Attributes:
        of_weights, of_data: what it follows from.
        is_uniform: whether it has one number everywhere, as long as nobody writes to its memory.
    """

    dims: Dims
    of_weights: bool = False
    of_data: bool = False
    is_uniform: bool = False
    is_used: bool = False


@dataclass(frozen=True)
class Result:
    """What one call gave: its number among the calls that are no views, its first result's dims."""

    number: int
    operator: str
    dims: tuple[Dim, ...]


class Trace:
    """What the calls of a pass say.

    Args:
        state: the module's tensors by name. batch: what was given. calls, outputs: of the pass.

    Attributes:
        results: those that follow from data and weights, in order.
        unknown: where an operator is that nobody knows, and the dims of what it took.

    Raises:
        MergeError: which operators come next depends on what the model computed.
    """

    def __init__(
        self,
        state: Mapping[str, Tensor],
        batch: Any,
        calls: Sequence[Recorded],
        outputs: Iterable[Tensor],
    ) -> None:
        self.factors = Factors()
        self.results: list[Result] = []
        self.unknown: list[tuple[str, list[Dim]]] = []
        self._marks: dict[int, Mark] = {}
        self._written: set[int] = set()  # memory
        for tensor in state.values():
            if id(tensor) not in self._marks:
                dims = [self.factors.new(size) for size in tensor.shape]
                is_weight = isinstance(tensor, nn.Parameter)
                self._marks[id(tensor)] = Mark(dims, of_weights=is_weight)
        for tensor in leaves(batch):
            if isinstance(tensor, Tensor):
                self.mark(tensor).of_data = True
        outputs, number = list(outputs), 0
        for call, counts in zip(calls, which_count(calls, outputs), strict=True):
            if counts:
                self._follow(call, number)
            number += not call.is_view
        self.factors.context = ""
        for tensor in outputs:
            for dim in self.mark(tensor).dims:
                self.factors.freeze(dim, OUTPUT)

    def mark(self, tensor: Tensor, shape: Sequence[int] | None = None) -> Mark:
        """What is known of a tensor. One that nobody saw before stays as it is.

        Args:
            shape: that it had, where it may have another one since.
        """
        if id(tensor) not in self._marks:
            sizes = tensor.shape if shape is None else shape
            self._marks[id(tensor)] = Mark([self.factors.new(size, GIVEN) for size in sizes])
        return self._marks[id(tensor)]

    def is_written(self, tensor: Tensor) -> bool:
        """Whether something was written to a tensor's memory after it was made."""
        return memory_of(tensor) in self._written

    def _follow(self, recorded: Recorded, number: int) -> None:
        self.factors.context = f" ({recorded.place})"
        taken = [self.mark(*each) for each in zip(recorded.taken, recorded.given, strict=True)]
        if any(self.mark(tensor).of_weights for tensor in recorded.looked_at):
            raise MergeError(
                f"{recorded.place} looks at numbers that the model computed, so which operators "
                "come next may differ from input to input, and its units cannot be followed; "
                "next: merge without --align"
            )
        for each in taken:
            each.is_used = True
        self._written |= {memory_of(tensor) for tensor in recorded.in_place}
        of_weights = any(each.of_weights for each in taken)
        of_data = any(each.of_data for each in taken)
        uniform = taken[0].is_uniform if recorded.is_view else makes_uniform(recorded.function)
        dims = self._dims(recorded)
        for tensor, own in zip(recorded.results, dims, strict=True):
            self._marks[id(tensor)] = Mark(own, of_weights, of_data, uniform)
        can_be_seen = of_weights and of_data and not recorded.is_view
        if can_be_seen and recorded.results and recorded.results[0].is_floating_point():
            self.results.append(Result(number, recorded.name, tuple(dims[0])))

    def _dims(self, recorded: Recorded) -> list[Dims]:
        call, operator = SeenCall(self, recorded), find_operator(recorded.function)
        if operator is not None:
            found = list(operator(call))
            shapes = [[self.factors.size_of(dim) for dim in dims] for dims in found]
            if shapes == [list(shape) for shape in call.shapes]:
                return found
        taken = [dim for each in call.tensors() for dim in call.dims(each)]
        self.unknown.append((recorded.place, taken))
        return [[call.fixed(size) for size in shape] for shape in call.shapes]


class SeenCall:
    """One call as an operator's description sees it."""

    def __init__(self, trace: Trace, recorded: Recorded) -> None:
        self.factors, self.name, self.shapes = trace.factors, recorded.name, recorded.shapes
        self._trace, self._recorded = trace, recorded

    def __getitem__(self, name: str) -> Any:
        return self._recorded.arguments.get(name)

    def tensors(self) -> list[Tensor]:
        return self._recorded.taken

    def dims(self, tensor: Tensor) -> Dims:
        mark = self._trace.mark(tensor)
        if mark.is_uniform and not self._recorded.is_view and not self._trace.is_written(tensor):
            sizes = map(self.factors.size_of, mark.dims)
            return [self.factors.new(size) for size in sizes]  # in any order, each time
        return mark.dims

    def fixed(self, size: int) -> Dim:
        return self.factors.new(size, f"its order matters{self.factors.context}")


def which_count(calls: Sequence[Recorded], outputs: Iterable[Tensor]) -> list[bool]:
    """Of each call, whether outputs follow from it, or which operators come next."""
    needed = {memory_of(tensor) for tensor in outputs}
    counts = []
    for call in reversed(calls):
        own = bool(call.looked_at) or any(memory_of(tensor) in needed for tensor in call.results)
        if own:
            needed |= {memory_of(tensor) for tensor in call.taken}
        counts.append(own)
    return counts[::-1]
