"""Values as they are."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import ClassVar

from allfuse.codec.base import Codec, Error, Shapes


@dataclass(frozen=True)
class Identity(Codec):
    """No encoding: exact, all bytes."""

    name: ClassVar[str] = "identity"

    @property
    def error(self) -> Error:
        return "exact"

    def payload_bytes(self, shapes: Shapes, element_bytes: int) -> int:
        return sum(map(prod, shapes)) * element_bytes
