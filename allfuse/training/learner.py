"""One optimizer with its parameters: from a loss to fused, clipped gradients and a step."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Parameter

from allfuse.base.errors import UserError
from allfuse.base.torch_private import foreach_multiply
from allfuse.fusion.gradients import GradientFusion

if TYPE_CHECKING:
    from allfuse.fusion import Fusion
    from allfuse.link import Link
    from allfuse.split.base import Split

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Precision:
    """Autocast to a shorter type, with loss scaling where its range asks for it (fp16)."""

    def __init__(self, name: str, device: torch.device) -> None:
        self.name, self.device = name, device
        self.scaler = torch.amp.GradScaler(device.type) if name == "fp16" else None

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.name == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=AUTOCAST[self.name])


class Learner:
    """Differentiates, fuses, clips and steps the parameters of one optimizer.

    `alone` says that it is the only optimizer, so that a backward pass needs no list of inputs.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        names: Sequence[str],
        parameters: Sequence[Parameter],
        *,
        split: Split,
        fusion: Fusion,
        link: Link,
        precision: Precision,
    ) -> None:
        self.optimizer, self.precision, self.split = optimizer, precision, split
        self.names, self.parameters = list(names), list(parameters)
        self.fusion = GradientFusion(names, parameters, fusion, link)
        if link.size > 1:
            split.watch(self.parameters, self.fusion.final)
        self.alone = True
        self.unscaled = False

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradients of `loss`; with `last` start to fuse them as they become final."""
        if self.precision.scaler is not None:
            loss = self.precision.scaler.scale(loss)
        if not loss.requires_grad:
            raise UserError(
                "the loss does not depend on any parameter that requires a gradient; "
                "next: compute it from the model's outputs, without detach() or no_grad()"
            )
        self.split.backward(loss, () if self.alone else self.parameters, last)
        self.unscaled = False

    def finish(self, factor: float) -> None:
        """Wait for the fusions; `factor` corrects gradients that were scaled by a guessed count."""
        self.fusion.finish()
        if factor != 1.0:
            foreach_multiply(self.gradients(), factor)

    @property
    def may_skip(self) -> bool:
        """Whether the scaler leaves out steps whose gradients are not finite."""
        return self.precision.scaler is not None

    def gradients(self) -> list[Tensor]:
        return [p.grad for p in self.parameters if p.grad is not None]

    def unscale(self) -> None:
        if self.precision.scaler is not None and not self.unscaled:
            self.precision.scaler.unscale_(self.optimizer)
        self.unscaled = True

    def clip(self, largest: float | None) -> Tensor | None:
        """The global norm of the gradient; scales it down to `largest` where it is longer."""
        self.unscale()
        gradients = self.gradients()
        if not gradients:
            return None
        norm = torch.nn.utils.get_total_norm(gradients)
        if largest is not None:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, largest, norm)
        return norm

    def step(self) -> None:
        """One optimizer step, left out where fp16 overflowed; clears the gradients."""
        if self.precision.scaler is not None:
            self.precision.scaler.step(self.optimizer)
            self.precision.scaler.update()
        else:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    @property
    def learning_rate(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])
