"""A letter: a typed message with plain fields and tensors, and its form on the wire."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Letter:
    """What travels between a desk and its callers.

    Args:
        kind: what it is for.
        fields: plain values by name: None, bool, int of 64 bits, float, str, bytes, and lists and
            dicts with text for keys of them. A tuple arrives as a list.
        tensors: of any shape, of the types in `frame.DTYPES`. They arrive on the CPU, contiguous.
    """

    kind: str
    fields: dict[str, Any] = field(default_factory=dict)
    tensors: tuple[Tensor, ...] = ()
