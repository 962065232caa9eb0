"""Weights by how much a model's predictions depend on each of its numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from allfuse.base.errors import PlanError
from allfuse.base.tensors import count_rows, cut_rows
from allfuse.merge.learned.base import Learned, float_bytes
from allfuse.merge.learned.ingredients import Ingredients, floats
from allfuse.merge.learned.scores import find_scores, has_classes
from allfuse.training.measure import sum_and_count

EXACT = 16
"""Classes up to which the expectation over labels is taken over all of them; else one is drawn."""


@dataclass(frozen=True)
class Fisher(Learned):
    """Fisher-weighted averaging (Matena & Raffel 2022, arXiv:2111.09832): each number is
    sum(w F x) / sum(w F), F being the diagonal of the model's Fisher information on its own data.

    F is the mean over samples of E[(d log p(y) / d x)^2], y drawn from the model's own prediction
    (labels=model): over all classes up to 16, else for one draw. labels=data takes the gradient of
    the job's loss instead (the empirical Fisher), as is done by itself where outputs are no scores
    of classes. With `normalize` each model's F is divided by its L2 norm over all numbers, so that
    models whose gradients are larger do not outweigh others; then no F is below `floor`, so that
    numbers that no prediction depends on become their mean.

    Cost: a forward and, for each class, a backward pass for each sample alone; 5 models in memory.
    """

    name: ClassVar[str] = "fisher"
    floor: float = 1e-6
    normalize: bool = True
    labels: str | None = None

    def __post_init__(self) -> None:
        if not self.floor > 0:
            raise PlanError(str(self), "floor is above 0: it is what F is at least", "fisher")
        if self.labels not in (None, "model", "data"):
            raise PlanError(str(self), "labels are of the model or of the data", "fisher")

    def held_bytes(self, module: nn.Module, models: int) -> int:
        return 5 * float_bytes(module)  # weights, gradients, F, and two sums

    def fuse(self, mix: Ingredients) -> dict[str, Tensor]:
        above: dict[str, Tensor] = {}
        below: dict[str, Tensor] = {}
        for number, share in enumerate(mix.shares):
            module = mix.model(number)
            found = self.information(mix, number, module)
            size = sum(float(each.double().square().sum()) for each in found.values()) ** 0.5
            scale = 1 / size if self.normalize and size > 0 else 1.0
            for name, value in module.named_parameters():
                if name in found:
                    weight = found[name].mul_(scale).clamp_(min=self.floor).mul_(share)
                    part = value.detach() * weight
                    above[name] = above[name].add_(part) if number else part
                    below[name] = below[name].add_(weight) if number else weight
        return {name: above[name].div_(below[name]) for name in above}

    def information(self, mix: Ingredients, number: int, module: nn.Module) -> dict[str, Tensor]:
        """The diagonal of a model's Fisher information by parameter: its mean over samples."""
        known = floats(module)
        own = {name: each for name, each in module.named_parameters() if name in known}
        for parameter in own.values():
            parameter.requires_grad_(True)
        total = {name: torch.zeros_like(parameter) for name, parameter in own.items()}
        chance = torch.Generator().manual_seed(mix.seed + number)
        samples = 0
        for batch in mix.batches(number, "Fisher information"):
            for row in range(count_rows(batch)):
                one = cut_rows(batch, row, row + 1)
                outputs = mix.forward(number, module, one)
                for weight, value in self._values(mix, number, outputs, one, chance):
                    self._add(total, own, weight, value)
                samples += 1
        return {name: value.div_(samples) for name, value in total.items()}

    @staticmethod
    def _add(
        total: dict[str, Tensor], own: dict[str, nn.Parameter], weight: float, value: Tensor
    ) -> None:
        """Add the squares of a value's gradient."""
        gradients = torch.autograd.grad(
            value, list(own.values()), retain_graph=True, allow_unused=True
        )
        for name, gradient in zip(own, gradients, strict=True):
            if gradient is not None:
                total[name].addcmul_(gradient, gradient, value=weight)

    def _values(
        self, mix: Ingredients, number: int, outputs: Any, one: Any, chance: torch.Generator
    ) -> list[tuple[float, Tensor]]:
        """What is differentiated for one sample: log-likelihoods, and with which weights."""
        labels = self.labels or ("model" if has_classes(outputs, one) else "data")
        if labels == "data":
            value, factor, _ = sum_and_count(mix.jobs[number].loss(outputs, one), 1, "the loss")
            return [(1.0, value * factor)]
        logs = find_scores(outputs, str(self)).log_softmax(-1)
        odds = logs.detach().double().exp().cpu()
        if logs.shape[-1] <= EXACT and logs.shape[:-1].numel() == 1:
            flat = logs.reshape(-1)
            return list(zip(odds.reshape(-1).tolist(), flat.unbind(), strict=True))
        drawn = torch.multinomial(odds.reshape(-1, odds.shape[-1]), 1, generator=chance)
        places = drawn.view(*odds.shape[:-1], 1).to(logs.device)
        return [(1.0, logs.gather(-1, places).sum())]
