"""Which optimizers servers can run: those that treat each element by itself.

A server holds slices of tensors, laid end to end, and never runs code that is not torch's own.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from allfuse.base.errors import UserError
from allfuse.roles.cutting import GRAIN

PER_ELEMENT = (
    *("Adadelta", "Adagrad", "Adam", "Adamax", "AdamW", "ASGD", "NAdam", "RAdam", "RMSprop"),
    *("Rprop", "SGD"),
)
"""For messages; what counts is measured."""
REASONS = {
    "LBFGS": "it searches along a line, for which it computes the loss again and again",
    "Muon": "it makes each whole matrix orthogonal",
    "Adafactor": "it keeps its moments by the rows and columns of whole matrices",
    "SparseAdam": "it takes sparse gradients only",
}
HOW = frozenset({"foreach", "fused", "capturable", "differentiable"})
"""Options that say how a step is computed, not what."""


def find_class(name: str) -> type[Optimizer] | None:
    """The optimizer of that name in torch.optim."""
    cls = getattr(torch.optim, name, None)
    good = isinstance(cls, type) and issubclass(cls, Optimizer) and cls is not Optimizer
    return cls if good else None


def check_optimizer(cls: type[Optimizer], options: Mapping[str, Any]) -> None:
    """Refuse what servers cannot run.

    Raises:
        UserError: it is no class of torch.optim, or what becomes of an element depends on others.
    """
    name = cls.__name__
    if find_class(name) is not cls:
        why = f"{cls.__module__}.{cls.__qualname__} is not of torch, and servers run no other code"
    elif not is_per_element(name, to_text(options), torch.float32):
        why = REASONS.get(name, "what becomes of an element depends on others")
        why += "; a server holds a slice of the parameters"
    else:
        return
    raise UserError(
        f"the optimizer {name} cannot run on servers: {why}; allowed: {', '.join(PER_ELEMENT)}; "
        "next: one of these, or a plan without servers, such as data(4)"
    )


@lru_cache(maxsize=256)
def is_per_element(name: str, options: str, dtype: torch.dtype, fused: bool = False) -> bool:
    """Whether a vector of parameters and its slices come to the same bits, measured over 3 steps.

    options: as JSON. fused: by torch's fused step, where there is one, on slices that are cut at
    multiples of `GRAIN`: its last elements are rounded otherwise.
    """
    cls = find_class(name)
    if cls is None or (fused and "fused" not in inspect.signature(cls).parameters):
        return False
    chance = torch.Generator().manual_seed(0)
    sizes = [GRAIN, 7 * GRAIN, 33 * GRAIN, 20 * GRAIN - 3] if fused else [1, 7, 33, 20]
    drawn = torch.randn(4, sum(sizes), generator=chance).to(dtype)
    try:
        whole, cut = (
            _walk(cls, json.loads(options), drawn, each, fused) for each in ([sum(sizes)], sizes)
        )
    except (TypeError, ValueError, RuntimeError):
        return False
    return torch.allclose(whole, cut, rtol=0, atol=0, equal_nan=True)


def _walk(
    cls: type[Optimizer], options: Mapping[str, Any], drawn: Tensor, sizes: list[int], fused: bool
) -> Tensor:
    slices = [Parameter(part.clone()) for part in drawn[0].split(sizes)]
    optimizer = _make(cls, options, slices, fused)
    for values in drawn[1:]:
        for parameter, gradient in zip(slices, values.split(sizes), strict=True):
            parameter.grad = gradient
        optimizer.step()
    return torch.cat([parameter.detach() for parameter in slices])


def make_optimizer(
    cls: type[Optimizer], options: Mapping[str, Any], part: Parameter, *, at_grains: bool
) -> Optimizer:
    """An optimizer of a slice, of a block that is cut at multiples of `GRAIN` or not: torch's fused
    step where that gives the same bits as on the whole.

    It goes through memory once: Adam on 20 MB takes 26 ms, 110 to 120 otherwise (one thread, a
    busy machine).
    """
    fused = at_grains and is_per_element(cls.__name__, to_text(options), part.dtype, fused=True)
    return _make(cls, options, [part], fused)


def _make(
    cls: type[Optimizer], options: Mapping[str, Any], slices: Sequence[Parameter], fused: bool
) -> Optimizer:
    made: Any = cls
    optimizer: Optimizer = made(slices, **from_plain(options), **({"fused": True} if fused else {}))
    return optimizer


def to_text(options: Mapping[str, Any]) -> str:
    return json.dumps(dict(options), sort_keys=True)


def to_plain(group: Mapping[str, Any], cls: type[Optimizer]) -> dict[str, Any]:
    """The options of a parameter group that its class takes, as plain values.

    What learning-rate schedulers keep in groups is left out.

    Raises:
        UserError: a value is neither a number nor a tuple of numbers.
    """
    takes = inspect.signature(cls).parameters
    plain: dict[str, Any] = {}
    for name, value in group.items():
        if name not in takes or name in HOW or name == "params":
            continue
        plain[name] = [_number(name, each) for each in value] if _is_row(value) else None
        if plain[name] is None:
            plain[name] = _number(name, value)
    return plain


def _is_row(value: object) -> bool:
    return isinstance(value, list | tuple)


def _number(name: str, value: Any) -> float | int | bool | None:
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if value is None or isinstance(value, bool | int | float):
        return value
    raise UserError(
        f"the optimizer's option {name} is a {type(value).__name__}, which servers cannot take; "
        "allowed: numbers and tuples of numbers"
    )


def from_plain(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as torch takes them: rows of numbers are tuples."""
    return {name: tuple(v) if isinstance(v, list) else v for name, v in options.items()}


def is_option(value: object) -> bool:
    """Whether it can be the plain value of an option."""
    if isinstance(value, list):
        return all(isinstance(each, bool | int | float) for each in value)
    return value is None or isinstance(value, bool | int | float)
