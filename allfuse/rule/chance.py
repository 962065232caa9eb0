"""Drops numbers of a tensor at random, and makes up for what was dropped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from allfuse.base.choice import Choice
from allfuse.base.errors import PlanError
from allfuse.rule.sift import Sift, Stretch

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


@dataclass(frozen=True)
class Chance(Sift):
    """Keeps each number with probability `density` + `tilt` * r, r from -1 for the smallest
    magnitude of its row to 1 for the largest.

    What is drawn follows from the key of the tensor and the number's place in it, 32 bits for each
    (PCG64 with the DXSM output, O'Neill 2014, HMC-CS-2014-0905, which can jump to any place), so
    blocks and threads change nothing.

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

        sizes = stretch.values.abs()
        before = _add_up(sizes)
        return torch.stack([before, _add_up(sizes.mul_(self._keeps(stretch)))])

    def apply(self, stretch: Stretch, found: Sequence[Tensor]) -> Tensor:
        values, limits = stretch.values, self._limits(stretch)
        values.mul_(_draws_at_most(stretch, limits))
        if self.scale == "density":
            return values.div_(_chances(limits))
        if self.scale == "norm":
            before, after = found[0].tolist()
            return values.mul_(before / after if after > 0 else 1.0)
        return values

    def _keeps(self, stretch: Stretch) -> Tensor:
        return _draws_at_most(stretch, self._limits(stretch))

    def _limits(self, stretch: Stretch) -> np.ndarray:
        """The largest of the 2 ** 32 equally likely draws at which each number is kept, uint32
        (k,); one for all (1,) where it is the same."""
        import numpy as np

        if not self.tilt:
            return _limits_of(np.array([self.density]))
        row = stretch.row
        ranks = np.arange(row) / max(row - 1, 1)
        table = _limits_of(np.clip(self.density - self.tilt + 2 * self.tilt * ranks, 0.0, 1.0))
        places = _order_rows(stretch.values.numpy(), row)
        limits = np.empty(places.shape, dtype=np.uint32)
        np.put_along_axis(limits, places, table[None], axis=1)
        return limits.reshape(-1)


def _add_up(values: Tensor) -> Tensor:
    """The sum, float64 ()."""
    total = values.sum().double()
    return total if total.isfinite() else values.double().sum()


def _limits_of(chances: np.ndarray) -> np.ndarray:
    import numpy as np

    return (np.clip(np.rint(chances * 2.0**32), 1, 2.0**32) - 1).astype(np.uint32)


def _chances(limits: np.ndarray) -> Tensor:
    """The probability of each to be kept, float32."""
    import torch

    return torch.from_numpy(((limits + 1.0) * 2.0**-32).astype("float32"))


def _order_rows(values: np.ndarray, row: int) -> np.ndarray:
    """The places in each row from the smallest magnitude to the largest, int64 (rows, row).

    Magnitude and place are one number in what is sorted, which is faster than sorting places, and
    has equal ones stand in the order of their places.
    """
    import numpy as np

    bits = values.view(np.int32) & 0x7FFFFFFF
    keys = bits.astype(np.int64).reshape(-1, row) << 32
    keys |= np.arange(row)
    keys.sort(axis=1)
    keys &= 0xFFFFFFFF
    return keys


def _draws_at_most(stretch: Stretch, limits: np.ndarray) -> Tensor:
    """For each number 1 where what is drawn for it is not above its limit, else 0: float32 (k,)."""
    import numpy as np
    import torch

    first, skipped = divmod(stretch.begin, 2)
    bits = np.random.PCG64DXSM(stretch.key)
    bits.advance(first)
    draws = -(-(skipped + len(stretch.values)) // 2)
    drawn = np.random.Generator(bits).integers(0, 2**64 - 1, draws, np.uint64, endpoint=True)
    own = drawn.view(np.uint32)[skipped : skipped + len(stretch.values)]
    return torch.from_numpy((own <= limits).view(np.uint8)).float()  # bool takes six times as long


PRESETS = {"mergekit": "norm", "paper": "density", "peft": "density"}
"""How what was dropped is made up for."""


def drop(density: float, preset: str, tilt: float = 0.0) -> Chance | None:
    """What keeps each change with that probability; None: all, at density 1."""
    if density == 1:
        return None
    return Chance(density, tilt, PRESETS[preset])


def check_preset(rule: Choice, preset: str) -> None:
    """Refuse a preset that is none. Raises PlanError."""
    if preset not in PRESETS:
        raise PlanError(
            f"{rule.name}(preset={preset!r})", "there is no such preset", allowed=", ".join(PRESETS)
        )


def check_tilt(rule: Choice, density: float, tilt: float) -> None:
    """Refuse probabilities beyond 0 and 1; at density 1 all is kept. Raises PlanError."""
    if density != 1 and not (density - tilt > 0 and density + tilt <= 1 and tilt >= 0):
        raise PlanError(
            str(rule),
            f"probabilities to be kept go from density - epsilon to density + epsilon, "
            f"{density - tilt:g} to {density + tilt:g}; they lie between 0 and 1, or density is 1",
            f"{rule.name}(density={max(min(density, 1 - tilt), tilt + 0.05):g})",
        )
