"""A letter: a typed message with plain fields and tensors, and its form on the wire.

The first frame is a header in msgpack, {version, kind, fields, tensors: [[type, shape], ...]}; then
comes one frame for each tensor that is not empty: its elements in row-major order, little-endian.
"""

from __future__ import annotations

import ctypes
import math
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
    return tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()


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
    kind, fields, shapes = _read_header(frames[0])
    tensors, following = [], iter(frames[1:])
    for code, shape in shapes:
        empty = 0 in shape
        frame = b"" if empty else next(following, None)
        if frame is None:
            raise Malformed(f"fewer frames than the {len(shapes)} tensors of its header")
        tensors.append(_tensor(DTYPES[code], shape, frame))
    if next(following, None) is not None:
        raise Malformed(f"more frames than the {len(shapes)} tensors of its header")
    return Letter(kind, fields, tuple(tensors))


def _read_header(
    data: bytes | memoryview,
) -> tuple[str, dict[str, Any], list[tuple[int, list[int]]]]:
    """Kind, fields, and the type and shape of each tensor."""
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
    return kind, fields, [_shape(each) for each in listed]


def _check_plain(value: object, depth: int) -> None:
    if isinstance(value, dict | list):
        if depth == 0:
            raise Malformed(f"fields more than {MOST_DEPTH} deep")
        inner: Any = value
        if isinstance(value, dict):
            if not all(isinstance(key, str) for key in value):
                raise Malformed("fields with keys that are not text")
            inner = value.values()
        for each in inner:
            _check_plain(each, depth - 1)
    elif value is not None and not isinstance(value, bool | int | float | str | bytes):
        raise Malformed(f"fields that hold a {type(value).__name__}")


def _shape(entry: object) -> tuple[int, list[int]]:
    """The type and shape of a tensor whose bytes a letter can hold."""
    if not isinstance(entry, list) or len(entry) != 2 or not isinstance(entry[1], list):
        raise Malformed("a tensor that is not described by its type and shape")
    code, shape = entry
    if not all(isinstance(size, int) and not isinstance(size, bool) for size in (code, *shape)):
        raise Malformed("a tensor whose type or shape is not made of whole numbers")
    if not 0 <= code < len(DTYPES) or len(shape) > MOST_DIMS:
        raise Malformed(f"a tensor of type {code} with {len(shape)} dims")
    if any(size < 0 for size in shape):
        raise Malformed("a tensor of a negative size")
    if math.prod(size for size in shape if size) * DTYPES[code].itemsize > MOST_BYTES:
        raise Oversized(f"a tensor of shape {shape[:8]}; allowed: {MOST_BYTES} bytes")
    return code, shape


def _tensor(dtype: torch.dtype, shape: list[int], frame: bytes | memoryview) -> Tensor:
    expected = math.prod(shape) * dtype.itemsize
    if len(frame) != expected:
        raise Malformed(f"{len(frame)} bytes for a tensor of {expected}")
    if not expected:
        return torch.empty(shape, dtype=dtype)
    view = memoryview(frame)
    address = 0 if view.readonly else ctypes.addressof(ctypes.c_char.from_buffer(view))
    if expected < OWN_BYTES or view.readonly or address % dtype.itemsize:
        view = memoryview(bytearray(view))
    flat = torch.frombuffer(view, dtype=torch.uint8)
    if dtype == torch.bool and int(flat.max()) > 1:
        raise Malformed("a tensor of truth values that holds others")
    return flat.view(dtype).view(shape)
