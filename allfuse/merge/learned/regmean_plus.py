"""Linear layers whose outputs are nearest to those of all models, on what merged layers give."""

from __future__ import annotations

import functools
from contextlib import ExitStack
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from allfuse.base.errors import MergeError
from allfuse.merge.learned.base import float_bytes
from allfuse.merge.learned.ingredients import Ingredients, put
from allfuse.merge.learned.layers import Layer, find_layers
from allfuse.merge.learned.march import March
from allfuse.merge.learned.regmean import RegMean, watched
from allfuse.merge.learned.regression import Regression
from allfuse.merge.loaded import SourceWeights

MOST_PASSES = 1024


@dataclass(frozen=True)
class RegMeanPlus(RegMean):
    """RegMean++ (Nguyen et al. 2025, arXiv:2508.03121): as `RegMean`, but what comes into a layer
    is what the layers before it give that were merged already, on each model's data.

    The paper goes on from one block of a transformer to the next, and takes what is within a block
    from each model; here each linear layer is one to go on from, so that it works on any module.

    Cost: a forward pass of each sample, all batches side by side; their activations, 5
    models and the Gram matrices of one layer in memory.
    """

    name: ClassVar[str] = "regmean++"

    def held_bytes(self, module: nn.Module, models: int) -> int:
        grams = [layer.gram_bytes for layer in find_layers(module).values()]
        return 5 * float_bytes(module) + 4 * max(grams, default=0)

    def fuse(self, mix: Ingredients) -> dict[str, Tensor]:
        module = mix.start()
        put(module, mix.mean())
        layers = find_layers(module)
        solved: dict[str, Tensor] = {}
        given = [
            (number, batch)
            for number in range(len(mix.jobs))
            for batch in mix.batches(number, "data of all models")
        ]
        if len(given) > MOST_PASSES:
            raise MergeError(
                f"{self.name} takes all batches through the model side by side, and there are "
                f"{len(given):,}; allowed: {MOST_PASSES:,}; next: fewer --examples, or a larger "
                "batch_size in the job"
            )
        with ExitStack() as stack:
            files = [stack.enter_context(SourceWeights(source)) for source in mix.sources]

            def choose(layer: Layer, met: list[Tensor]) -> None:
                """Give a layer the weight that it has from now on."""
                regression = Regression(layer, self.alpha, self.ridge)
                for number, share in enumerate(mix.shares):
                    gram, rows = self._gram(layer, met, [owner == number for owner, _ in given])
                    weight = files[number].read(layer.parameter).to(layer.weight)
                    regression.add(share, gram, rows, weight)
                solved[layer.parameter] = regression.solve()
                layer.weight.copy_(solved[layer.parameter])

            march = March(len(given), choose)
            stack.enter_context(watched(layers, march.meet))
            march.run(
                [functools.partial(mix.forward, number, module, batch) for number, batch in given]
            )
        mix.tell_averaged(solved)
        return solved

    @staticmethod
    def _gram(layer: Layer, met: list[Tensor], own: list[bool]) -> tuple[Tensor, int]:
        """Of what came in from one model's data, in order."""
        total, count = None, 0
        for given, is_own in zip(met, own, strict=True):
            if is_own:
                gram, rows = layer.gram(given)
                total, count = gram if total is None else total.add_(gram), count + rows
        assert total is not None
        return total, count
