"""Linear layers whose outputs are nearest to those of all models."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from allfuse.base.errors import PlanError
from allfuse.merge.learned.base import Learned, float_bytes
from allfuse.merge.learned.ingredients import Ingredients
from allfuse.merge.learned.layers import Layer, find_layers
from allfuse.merge.learned.regression import Regression


@dataclass(frozen=True)
class RegMean(Learned):
    """RegMean (Jin et al. 2023, arXiv:2212.09849): the weight of each linear layer is the one whose
    outputs are nearest, in the sum of squares, to those of every model on that model's inputs:
    `Regression` has the formula. `alpha` scales what is off the diagonal of Gram matrices.

    Convolutions are linear layers of the patches they see. Biases, all other parameters, layers of
    more than 8,192 inputs, those whose weight another module uses too, and those that nothing came
    into become their weighted mean.

    Cost: a forward pass of each sample; 7 models and the Gram matrices (8 d^2 bytes for a layer of
    d inputs, twice) in memory, whatever the number of models.
    """

    name: ClassVar[str] = "regmean"
    alpha: float = 0.9
    ridge: float = 1e-6

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise PlanError(str(self), "alpha goes from 0 to 1", "regmean(alpha=0.9)")
        if not self.ridge >= 0:
            raise PlanError(str(self), "ridge is 0 or more", "regmean(ridge=1e-6)")

    def held_bytes(self, module: nn.Module, models: int) -> int:
        grams = sum(layer.gram_bytes for layer in find_layers(module).values())
        return 7 * float_bytes(module) + 2 * grams

    def fuse(self, mix: Ingredients) -> dict[str, Tensor]:
        sums: dict[str, Regression] = {}
        met: Counter[str] = Counter()
        for number, share in enumerate(mix.shares):
            module = mix.model(number)
            layers = find_layers(module)
            grams = self._grams(mix, number, module, layers)
            for name in list(grams):
                gram, rows = grams.pop(name)
                if name not in sums:
                    sums[name] = Regression(layers[name], self.alpha, self.ridge)
                sums[name].add(share, gram, rows, layers[name].weight)
                met[name] += 1
        solved = {
            regression.layer.parameter: regression.solve()
            for name, regression in sums.items()
            if met[name] == len(mix.sources)
        }
        mix.tell_averaged(solved)
        return solved

    def _grams(
        self, mix: Ingredients, number: int, module: nn.Module, layers: dict[str, Layer]
    ) -> dict[str, tuple[Tensor, int]]:
        """What comes into each layer of a model, as Gram matrices and rows."""
        found: dict[str, tuple[Tensor, int]] = {}

        def meet(layer: Layer, given: Tensor) -> None:
            gram, rows = layer.gram(given)
            if layer.name in found:
                before, count = found[layer.name]
                gram, rows = before.add_(gram), count + rows
            found[layer.name] = gram, rows

        with torch.no_grad(), watched(layers, meet):
            for batch in mix.batches(number, "what comes into layers"):
                mix.forward(number, module, batch)
        return found


Meet = Callable[[Layer, Tensor], None]


@contextmanager
def watched(layers: dict[str, Layer], meet: Meet) -> Iterator[None]:
    """Call `meet(layer, what comes in)` before a layer runs.

    Blocks of torch.nn that would run all their layers as one do not, meanwhile.
    """
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    hooks = [
        layer.module.register_forward_pre_hook(
            functools.partial(_ask, meet, layer), with_kwargs=True
        )
        for layer in layers.values()
    ]
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
        for hook in hooks:
            hook.remove()


def _ask(
    meet: Meet, layer: Layer, module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]
) -> None:
    meet(layer, given[0] if given else named["input"])
