"""Activation matching: the orders in which the units of two models do the same on the same data.

Ainsworth, Hayase and Srinivasa 2023, arXiv:2209.04836, section 3.1, with the correlation of Li et
al. 2016, "Convergent Learning", arXiv:1511.07543, in place of the product, so that units of every
size count alike: sum over units of corr(unit i of A, unit order[i] of B) is made as large as it can
be, over all results in which the group can be seen, before and after norms and activations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from allfuse.base.errors import MergeError
from allfuse.base.torch_private import DispatchMode
from allfuse.merge.align.assigning import assign
from allfuse.merge.align.groups import Groups, Sight
from allfuse.merge.align.operators import name_of
from allfuse.merge.align.recording import Forward, evaluating, state_of
from allfuse.merge.align.weights import Matching

TINY = 1e-12


def match_activations(
    groups: Groups,
    module: nn.Module,
    reference: Mapping[str, Tensor],
    other: Mapping[str, Tensor],
    batches: Callable[[], Iterable[Any]],
    forward: Forward,
    seed: int = 0,
) -> list[Tensor]:
    """The order of each group in which its units in `other` do most alike what they do in
    `reference`; the module's numbers are those of one of them afterwards.

    A group that can only be seen together with others, as the numbers of a head with the heads,
    waits until those are paired: each such turn is another pass over the data. Those that cannot be
    seen at all are paired by weights (`match_weights`).

    Args:
        reference, other: the models' tensors, by name.
        batches: gives the same batches each time it is called.

    Raises:
        MergeError: there are no batches, or the pass over one calls other operators than that by
            which the groups were found.
    """
    orders = groups.identity()
    left = set(range(len(groups.groups)))
    while ready := {group: sights for group in left if (sights := _clear(groups, group, left))}:
        likeness = _compare(groups, module, (reference, other), batches, forward, ready, orders)
        for group, scores in likeness.items():
            orders[group] = assign(scores)
        left -= ready.keys()
    matching = Matching(groups, reference, other, orders)
    matching.follow_layers(left)
    matching.improve(sorted(left), seed)
    return matching.orders


def _clear(groups: Groups, group: int, left: set[int]) -> list[Sight]:
    """The sights of a group in which all others are paired."""
    return [
        sight
        for sight in groups.sights[group]
        if not any(part.group in left - {group} for part in sight.parts)
    ]


def _compare(
    groups: Groups,
    module: nn.Module,
    states: Sequence[Mapping[str, Tensor]],
    batches: Callable[[], Iterable[Any]],
    forward: Forward,
    ready: Mapping[int, list[Sight]],
    orders: Sequence[Tensor],
) -> dict[int, Tensor]:
    """The sum of the correlations of each group's units, (n, n)."""
    wanted = {sight.number: sight.operator for own in ready.values() for sight in own}
    sums = {(group, sight): _Sums() for group, own in ready.items() for sight in own}
    seen = 0
    own_state = state_of(module)
    for batch in batches():
        results = []
        for state in states:
            with torch.no_grad():
                for name, tensor in own_state.items():
                    tensor.copy_(state[name])
            results.append(_watch(module, batch, forward, wanted))
        for (_, sight), kept in sums.items():
            one = _activity(results[0][sight.number], sight, groups.identity())
            kept.add(one, _activity(results[1][sight.number], sight, orders))
        seen += 1
    if not seen:
        raise MergeError(
            "activations are to be compared, and there are no batches; next: training data with "
            "samples"
        )
    return {
        group: torch.stack([sums[group, sight].correlation() for sight in own]).sum(0)
        for group, own in ready.items()
    }


class _Sums:
    """What correlations follow from, summed over batches in float64."""

    def __init__(self) -> None:
        self.count = 0
        self.sums: list[Tensor] = []

    def add(self, one: Tensor, other: Tensor) -> None:
        """Activities of two models, (units, samples)."""
        x, y = one.double(), other.double()
        new = [x.sum(1), y.sum(1), x.square().sum(1), y.square().sum(1), x @ y.T]
        self.sums = [a + b for a, b in zip(self.sums, new, strict=True)] if self.sums else new
        self.count += x.shape[1]

    def correlation(self) -> Tensor:
        """0 where a unit never changes."""
        sum_x, sum_y, square_x, square_y, cross = (each / self.count for each in self.sums)
        spread_x = (square_x - sum_x.square()).clamp(min=0).sqrt()
        spread_y = (square_y - sum_y.square()).clamp(min=0).sqrt()
        together = cross - sum_x[:, None] * sum_y
        spread = spread_x[:, None] * spread_y
        return torch.where(spread > TINY, together / spread.clamp(min=TINY), 0.0)


def _activity(result: Tensor, sight: Sight, orders: Sequence[Tensor]) -> Tensor:
    """A group's units in a result, (units, samples); others that are beside them in their order."""
    sizes = [part.size for part in sight.parts]
    own: Tensor = result.movedim(sight.dim, 0).unflatten(0, sizes)
    for place, part in enumerate(sight.parts):
        if part.group is not None and place != sight.part:
            own = own.index_select(place, orders[part.group])
    return own.movedim(sight.part, 0).flatten(1)


class _Watch(DispatchMode):
    """Keeps the results of some calls of a pass, by their number among those that are no views."""

    def __init__(self, wanted: Mapping[int, str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kept: dict[int, Tensor] = {}
        self._wanted, self._calls = wanted, 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if function.is_view:
            return result
        if self._calls in self._wanted:
            if name_of(function) != self._wanted[self._calls]:
                raise MergeError(
                    f"the model calls {name_of(function)} where it called "
                    f"{self._wanted[self._calls]} for another batch: its units cannot be "
                    "compared by activations; next: --align weights"
                )
            first = result if isinstance(result, Tensor) else result[0]
            self.kept[self._calls] = first.clone()  # the next call may work in place
        self._calls += 1
        return result


def _watch(
    module: nn.Module, batch: Any, forward: Forward, wanted: Mapping[int, str]
) -> dict[int, Tensor]:
    watch = _Watch(wanted)
    with evaluating(module), watch:
        forward(module, batch)
    if len(watch.kept) < len(wanted):
        raise MergeError(
            "the model calls fewer operators for one batch than for another: its units cannot be "
            "compared by activations; next: --align weights"
        )
    return watch.kept
