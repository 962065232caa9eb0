"""A letter: a typed message with plain fields and tensors, and its form on the wire.

The first frame is a header in msgpack, {version, kind, fields, tensors: [[type, shape], ...]}; then
comes one frame for each tensor that is not empty: its elements in row-major order, little-endian.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgpack
import torch
from torch import Tensor

from allfuse.base.tensors import tensor_bytes
from allfuse.link.frame import CODES, DTYPES, Malformed

VERSION = 1
MOST_BYTES = 64 << 20  # of a letter
MOST_HEADER_BYTES = 8 << 20  # as objects of Python they take some 50 times as much
MOST_TENSORS = 4096
MOST_DIMS = 64
MOST_DEPTH = 16  # of lists and dicts in one another
OWN_BYTES = 1 << 16  # smaller tensors are copied out of a frame: it may be part of a larger buffer
_PLAIN = (bool, int, float, str, bytes, type(None))
_NAMES = {"version", "kind", "fields", "tensors"}


@dataclass(frozen=True)
class Letter:
    """What travels between a desk and its callers.

    Args:
        kind: what it is for.
        fields: plain values by name: None, bool, int of 64 bits, float, str, bytes, and lists and
            dicts with text for keys of them. A tuple arrives as a list.
        tensors: of any shape, of the types in `frame.DTYPES`. They arrive on the CPU, contiguous.

    >>> unpack(pack(Letter("beat", {"clock": 3}))).fields
    {'clock': 3}
    """

    kind: str
    fields: dict[str, Any] = field(default_factory=dict)
    tensors: tuple[Tensor, ...] = ()


class Oversized(Malformed):
    """More than a letter may hold."""


class OtherVersion(Malformed):
    """A letter of another version of this protocol."""


def pack(letter: Letter) -> list[bytes | memoryview]:
    """Its frames. Those of tensors are their own memory, where that is contiguous and on the CPU.

    Raises:
        ValueError: it cannot travel: a type that is unknown, or more than the receiver takes.
    """
    kept = [_laid_out(tensor) for tensor in letter.tensors]
    about = {
        "version": VERSION,
        "kind": letter.kind,
        "fields": letter.fields,
        "tensors": [[CODES[tensor.dtype], list(tensor.shape)] for tensor in kept],
    }
    try:
        header: bytes = msgpack.packb(about)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise ValueError(
            f"a letter of kind {letter.kind!r} that cannot be packed: {error}"
        ) from None
    total = len(header) + sum(tensor.nbytes for tensor in kept)
    if total > MOST_BYTES or len(header) > MOST_HEADER_BYTES or len(kept) > MOST_TENSORS:
        raise ValueError(
            f"a letter of kind {letter.kind!r} with {total} bytes, {len(header)} of them fields, "
            f"and {len(kept)} tensors; allowed: {MOST_BYTES}, {MOST_HEADER_BYTES} and "
            f"{MOST_TENSORS}; next: send it in pieces"
        )
    return [header, *(tensor_bytes(tensor) for tensor in kept if tensor.numel())]


def _laid_out(tensor: Tensor) -> Tensor:
    """The same elements, contiguous in the memory of the CPU."""
    if tensor.layout != torch.strided or tensor.dtype not in CODES:
        raise ValueError(
            f"a tensor of {tensor.layout} and {tensor.dtype} in a letter; allowed: dense ones of "
            f"{', '.join(str(dtype) for dtype in DTYPES)}"
        )
    if tensor.is_conj() or tensor.is_neg():
        tensor = tensor.resolve_conj().resolve_neg()
    return tensor.cpu().contiguous()


def unpack(frames: Sequence[bytes | memoryview]) -> Letter:
    """The letter in some frames. Its tensors are their memory, unless they are small.

    Raises:
        OtherVersion, Oversized, Malformed: it is not what `pack` makes; says what was received.
    """
    if not frames:
        raise Malformed("a letter without a header")
    total = sum(len(frame) for frame in frames)
    if total > MOST_BYTES or len(frames[0]) > MOST_HEADER_BYTES or len(frames) > MOST_TENSORS + 1:
        raise Oversized(
            f"{len(frames)} frames with {total} bytes, {len(frames[0])} of them a header; allowed: "
            f"{MOST_TENSORS + 1}, {MOST_BYTES} and {MOST_HEADER_BYTES}"
        )
    kind, fields, listed = _read_header(frames[0])
    tensors, place = [], 1
    for entry in listed:
        dtype, shape, amount = _shape(entry)
        if not amount:
            tensors.append(torch.empty(shape, dtype=dtype))
            continue
        if place == len(frames):
            raise Malformed(f"fewer frames than the {len(listed)} tensors of its header")
        tensors.append(_tensor(dtype, shape, amount, frames[place]))
        place += 1
    if place < len(frames):
        raise Malformed(f"more frames than the {len(listed)} tensors of its header")
    return Letter(kind, fields, tuple(tensors))


def _read_header(data: bytes | memoryview) -> tuple[str, dict[str, Any], list[object]]:
    """Kind, fields, and what should be the type and shape of each tensor."""
    try:
        about = msgpack.unpackb(data, strict_map_key=True)
    except Exception as error:  # msgpack raises many kinds, of which no list is promised
        raise Malformed(f"a header that is not msgpack ({type(error).__name__})") from None
    version = about.get("version") if isinstance(about, dict) else None
    if not isinstance(version, int):
        raise Malformed("a header without a version")
    if version != VERSION:
        raise OtherVersion(f"version {version} of a letter; allowed: {VERSION}")
    if set(about) != _NAMES:
        raise Malformed(f"a header with {len(about)} entries; allowed: {', '.join(sorted(_NAMES))}")
    kind, fields, listed = about["kind"], about["fields"], about["tensors"]
    if not isinstance(kind, str) or not isinstance(fields, dict) or not isinstance(listed, list):
        raise Malformed("a header whose kind, fields or tensors are of another type")
    _check_plain(fields, MOST_DEPTH)
    return kind, fields, listed


def _check_plain(value: Any, depth: int) -> None:
    if isinstance(value, _PLAIN):
        return
    if not isinstance(value, dict | list):
        raise Malformed(f"fields that hold a {type(value).__name__}")
    if depth == 0:
        raise Malformed(f"fields more than {MOST_DEPTH} deep")
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise Malformed("fields with keys that are not text")
        value = value.values()
    for each in value:
        _check_plain(each, depth - 1)


def _shape(entry: object) -> tuple[torch.dtype, list[int], int]:
    """The type, shape and bytes of a tensor that a letter can hold."""
    if not isinstance(entry, list) or len(entry) != 2 or not isinstance(entry[1], list):
        raise Malformed("a tensor that is not described by its type and shape")
    code, shape = entry
    if type(code) is not int or not 0 <= code < len(DTYPES) or len(shape) > MOST_DIMS:
        raise Malformed(f"a tensor of type {str(code)[:20]} with {len(shape)} dims")
    dtype, empty = DTYPES[code], False
    amount = dtype.itemsize
    for size in shape:
        if type(size) is not int or size < 0:
            raise Malformed("a tensor of which a size is no whole number from 0 on")
        empty = empty or size == 0
        amount *= size or 1
    if amount > MOST_BYTES:  # also of an empty one: torch multiplies its other sizes
        raise Oversized(f"a tensor of shape {shape[:8]}; allowed: {MOST_BYTES} bytes")
    return dtype, shape, 0 if empty else amount


def _tensor(
    dtype: torch.dtype, shape: list[int], expected: int, frame: bytes | memoryview
) -> Tensor:
    if len(frame) != expected:
        raise Malformed(f"{len(frame)} bytes for a tensor of {expected}")
    shared = expected >= OWN_BYTES and isinstance(frame, memoryview) and not frame.readonly
    flat = torch.frombuffer(frame if shared else bytearray(frame), dtype=torch.uint8)
    if flat.data_ptr() % dtype.itemsize:  # torch may crash on values that are not aligned
        flat = flat.clone()
    if dtype == torch.bool and int(flat.max()) > 1:
        raise Malformed("a tensor of truth values that holds others")
    return flat.view(dtype).view(shape)
