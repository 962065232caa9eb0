"""Drops numbers of a tensor at random, and makes up for what was dropped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from allfuse.base.choice import Choice
from allfuse.base.errors import PlanError
from allfuse.rule.sift import Sift, Stretch

if TYPE_CHECKING:
    from torch import Tensor

EACH = 8
"""Numbers of 32 bits that one counter of Philox gives."""


@dataclass(frozen=True)
class Chance(Sift):
    """Keeps each number with probability `density` + `tilt` * r, r from -1 for the smallest
    magnitude of its row to 1 for the largest.

    What is drawn follows from the key of the tensor and the number's place in it (Philox4x64-10,
    Salmon et al. 2011, doi:10.1145/2063384.2063405), so blocks and threads change nothing.

    Args:
        scale: what is kept is multiplied so that the L1 norm of the tensor is as before ("norm"),
            by one over the probability ("density"), or not.
    """

    density: float
    tilt: float = 0.0
    scale: str = "norm"

    @property
    def turns(self) -> int:
        return 1 if self.scale == "norm" else 0

    def measure(self, turn: int, stretch: Stretch, found: Sequence[Tensor]) -> Tensor:
        import torch

        size = stretch.values.abs().double()
        return torch.stack([size.sum(), (size * self._keeps(stretch)).sum()])

    def apply(self, stretch: Stretch, found: Sequence[Tensor]) -> Tensor:
        values = stretch.values.mul_(self._keeps(stretch))
        if self.scale == "density":
            return values.div_(self._chances(stretch))
        if self.scale == "norm":
            before, after = found[0].tolist()
            return values.mul_(before / after if after > 0 else 1.0)
        return values

    def _chances(self, stretch: Stretch) -> Tensor | float:
        """The probability of each to be kept."""
        if not self.tilt:
            return self.density
        rows = stretch.values.abs().view(-1, stretch.row)
        ranks = rows.argsort(dim=1, stable=True).argsort(dim=1).to(rows.dtype)
        chances = self.density - self.tilt + 2 * self.tilt * ranks / max(stretch.row - 1, 1)
        return chances.clamp(0.0, 1.0).view(-1)

    def _keeps(self, stretch: Stretch) -> Tensor:
        chances = self._chances(stretch)
        return _uniform(stretch.key, stretch.begin, len(stretch.values)) < chances


def _uniform(key: int, begin: int, count: int) -> Tensor:
    """Numbers from 0 to below 1 for those from place `begin` of a tensor, float64 (count,)."""
    import numpy as np
    import torch

    first, skipped = divmod(begin, EACH)
    drawn = -(-(skipped + count) // EACH) * EACH // 2
    raw = np.random.Philox(key=key, counter=first).random_raw(drawn)
    halves = raw.view(np.uint32)[skipped : skipped + count]
    return torch.from_numpy(halves * 2.0**-32)


PRESETS = {"mergekit": "norm", "paper": "density", "peft": "density"}
"""How what was dropped is made up for."""


def drop(density: float, preset: str, tilt: float = 0.0) -> Chance | None:
    """What keeps each change with that probability; None: all."""
    if density == 1 and not tilt:
        return None
    return Chance(density, tilt, PRESETS[preset])


def check_preset(rule: Choice, preset: str) -> None:
    """Refuse a preset that is none. Raises PlanError."""
    if preset not in PRESETS:
        raise PlanError(
            f"{rule.name}(preset={preset!r})", "there is no such preset", allowed=", ".join(PRESETS)
        )


def check_tilt(rule: Choice, density: float, tilt: float) -> None:
    """Refuse probabilities beyond 0 and 1. Raises PlanError."""
    if not (density - tilt > 0 and density + tilt <= 1 and tilt >= 0):
        raise PlanError(
            str(rule),
            f"probabilities to be kept go from density - epsilon to density + epsilon, "
            f"{density - tilt:g} to {density + tilt:g}; they lie between 0 and 1",
            f"{rule.name}(density={max(min(density, 1 - tilt), tilt + 0.05):g})",
        )
