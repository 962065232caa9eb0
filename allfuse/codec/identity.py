"""Values as they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from allfuse.codec.base import Codec


@dataclass(frozen=True)
class Identity(Codec):
    """No encoding: exact, all bytes."""

    name: ClassVar[str] = "identity"
    lossless: ClassVar[bool] = True

    def encoded_bytes(self, elements: int, element_bytes: int) -> int:
        return elements * element_bytes
