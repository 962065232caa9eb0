"""L1: fewer bytes, with a declared error."""

from __future__ import annotations

from allfuse.codec.base import Codec, LossyCodec, MessageCodec, SumCodec
from allfuse.codec.bf16 import Bf16
from allfuse.codec.fp16 import Fp16
from allfuse.codec.identity import Identity
from allfuse.codec.int4 import Int4
from allfuse.codec.int8 import Int8
from allfuse.codec.lowrank import LowRank
from allfuse.codec.randomk import RandomK
from allfuse.codec.sign import Sign
from allfuse.codec.topk import TopK

CODECS: dict[str, type[Codec]] = {
    "identity": Identity,
    "bf16": Bf16,
    "fp16": Fp16,
    "int8": Int8,
    "int4": Int4,
    "topk": TopK,
    "randomk": RandomK,
    "lowrank": LowRank,
    "sign": Sign,
}

__all__ = ["CODECS", "Codec", "Identity", "LossyCodec", "MessageCodec", "SumCodec"]
