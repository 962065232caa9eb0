"""Calls of torch that draw at random, done again with the same outcome."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from allfuse.split.data.generators import isolated


@dataclass(frozen=True)
class Draw:
    """The state of the generator that a call is about to draw from."""

    state: Tensor
    device: torch.device

    @classmethod
    def before(
        cls, function: Any, named: Mapping[str, Any], device: torch.device | None
    ) -> Draw | None:
        """That of a call with these arguments by name, or None if it draws nothing.

        Args:
            device: of the tensors that it takes or makes.
        """
        if torch.Tag.nondeterministic_seeded not in function.tags:
            return None
        generator = named.get("generator") or _default(device or torch.device("cpu"))
        return cls(generator.get_state(), generator.device)

    def again(self, function: Any, placed: tuple[Any, ...], named: Mapping[str, Any]) -> Any:
        """What the call gives. The process's own generators are left as they are."""
        taking = _taking_generator(function)
        if taking is not None:
            own = torch.Generator(self.device)
            own.set_state(self.state)
            return taking(*placed, **{**named, "generator": own})
        with isolated(0):
            generator = _default(self.device)
            before = generator.get_state()
            generator.set_state(self.state)
            try:
                return function(*placed, **named)
            finally:
                generator.set_state(before)


def _default(device: torch.device) -> torch.Generator:
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        found: torch.Generator = torch.cuda.default_generators[index]
        return found
    return torch.default_generator


def _taking_generator(function: Any) -> Callable[..., Any] | None:
    """The form of a call that is told its generator; None where it has none."""
    if any(argument.name == "generator" for argument in function._schema.arguments):
        found: Callable[..., Any] = function
        return found
    packet, name = function.overloadpacket, function._overloadname
    other = "generator" if name == "default" else f"{name}_generator"
    return getattr(packet, other, None)
