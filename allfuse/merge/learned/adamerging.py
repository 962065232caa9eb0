"""How much of each model's change to add, learned on data without labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from allfuse.base.errors import MergeError, PlanError
from allfuse.merge.learned.base import Learned, float_bytes
from allfuse.merge.learned.ingredients import Ingredients, floats, put
from allfuse.merge.learned.scores import entropy, find_scores
from allfuse.merge.loaded import DATA

LEAST, MOST = 0.0, 1.0
"""What coefficients stay within."""


@dataclass(frozen=True)
class AdaMerging(Learned):
    """AdaMerging (Yang et al. 2024, arXiv:2310.02575): base + sum(c_il tau_il), where the
    coefficient c_il of model i and parameter l (by=layer), or of the model (by=task), is learned by
    Adam so that predictions on each model's data have little entropy. No labels are looked at.

    Coefficients begin at `start` times the model's weight over the mean weight, and stay within 0
    and 1. Each step takes one batch of each model's data. `data` says which (train, validation or
    test); by default the validation data, and the training data of jobs that have none: on that
    models are surer than they should be.

    Buffers become their weighted mean.

    Cost: `steps` forward and backward passes of a batch of each model's data; a task vector for
    each model, the base, the fused model and its gradients in memory.
    """

    name: ClassVar[str] = "adamerging"
    of_changes: ClassVar[bool] = True
    by: str = "layer"
    steps: int = 500
    lr: float = 1e-3
    start: float = 0.3
    data: str | None = None

    def __post_init__(self) -> None:
        example = "adamerging(by=layer)"
        if self.by not in ("layer", "task"):
            raise PlanError(str(self), "coefficients are by layer or by task", example)
        if self.steps < 1 or not self.lr > 0:
            raise PlanError(str(self), "it takes at least one step, by a lr above 0", example)
        if not LEAST <= self.start <= MOST:
            raise PlanError(str(self), "coefficients stay within 0 and 1", example)
        if self.data not in (None, *DATA):
            raise PlanError(str(self), f"data is {', '.join(DATA)}", example)

    def held_bytes(self, module: nn.Module, models: int) -> int:
        return (models + 4) * float_bytes(module)

    def fuse(self, mix: Ingredients) -> dict[str, Tensor]:
        module = mix.start()
        put(module, {name: value for name, value in mix.mean().items() if name in _buffers(module)})
        blend = Blend(module, [mix.model(number) for number in range(len(mix.jobs))])
        chosen = self._learn(mix, module, blend)
        blend.put(chosen)
        told = chosen.mean(1).tolist()
        mix.tell("note", text=f"coefficients, mean by model: {', '.join(f'{c:.3f}' for c in told)}")
        known = floats(module)
        return {name: known[name] for name in blend.names}

    def _learn(self, mix: Ingredients, module: nn.Module, blend: Blend) -> Tensor:
        """The coefficients (models, parameters)."""
        pools = [
            list(mix.batches(number, "data without labels", self._which(mix, number)))
            for number in range(len(mix.jobs))
        ]
        shares = torch.tensor(mix.shares, dtype=torch.float64) * len(mix.shares)
        begin = (self.start * shares).clamp(LEAST, MOST)[:, None]
        columns = 1 if self.by == "task" else len(blend.names)
        chosen = begin.repeat(1, columns).requires_grad_(True)
        optimizer = torch.optim.Adam([chosen], lr=self.lr)
        mix.tell("learning", what="coefficients", model=None, models=len(pools), total=self.steps)
        for step in range(self.steps):
            batches = [pool[step % len(pool)] for pool in pools]
            loss, gradient = self.differentiate(mix, module, blend, chosen.detach(), batches)
            if not loss < float("inf"):
                raise MergeError(
                    f"the entropy of predictions is {loss} at step {step}; next: a smaller lr, or "
                    "compare the base and the models"
                )
            chosen.grad = gradient
            optimizer.step()
            chosen.data.clamp_(LEAST, MOST)
            mix.tell("learned", count=1)
        return chosen.detach().expand(-1, len(blend.names))

    def differentiate(
        self,
        mix: Ingredients,
        module: nn.Module,
        blend: Blend,
        chosen: Tensor,
        batches: list[Any],
    ) -> tuple[float, Tensor]:
        """The sum over models of the entropy on a batch of each, and its gradient by coefficients
        (models, parameters or 1)."""
        blend.put(chosen.expand(-1, len(blend.names)))
        total = 0.0
        for number, batch in enumerate(batches):
            scores = find_scores(mix.forward(number, module, batch), self.name)
            loss = entropy(scores)
            loss.backward()
            total += float(loss.detach())
        gradient = blend.take_gradient()
        return total, gradient.sum(1, keepdim=True) if chosen.shape[1] == 1 else gradient

    def _which(self, mix: Ingredients, number: int) -> str:
        if self.data is not None:
            return self.data
        return "train" if mix.jobs[number].validation is None else "validation"


class Blend:
    """base + sum(c_il tau_il) in the parameters of a module.

    Args:
        module: holds the base. models: what changes are taken from; they hold the changes then.
    """

    def __init__(self, module: nn.Module, models: list[nn.Module]) -> None:
        known = floats(module)
        self._own = {n: each for n, each in module.named_parameters() if n in known}
        self.names = list(self._own)
        self._base = {name: each.detach().clone() for name, each in self._own.items()}
        held = [floats(model) for model in models]
        for values in held:
            for name in self.names:
                values[name].sub_(self._base[name])
        self._changes = held
        for parameter in self._own.values():
            parameter.requires_grad_(True)

    @torch.no_grad()
    def put(self, chosen: Tensor) -> None:
        """Take coefficients (models, parameters)."""
        for place, (name, parameter) in enumerate(self._own.items()):
            parameter.copy_(self._base[name])
            for values, share in zip(self._changes, chosen[:, place].tolist(), strict=True):
                parameter.add_(values[name], alpha=share)

    @torch.no_grad()
    def take_gradient(self) -> Tensor:
        """By coefficients (models, parameters), on the CPU: <gradient of the parameter, tau>. The
        parameters have none afterwards."""
        found = torch.zeros(len(self._changes), len(self.names), dtype=torch.float64)
        for place, (name, parameter) in enumerate(self._own.items()):
            if parameter.grad is not None:
                for row, values in enumerate(self._changes):
                    found[row, place] = (parameter.grad * values[name]).sum(dtype=torch.float64)
                parameter.grad = None
        return found


def _buffers(module: nn.Module) -> set[str]:
    return {name for name, _ in module.named_buffers()}
