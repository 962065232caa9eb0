"""What is to be fused how: models, weights, a rule, and in what type it is written."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from allfuse.base.errors import MergeError
from allfuse.merge.header import FLOATS
from allfuse.rule import Rule


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What is to be fused how.

    Attributes:
        models: where they are. weights: of each, in that order.
        base: what their changes are counted from, for rules of changes.
        dtype: of the floating-point tensors that are written, by a name of safetensors; None: that
            of the base, or of the first model.
        seed: of what a rule draws at random.
        allow_nan: whether a source may hold numbers that are not finite.

    Raises:
        MergeError: the rule has no meaning for these models.
    """

    models: Sequence[Path]
    rule: Rule
    weights: Sequence[float]
    base: Path | None = None
    dtype: str | None = None
    seed: int = 0
    allow_nan: bool = False

    def __post_init__(self) -> None:
        n, name = len(self.models), self.rule.name
        if self.rule.models not in (None, n):
            raise MergeError(f"{name} fuses {self.rule.models} models, received {n}")
        if len(self.weights) != n:
            raise MergeError(f"{len(self.weights)} weights for {n} models; allowed: one for each")
        if self.rule.of_changes and self.base is None:
            raise MergeError(
                f"{name} fuses what models learned since a base, and there is none; next: --base"
            )
        if self.base is not None and not (self.rule.of_changes or self.rule.base_optional):
            raise MergeError(
                f"{name} fuses models as they are, and would not look at the base {self.base}; "
                "next: leave it out, or name it among the models"
            )
        if self.dtype is not None and self.dtype not in FLOATS:
            raise MergeError(f"dtype {self.dtype}; allowed: {', '.join(FLOATS)}")

    @property
    def first(self) -> Path:
        """Whose names, types and other files are carried over."""
        return self.models[0] if self.base is None else self.base

    def key(self, tensor: str, model: int) -> int:
        """128 bits for what is drawn at random for one tensor of one model."""
        text = f"{self.seed}/{model}/{tensor}".encode()
        return int.from_bytes(hashlib.blake2b(text, digest_size=16).digest(), "little")
