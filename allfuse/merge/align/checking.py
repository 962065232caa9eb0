"""Whether a model gives the same outputs when its units are in another order."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from allfuse.base.errors import MergeError
from allfuse.base.tensors import map_nest
from allfuse.merge.align.groups import Groups
from allfuse.merge.align.recording import Forward, Recorded, record, state_of

TOLERANCES = {
    torch.float64: 1e-9,
    torch.float32: 1e-5,
    torch.float16: 1e-2,
    torch.bfloat16: 1e-1,
}
"""Of the largest output, by the shortest type that the model computes in: sums in another order are
rounded otherwise."""


def check_groups(
    module: nn.Module, batch: Any, forward: Forward, groups: Groups, seed: int = 0
) -> None:
    """Permute every group at random and compare the outputs with those before.

    That is done on a copy, in float64 where the model can be, with every number of its own: units
    that are alike, as those of a norm that was never trained, would hide a mistake.

    Raises:
        MergeError: the outputs differ, and for which group; or they differ without a permutation.
    """
    try:
        probe = _Probe(module, batch, forward, torch.float64, seed)
    except (MergeError, RuntimeError):  # the model makes tensors of a type of its own
        probe = _Probe(module, batch, forward, torch.float32, seed)
    if probe.difference(groups, groups.identity()) > probe.tolerance:
        raise MergeError(
            "the model gives other outputs for the same input the second time, so it cannot be "
            "checked that units in another order change nothing; next: merge without --align"
        )
    orders = groups.random(torch.Generator().manual_seed(seed))
    if (most := probe.difference(groups, orders)) <= probe.tolerance:
        return
    for number, group in enumerate(groups.groups):
        single = groups.identity()
        single[number] = orders[number]
        if (own := probe.difference(groups, single)) > probe.tolerance:
            raise MergeError(_text(f"the {group.size} units of {group.name}", own))
    raise MergeError(_text("all units together", most))


def _text(what: str, difference: float) -> str:
    return (
        f"{what} in another order change the model's outputs by {difference:.1e} of the largest, "
        "so it computes something that could not be followed; next: merge without --align"
    )


class _Probe:
    """A copy of a module with random numbers, and what it gives: `expected`, to a tolerance."""

    def __init__(
        self, module: nn.Module, batch: Any, forward: Forward, dtype: torch.dtype, seed: int
    ) -> None:
        self.module = copy.deepcopy(module).to(dtype)
        self.batch = map_nest(lambda leaf: _cast(leaf, dtype), batch)
        self.forward = forward
        generator = torch.Generator().manual_seed(seed)
        self.state = {}
        for name, tensor in state_of(self.module).items():
            values = tensor.detach().clone()
            if values.is_floating_point():
                values *= 1 + 0.2 * torch.rand(values.shape, generator=generator, dtype=dtype)
                if isinstance(tensor, nn.Parameter):
                    values += 0.02 * torch.randn(values.shape, generator=generator, dtype=dtype)
            self.state[name] = values
        self._put(self.state)
        calls, self.expected = self._run()
        kinds = {each.dtype for call in calls for each in call.results}
        self.tolerance = max(TOLERANCES.get(kind, 0.0) for kind in kinds | {dtype})

    @torch.no_grad()
    def _put(self, state: dict[str, Tensor]) -> None:
        for name, tensor in state_of(self.module).items():
            tensor.copy_(state[name])

    def _run(self) -> tuple[list[Recorded], list[Tensor]]:
        calls, outputs = record(self.module, self.batch, self.forward)
        return calls, [each.to(torch.float64) for each in outputs]

    def difference(self, groups: Groups, orders: list[Tensor]) -> float:
        """The largest change of an output, relative to the largest output."""
        self._put(groups.permute(self.state, orders))
        worst = 0.0
        for old, new in zip(self.expected, self._run()[1], strict=True):
            same = (old == new) | (old.isnan() & new.isnan())
            if not bool(same.all()):
                largest = old.nan_to_num(0, 0, 0).abs().max().clamp(min=1e-30)
                change = (old - new).abs()[~same].nan_to_num(torch.inf, torch.inf).max()
                worst = max(worst, float(change / largest))
        return worst


def _cast(leaf: Any, dtype: torch.dtype) -> Any:
    return leaf.to(dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf
