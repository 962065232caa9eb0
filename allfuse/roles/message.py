"""What is said: one dataclass for each message, whose fields are plain values."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar

from torch import Tensor

from allfuse.link.post import Letter


@dataclass(frozen=True, kw_only=True)
class Message:
    """Base of all. `tensors` travel as raw bytes."""

    kind: ClassVar[str]
    tensors: tuple[Tensor, ...] = ()

    def letter(self) -> Letter:
        names = [spec.name for spec in fields(self) if spec.name != "tensors"]
        return Letter(self.kind, {name: getattr(self, name) for name in names}, self.tensors)
