"""A part of a tensor on a server, with the optimizer that steps it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from allfuse.base.torch_private import storage_users
from allfuse.roles.blueprint import Blueprint
from allfuse.roles.cutting import Span
from allfuse.roles.elementwise import find_class, from_plain, make_optimizer
from allfuse.roles.pool import Pool

Options: TypeAlias = Sequence[Mapping[str, Any]]
"""For each group, those options that are not the blueprint's."""

Values: TypeAlias = tuple[Tensor, ...]
"""One tensor (elements,) for each span of a piece."""

ALONE = 2  # users of memory that nobody else reads: the tensor, and the look at it
STATE = "state/"


class Slice:
    """A span with the optimizer that steps it: its own, so that pieces are stepped one by one.

    What is handed out are the live weights and states. A step leaves them alone while somebody
    still has them, a message on its way or a thread that writes to disk, and goes on in a copy
    (copy on write); where nobody has them any more nothing is copied.
    """

    def __init__(self, span: Span, blueprint: Blueprint, *, at_grains: bool) -> None:
        block = blueprint.blocks[span.block]
        self.span, self.group, self.dtype = span, block.group, block.dtype
        self.options = blueprint.groups[block.group].options
        self._pool = Pool(span.elements, block.dtype)
        self.parameter = Parameter(self._pool.take().zero_())
        self._users = storage_users(self.parameter)
        found = find_class(blueprint.groups[block.group].optimizer)
        assert found is not None
        self.optimizer: Optimizer = make_optimizer(
            found, self.options, self.parameter, at_grains=at_grains
        )

    def put(self, values: Tensor) -> None:
        if storage_users(self.parameter) > self._users:
            self.parameter.data = self._pool.take()
        self.parameter.detach().copy_(values)

    def step(self, gradient: Tensor, options: Mapping[str, Any]) -> None:
        self._leave_alone()
        self.optimizer.param_groups[0].update(from_plain({**self.options, **options}))
        self.parameter.grad = gradient
        self.optimizer.step()
        self.parameter.grad = None

    def _leave_alone(self) -> None:
        """Go on in copies of what somebody else still reads."""
        if storage_users(self.parameter) > self._users:
            self.parameter.data = self._pool.take().copy_(self.parameter.detach())
        kept = self._kept
        for name, value in kept.items():
            if isinstance(value, Tensor) and storage_users(value) > ALONE:
                kept[name] = value.clone()

    def read(self) -> Tensor:
        """The weights (elements,) as they are now, which later steps leave alone."""
        return self.parameter.detach()

    def capture(self) -> dict[str, Tensor]:
        """The weights, and what the optimizer keeps: (elements,) for each element, () for all."""
        state = {name: value for name, value in self._kept.items() if isinstance(value, Tensor)}
        named = {f"{STATE}{name}": value[...] for name, value in state.items()}
        return {"weights": self.read(), **named}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take back what `capture` gave.

        Raises:
            KeyError, RuntimeError, ValueError: it is of another slice.
        """
        state = {n.removeprefix(STATE): t for n, t in tensors.items() if n.startswith(STATE)}
        sizes = {tensors["weights"].shape, *(kept.shape for kept in state.values() if kept.dim())}
        if sizes != {self.parameter.shape}:
            raise ValueError(f"tensors of {sizes} for {self.parameter.shape}")
        self.put(tensors["weights"])
        self.optimizer.state[self.parameter] = {name: kept.clone() for name, kept in state.items()}

    @property
    def _kept(self) -> dict[str, Any]:
        kept: dict[str, Any] = self.optimizer.state.get(self.parameter, {})
        return kept
