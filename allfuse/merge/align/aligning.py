"""Brings the hidden units of models that were trained from different seeds into one order."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from allfuse.base.errors import MergeError, nearest
from allfuse.base.tensors import count_rows, cut_rows
from allfuse.job import default_forward
from allfuse.merge.align.activations import match_activations
from allfuse.merge.align.assigning import require_solver
from allfuse.merge.align.checking import check_groups
from allfuse.merge.align.finding import find_groups
from allfuse.merge.align.groups import Groups
from allfuse.merge.align.recording import Forward, state_of
from allfuse.merge.align.weights import match_weights

WAYS = ("weights", "activations")
PROBED = 4
"""Samples of the pass that shows a module's units, and of the check."""


def check_way(how: str) -> None:
    """Refuse a way to align that there is not. Raises MergeError."""
    if how not in WAYS:
        raise MergeError(f"--align {how}{nearest(how, WAYS)}; allowed: {', '.join(WAYS)}")


@dataclass(frozen=True)
class Aligned:
    """What was done to a model.

    Attributes:
        groups: how many groups of units it has. units: in all of them.
        moved: of these, those that stand elsewhere now.
    """

    groups: int
    units: int
    moved: int


class Aligner:
    """Matches models to one module's numbers.

    Args:
        module: built as the models were; its numbers change meanwhile.
        batches: gives batches of data, the same ones each time: the first few samples of the first
            show which units there are, activations are compared on all.
        forward: `forward(module, batch)`; by default as for `Job`.
        how: "weights" or "activations".

    Raises:
        MergeError: the module cannot be followed, no unit can be moved, or scipy is missing.
    """

    def __init__(
        self,
        module: nn.Module,
        batches: Callable[[], Iterable[Any]],
        *,
        how: str = "weights",
        forward: Forward | None = None,
        seed: int = 0,
    ) -> None:
        check_way(how)
        require_solver()
        self.module, self.how, self.seed = module, how, seed
        self._batches, self._forward = batches, forward or default_forward
        probe = _first_samples(batches())
        self.groups: Groups = find_groups(module, probe, self._forward)
        check_groups(module, probe, self._forward, self.groups, seed)

    def match(self, reference: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> list[Tensor]:
        """The order of each group in which `other` is like `reference`, of tensors by name."""
        if self.how == "weights":
            return match_weights(self.groups, reference, other, self.seed)
        return match_activations(
            self.groups, self.module, reference, other, self._batches, self._forward, self.seed
        )

    def describe(self, orders: Iterable[Tensor]) -> Aligned:
        """What orders do."""
        moved = sum(int((order != torch.arange(len(order))).sum()) for order in orders)
        sizes = [group.size for group in self.groups.groups]
        return Aligned(len(sizes), sum(sizes), moved)


def align(
    reference: nn.Module,
    other: nn.Module,
    batches: Callable[[], Iterable[Any]],
    *,
    how: str = "weights",
    forward: Forward | None = None,
    seed: int = 0,
) -> Aligned:
    """Bring the hidden units of `other`, in place, into the order of `reference`.

    Its outputs stay what they were; the two can be averaged then. Git Re-Basin (Ainsworth et al.
    2023, arXiv:2209.04836). Statistics of BatchNorm that are averaged with the rest are estimated
    anew best (`allfuse.training.calibrate`).

    Args:
        batches, forward, how: as for `Aligner`.

    Raises:
        MergeError: as `Aligner`, or the two are not modules of one kind.

    >>> from torch import nn
    >>> one, two = (nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1)) for _ in range(2))
    >>> align(one, two, lambda: [torch.randn(4, 2)]).units
    8
    """
    states = [_copied(module) for module in (reference, other)]
    shapes = [{name: each.shape for name, each in state.items()} for state in states]
    if shapes[0] != shapes[1]:
        wrong = sorted(name for name, _ in shapes[0].items() ^ shapes[1].items())
        raise MergeError(f"the modules are not of one kind: they differ in {wrong[0]}")
    aligner = Aligner(other, batches, how=how, forward=forward, seed=seed)
    orders = aligner.match(*states)
    found = aligner.groups.permute(states[1], orders)
    with torch.no_grad():
        for name, tensor in state_of(other).items():
            tensor.copy_(found[name])
    return aligner.describe(orders)


def _first_samples(batches: Iterable[Any]) -> Any:
    found = iter(batches)
    first = next(found, None)
    if isinstance(found, Generator):
        found.close()  # with what it reads by
    if first is None:
        raise MergeError("there is no sample to follow through the model; next: training data")
    return cut_rows(first, 0, min(PROBED, count_rows(first)))


def _copied(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in state_of(module).items()}
