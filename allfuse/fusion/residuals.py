"""What lossy codecs have not sent yet, kept for each parameter while its bucket changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypedDict

import torch
from torch import Tensor

from allfuse.base.errors import UserError

if TYPE_CHECKING:
    from allfuse.codec.memory import Memory


class Remainder(TypedDict):
    """Of one parameter: `residual` (k,) is what was not sent, `kept` the codec's own memory."""

    residual: Tensor
    kept: Tensor | None


@dataclass
class Home:
    """The memory of a bucket, and the parameters that it is of, in their order."""

    parameters: list[Tensor]
    memory: Memory

    def holds(self, parameters: Sequence[Tensor]) -> bool:
        return len(parameters) == len(self.parameters) and all(
            one is other for one, other in zip(self.parameters, parameters, strict=True)
        )


class Residuals:
    """The codec's memory of each bucket of DistributedDataParallel.

    It cuts its buckets anew after the first step, in the order in which gradients became final.
    What was held for a parameter moves with it, so that nothing is lost.

    Args:
        make: makes the memory of a bucket of tensors of these shapes.
    """

    def __init__(
        self, make: Callable[[list[tuple[int, ...]], torch.dtype, torch.device], Memory]
    ) -> None:
        self._make = make
        self._homes: dict[int, Home] = {}
        self._loose: dict[int, Remainder] = {}  # by id of parameters that `_seen` keeps alive
        self._seen: list[list[Tensor]] = []  # the buckets as they came first
        self._loaded: list[Remainder] = []  # for parameters that did not come yet

    def of(self, number: int, parameters: Sequence[Tensor], buffer: Tensor) -> Memory:
        """The memory of a bucket."""
        home = self._homes.get(number)
        if home is not None and home.holds(parameters):
            return home.memory
        self._gather(number, parameters)
        self._welcome(parameters)
        memory = self._make([tuple(p.shape) for p in parameters], buffer.dtype, buffer.device)
        for place, (parameter, residual) in enumerate(
            zip(parameters, memory.residuals(), strict=True)
        ):
            held = self._loose.pop(id(parameter), None)
            if held is not None:
                residual.copy_(held["residual"])
                if held["kept"] is not None:
                    memory.kept[place] = held["kept"].to(residual.device)
        self._homes[number] = Home(list(parameters), memory)
        return memory

    def _gather(self, number: int, parameters: Sequence[Tensor]) -> None:
        """Take back to the parameters what the buckets hold that this one takes the place of.

        No others: those of this step are under way, and what they hold changes.
        """
        known = {id(p) for bucket in self._seen for p in bucket}
        wanted = {id(p) for p in parameters}
        replaced = [
            each
            for each, home in self._homes.items()
            if each == number or any(id(p) in wanted for p in home.parameters)
        ]
        for home in map(self._homes.pop, replaced):
            residuals = home.memory.residuals()
            for place, (parameter, residual) in enumerate(
                zip(home.parameters, residuals, strict=True)
            ):
                assert id(parameter) in known
                self._loose[id(parameter)] = Remainder(
                    residual=residual, kept=home.memory.kept.get(place)
                )

    def _welcome(self, parameters: Sequence[Tensor]) -> None:
        """Note parameters that were never seen, and give them what was loaded for them."""
        known = {id(p) for bucket in self._seen for p in bucket}
        new = [parameter for parameter in parameters if id(parameter) not in known]
        if not new:
            return
        self._seen.append(new)
        if self._loaded:
            if len(new) > len(self._loaded):
                raise _of_another_model()
            own = self._loaded[-len(new) :]
            del self._loaded[-len(new) :]
            self._give(new, own)

    def _give(self, parameters: Sequence[Tensor], remainders: Sequence[Remainder]) -> None:
        for parameter, remainder in zip(parameters, remainders, strict=True):
            if parameter.numel() != remainder["residual"].numel():
                raise _of_another_model()
            self._loose[id(parameter)] = remainder

    def state_dict(self) -> list[Remainder]:
        """Copies, one for each parameter in the order of the model; empty before the first step.

        DistributedDataParallel's first buckets go from the last parameters to the first ones, each
        in the order of the model.
        """
        held: dict[int, Remainder] = dict(self._loose)
        for home in self._homes.values():
            for place, parameter in enumerate(home.parameters):
                held[id(parameter)] = Remainder(
                    residual=home.memory.residuals()[place], kept=home.memory.kept.get(place)
                )
        known = [held[id(p)] for bucket in reversed(self._seen) for p in bucket]
        return [_copy(remainder) for remainder in (*self._loaded, *known)]

    def load_state_dict(self, state: Sequence[Remainder]) -> None:
        """Go on from what `state_dict` gave, before the first step or later."""
        copies = [_copy(remainder) for remainder in state]
        if not self._seen:
            self._loaded = copies
            return
        parameters = [p for bucket in reversed(self._seen) for p in bucket]
        if len(parameters) != len(copies):
            raise _of_another_model()
        self._homes.clear()
        self._give(parameters, copies)


def _copy(remainder: Remainder) -> Remainder:
    kept = remainder["kept"]
    return Remainder(
        residual=remainder["residual"].clone(), kept=None if kept is None else kept.clone()
    )


def _of_another_model() -> UserError:
    return UserError(
        "load_state_dict of a communication hook: received the residuals of another model; allowed:"
        " what state_dict gave for the same parameters; next: make a new hook and load nothing"
    )
