"""What rules make of a tensor that is in memory whole, as one block."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from allfuse.rule.base import GatherRule, JointRule, Rule, SumRule
from allfuse.rule.sift import Stretch

if TYPE_CHECKING:
    from torch import Tensor


def sift_whole(rule: Rule, value: Tensor, shape: tuple[int, ...], key: int = 0) -> Tensor:
    """What a rule leaves of one model's whole tensor (k,), of this shape, in its type.

    Args:
        key: for what is drawn at random, see `Stretch`.
    """
    sift = rule.sift(value.numel())
    if sift is None:
        return value

    def stretch() -> Stretch:
        return Stretch(value.float().clone(), 0, shape, key)  # measuring may work in place

    known = measure_whole(
        sift.turns, sift.running, lambda turn, found: sift.measure(turn, stretch(), found)
    )
    return sift.apply(stretch(), known).to(value.dtype)


def measure_whole(
    turns: int,
    running: frozenset[int],
    measure: Callable[[int, Sequence[Tensor]], Tensor],
) -> list[Tensor]:
    """What all turns find, as the only block knows it: before it there is nothing."""
    known: list[Tensor] = []
    for turn in range(turns):
        part = measure(turn, known)
        known.append(part.new_zeros(part.shape) if turn in running else part)
    return known


def fuse_whole(
    rule: Rule, values: Tensor, weights: Tensor, shape: tuple[int, ...] | None = None
) -> Tensor:
    """What a rule makes of n models' whole tensors: values (n, k), weights (n,), to (k,).

    What is to be sifted was. The values of rules of changes are these changes.
    """
    if isinstance(rule, GatherRule):
        return rule.fuse(values, weights.to(values.dtype))
    if isinstance(rule, JointRule):
        stretch = Stretch(values, 0, shape or tuple(values.shape[1:]))
        known = measure_whole(
            rule.turns(stretch.count),
            rule.running,
            lambda turn, found: rule.measure(turn, stretch, found),
        )
        return rule.fuse(stretch, weights, known)
    assert isinstance(rule, SumRule)
    pairs = list(zip(values.unbind(0), weights.tolist(), strict=True))
    total = rule.prepare(pairs[0][0].clone(), pairs[0][1])
    for value, weight in pairs[1:]:
        total += rule.prepare(value.clone(), weight)
    return rule.finish(total, sum(weights.tolist()))
