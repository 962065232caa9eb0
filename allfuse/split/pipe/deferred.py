"""Linear maps whose weights get their gradients later than what they took gets its.

For schedules that fill the time in which a rank would wait with gradients of weights. All other
parameters (biases of norms, embeddings, convolutions) get theirs with the inputs: they cost little,
or their gradients come out of one call with those of the inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class Later:
    """Gradients of weights that are still to be computed, for one pass through a stage."""

    def __init__(self) -> None:
        self._kept: list[tuple[nn.Parameter, nn.Parameter | None, Tensor, Tensor]] = []

    def keep(self, weight: Any, bias: Any, gradient: Tensor, x: Tensor) -> None:
        self._kept.append((weight, bias, gradient, x))

    @torch.no_grad()
    def run(
        self,
        inputs: Sequence[nn.Parameter] | None = None,
        added: Callable[[nn.Parameter], None] = lambda parameter: None,
    ) -> None:
        """Add them, to these parameters (None is all), in the order of a backward pass; `added` is
        called with each that gets nothing more."""
        wanted = None if inputs is None else {id(parameter) for parameter in inputs}
        last = {id(p): at for at, kept in enumerate(self._kept) for p in kept[:2]}
        for at, (weight, bias, gradient, x) in enumerate(self._kept):
            rows = gradient.reshape(-1, gradient.shape[-1])
            if wanted is None or id(weight) in wanted:
                _add(weight, rows.t() @ x.reshape(-1, x.shape[-1]).to(rows.dtype))
            if bias is not None and (bias.requires_grad if wanted is None else id(bias) in wanted):
                _add(bias, rows.sum(0))
            for parameter in (weight, bias):
                if parameter is not None and last[id(parameter)] == at:
                    added(parameter)
        self._kept.clear()


def _add(parameter: nn.Parameter, gradient: Tensor) -> None:
    gradient = gradient.to(parameter.dtype)
    parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)


class _Linear(torch.autograd.Function):
    """x (..., in), weight (out, in), bias (out,): a linear map whose backward pass gives the
    gradient of x alone."""

    @staticmethod
    def forward(
        context: Any, x: Tensor, weight: Tensor, bias: Tensor | None, later: Later
    ) -> Tensor:
        y = F.linear(x, weight, bias)
        context.save_for_backward(x.to(y.dtype))
        context.about = weight, bias, later
        return y

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None, None]:
        (x,), (weight, bias, later) = context.saved_tensors, context.about
        later.keep(weight, bias, gradients[0], x)
        if not context.needs_input_grad[0]:
            return None, None, None, None
        return gradients[0] @ weight.to(gradients[0].dtype), None, None, None


class Deferring(TorchFunctionMode):
    """Within it linear maps by parameters keep the gradients of their weights for later."""

    def __init__(self, later: Later) -> None:
        super().__init__()
        self.later = later

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        named = kwargs or {}
        if getattr(function, "__name__", "") == "linear" and torch.is_grad_enabled():
            x, weight, bias = (
                args[at] if at < len(args) else named.get(name)
                for at, name in enumerate(("input", "weight", "bias"))
            )
            if _is_plain(weight) and (bias is None or isinstance(bias, nn.Parameter)):
                return _Linear.apply(x, weight, bias, self.later)  # type: ignore[no-untyped-call]
        return function(*args, **named)


def _is_plain(weight: Any) -> bool:
    """Whether it is a parameter that learns, whose gradient nobody else waits for."""
    hooked = isinstance(weight, nn.Parameter) and weight._backward_hooks
    return isinstance(weight, nn.Parameter) and weight.requires_grad and not hooked
