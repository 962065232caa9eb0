"""Fewer bytes, with a declared error."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from allfuse.base.choice import Choice


@dataclass(frozen=True)
class Codec(Choice, ABC):
    """How values are encoded for the way. `lossless` says that decoding gives every bit back."""

    lossless: ClassVar[bool]

    @abstractmethod
    def encoded_bytes(self, elements: int, element_bytes: int) -> int:
        """Bytes of `elements` values on the way."""
