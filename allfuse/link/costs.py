"""What moving bytes costs on the links of a layout: the constants of a clock."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Path:
    """What a message costs on one class of ways: within a host, or between hosts.

    With alpha and beta as in Hockney 1994, and the gap of LogP (Culler et al. 1993).

    alpha_s: until a lone message of no size has come, from when both sides are ready for it.
    gap_s: what each message of one peer, sent or received, keeps it busy.
    beta_s_per_byte: of one transfer alone.
    shared_s_per_byte: of all transfers together that leave a host, or reach one, where there are
        several at once; within a host of all that its peers send each other. Both directions
        between hosts are apart.
    """

    alpha_s: float
    gap_s: float
    beta_s_per_byte: float
    shared_s_per_byte: float


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What moving and adding up costs where some peers share hosts.

    inside, between: of messages within a host and between hosts. gamma_s_per_byte: of adding what
    arrived to what is there, for each byte that arrived.

    >>> path = Path(alpha_s=1e-4, gap_s=1e-5, beta_s_per_byte=1e-9, shared_s_per_byte=1e-9)
    >>> costs = Costs(inside=path, between=path, gamma_s_per_byte=1e-10)
    >>> Costs.from_numbers(costs.numbers()) == costs
    True
    """

    inside: Path
    between: Path
    gamma_s_per_byte: float

    def numbers(self) -> list[float]:
        """All constants in one order, to be sent or kept."""
        paths = (self.inside, self.between)
        return [*(value for path in paths for value in vars(path).values()), self.gamma_s_per_byte]

    @classmethod
    def from_numbers(cls, numbers: Sequence[float]) -> Costs:
        """The inverse of `numbers`.

        Raises:
            ValueError: they are not as many, or one cannot be a cost.
        """
        if len(numbers) != NUMBERS:
            raise ValueError(f"{len(numbers)} numbers; allowed: {NUMBERS}")
        for number in numbers:
            if isinstance(number, bool) or not isinstance(number, int | float):
                raise ValueError(f"{number!r} is no number")
            if not 0 <= number <= sys.float_info.max:
                raise ValueError(f"{number} cannot be a cost")
        names = Path.__dataclass_fields__
        inside, between = (
            Path(**dict(zip(names, map(float, part), strict=True)))
            for part in (numbers[:4], numbers[4:8])
        )
        return cls(inside=inside, between=between, gamma_s_per_byte=float(numbers[8]))


NUMBERS = 9
