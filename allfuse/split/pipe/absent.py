"""Weights that other stages have: here they keep their shapes, and changing them is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from allfuse.base.errors import UserError
from allfuse.base.torch_private import past_subclasses

SHARES_MEMORY = "more than one element of the written-to tensor refers to a single memory location"


class _Guarded:
    """What torch says of a change of a tensor without memory, said in terms of the plan."""

    why = ""

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        try:
            with past_subclasses():
                result = function(*args, **(kwargs or {}))
        except RuntimeError as error:
            if SHARES_MEMORY not in str(error):
                raise
            taken = [*args, *(kwargs or {}).values()]
            several = [x for each in taken for x in (each if isinstance(each, list) else [each])]
            told = next((x.why for x in several if isinstance(x, _Guarded)), "")
            raise UserError(told) from None
        if function == Tensor.data.__get__:  # type: ignore[attr-defined]
            result.__class__ = ElsewhereData
            result.why = args[0].why
        return result


class Elsewhere(_Guarded, nn.Parameter):
    """A parameter of another stage. A copy is a plain parameter."""

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        if id(self) not in memo:
            with past_subclasses():
                memo[id(self)] = nn.Parameter(torch.zeros_like(self), requires_grad=False)
        copied: nn.Parameter = memo[id(self)]
        return copied


class ElsewhereData(_Guarded, Tensor):
    """The `data` of one."""


def guard(model: nn.Module, ranks: Mapping[str, tuple[int, ...]], own: int, plan: str) -> None:
    """Have changes of parameters that only other ranks of a pipeline have be refused by name.

    Args:
        ranks: of the pipeline that have a parameter, by its first name.
        own: this one.
    """
    for name, parameter in model.named_parameters():
        there = ranks.get(name, (own,))
        if own in there or type(parameter) is not nn.Parameter:
            continue
        module = name.rpartition(".")[0] or "the model itself"
        parameter.__class__ = Elsewhere
        vars(parameter)["why"] = (
            f"the weight {name} of module {module} was changed on rank {own} of {plan} by code of "
            f"the job: it is in a stage of rank {there[0]}, and has no memory here; allowed: each "
            "rank changes weights of its own stages; next: look at untyped_storage().nbytes(), "
            "which is that of one number for others, or change weights before training"
        )
