"""L1: fewer bytes, with a declared error."""

from __future__ import annotations

from allfuse.codec.base import Codec
from allfuse.codec.identity import Identity

CODECS: dict[str, type[Codec]] = {"identity": Identity}

__all__ = ["CODECS", "Codec", "Identity"]
