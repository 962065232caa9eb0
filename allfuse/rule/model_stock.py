"""Between the mean and the base, as far as the models agree."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from allfuse.rule.base import SpanRule

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class ModelStock(SpanRule):
    """t times the mean of changes since the base, t = n c / (1 + (n - 1) c); c is the mean cosine
    between the changes of two models (Jang et al. 2024, arXiv:2403.19522, equation 7). Where that
    is below 0, as when two tensors of one number differ in sign, t is 0: the formula would lead
    away from the mean, at c = -1 / (n - 1) without end.

    Weights are not looked at. Changes without length are at right angles to all.
    """

    name: ClassVar[str] = "model_stock"
    of_changes: ClassVar[bool] = True
    weighted: ClassVar[bool] = False

    def coefficients(self, gram: Tensor, weights: Tensor) -> Tensor:
        n = len(gram)
        if n == 1:
            return gram.new_ones(1)
        lengths = gram.diagonal().sqrt()
        sizes = lengths.outer(lengths)
        cosines = (gram / sizes.masked_fill(sizes == 0, 1.0)).masked_fill(sizes == 0, 0.0)
        mean = ((cosines.sum() - cosines.diagonal().sum()) / (n * (n - 1))).clamp(min=0.0)
        share = n * mean / (1 + (n - 1) * mean)
        return gram.new_full((n,), 1.0) * share / n
