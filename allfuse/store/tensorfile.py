"""Tensors in standard safetensors files, written so that training in another thread goes on.

The files are written here and read by the `safetensors` library. `safetensors.torch.save_file`
holds the interpreter lock while it copies bytes, which stalls the thread that trains;
`file.write(memoryview)`, the digest and the sync to disk all release it.

A file is 8 bytes of header length (little end first), a JSON header padded with spaces to 8 bytes,
and the tensors' bytes end to end, as https://huggingface.co/docs/safetensors describes. Numbers
are written as this machine holds them, so it must hold them little end first, as all do that
torch is built for.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from allfuse.base.errors import CheckpointError
from allfuse.base.tensors import tensor_bytes
from allfuse.store.durable import explain, partial_path, replace_file

NAMES: dict[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""The types that a file can hold, under their names in its header."""
DTYPES = {name: dtype for dtype, name in NAMES.items()}

ALIKE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""A type of the same size that NumPy has too, by bytes, to move values as they are."""

CHUNK_BYTES = 4 << 20
DAMAGED = "use an earlier checkpoint, or copy the file again from where it is whole"


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """What was written: the file's name, its size, and a digest of all its bytes."""

    name: str
    bytes: int
    digest: str


def write_tensors(
    path: Path,
    tensors: dict[str, Tensor],
    metadata: Mapping[str, str],
    *,
    takes: bool = False,
    fill: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> FileRecord:
    """Write a safetensors file and return when it is on the disk.

    takes: each tensor is taken out of the dict as it is written, so that others may have its
    memory then. fill: gives, when it is written, the values of a tensor that only stands for them,
    of the same type and shape.

    Tensors may be on any device, of any strides, 0-d or empty; ones that share memory are written
    each by value. Larger types come first, so that every tensor is aligned to its type.

    The digest is zlib.crc32, for it finds damage and need not resist an attacker: 100 MB in 34 ms
    against 56 ms for hashlib.sha256 (seen on a 2-core AMD EPYC with SHA instructions, chunks of
    4 MB, best of 5; without such instructions sha256 is several times slower still).

    Raises:
        CheckpointError: a tensor is of a type that the format lacks (before anything is written),
            or the file cannot be written (what there is of it then is not whole).
    """
    names = sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)
    header = _header(((name, tensors[name]) for name in names), metadata)
    get = tensors.pop if takes else tensors.__getitem__
    try:
        with open(path, "wb") as file:
            size, crc = _stream(file, header, (fill(get(name)) for name in names))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise CheckpointError(explain(error, path)) from error
    return FileRecord(name=path.name, bytes=size, digest=_format_digest(crc))


def read_tensors(
    path: Path,
    names: Iterable[str] | None = None,
    record: FileRecord | None = None,
    *,
    mapped: bool = False,
) -> dict[str, Tensor]:
    """The tensors of a safetensors file by name, on the CPU, in memory of their own.

    Args:
        names: which to read; None reads all.
        record: what was written; the file is checked against it first.
        mapped: they stay in the file, of which only those bytes are read that are looked at. For
            those who take what they need at once, and change nothing.

    Raises:
        CheckpointError: the file is missing, damaged, no safetensors file, or lacks a name.
    """
    if record is not None:
        check_file(path, record)
    with _opened(path) as file:
        present = set(file.keys())
        wanted = sorted(present) if names is None else list(names)
        absent = [name for name in wanted if name not in present]
        if absent:
            raise CheckpointError(f"{path} holds no tensor named {absent[0]!r}; {DAMAGED}")
        # The library maps the file; a copy does not depend on the file any more.
        found = {name: file.get_tensor(name) for name in wanted}
        return found if mapped else {name: tensor.clone() for name, tensor in found.items()}


def read_metadata(path: Path) -> dict[str, str]:
    """The texts in a safetensors file's header.

    Raises:
        CheckpointError: the file is missing, damaged or no safetensors file.
    """
    with _opened(path) as file:
        return dict(file.metadata() or {})


def describe_tensors(path: Path) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """The type and shape of each tensor of a safetensors file, by name.

    Raises:
        CheckpointError: the file is missing, damaged, no safetensors file, or holds a type that
            is never written.
    """
    with _opened(path) as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  no mapping
        try:
            return {n: (DTYPES[s.get_dtype()], tuple(s.get_shape())) for n, s in slices.items()}
        except KeyError as error:
            raise CheckpointError(f"{path} holds tensors of type {error}; {DAMAGED}") from error


def check_file(path: Path, record: FileRecord) -> None:
    """Compare a file with what was written, every byte.

    Raises:
        CheckpointError: the file is missing, shorter, longer or changed.
    """
    try:
        size = path.stat().st_size
        if size != record.bytes:
            raise CheckpointError(
                f"{path} is damaged: it has {size} bytes, {record.bytes} were written; {DAMAGED}"
            )
        crc, chunk = 0, memoryview(bytearray(CHUNK_BYTES))
        with open(path, "rb", buffering=0) as file:
            while count := file.readinto(chunk):
                crc = zlib.crc32(chunk[:count], crc)
    except OSError as error:
        said = error.strerror or str(error)
        raise CheckpointError(f"cannot read {path}: {said}; {DAMAGED}") from error
    if _format_digest(crc) != record.digest:
        raise CheckpointError(
            f"{path} is damaged: its bytes give {_format_digest(crc)}, "
            f"{record.digest} was written; {DAMAGED}"
        )


def write_model(
    path: Path,
    state_dict: Mapping[str, Any],
    fill: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> FileRecord:
    """Write a plain model's weights, so that a crash leaves the old file or the new one.

    fill: as for `write_tensors`, which asks for larger types first, and in the order of names.

    Of tensors that are one (tied weights) the first name in alphabetical order is kept, and the
    metadata says `{other name: kept name}`, as `safetensors.torch.save_model` does.

    Raises:
        CheckpointError: an entry is no tensor or of a type that the format lacks, or the file
            cannot be written; `path` stays what it was.
    """
    kept: dict[Any, str] = {}
    metadata = {"format": "pt"}
    tensors: dict[str, Tensor] = {}
    for name in sorted(state_dict):
        tensor = state_dict[name]
        if not isinstance(tensor, Tensor):
            raise CheckpointError(
                f"{name!r} of the model is a {type(tensor).__name__}; a model file holds tensors "
                "only: make it a buffer, or leave it out of the state dict"
            )
        place = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        first = kept.setdefault(place, name) if tensor.numel() else name
        if first == name:
            tensors[name] = tensor
        else:
            metadata[name] = first
    partial = partial_path(path)
    try:
        record = write_tensors(partial, tensors, metadata, fill=fill)
        replace_file(partial, path)
    except (OSError, CheckpointError) as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise CheckpointError(explain(error, path)) from error
        raise
    return FileRecord(name=path.name, bytes=record.bytes, digest=record.digest)


def read_model(path: Path) -> dict[str, Tensor]:
    """A model's state dict, under all its names; tied names hold the same tensor.

    Raises:
        CheckpointError: as `read_tensors`.
    """
    tensors = read_tensors(path)
    for name, kept in read_metadata(path).items():
        if name != "format" and name not in tensors and kept in tensors:
            tensors[name] = tensors[kept]
    return tensors


def _header(ordered: Iterable[tuple[str, Tensor]], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, tensor in ordered:
        if name == "__metadata__":
            raise CheckpointError("no tensor can be named '__metadata__' in a safetensors file")
        if tensor.dtype not in NAMES or tensor.layout != torch.strided or tensor.is_meta:
            raise CheckpointError(
                f"tensor {name!r} ({tensor.dtype}, {tensor.layout}, on {tensor.device}) cannot be "
                f"written to a safetensors file, which holds dense tensors of "
                f"{', '.join(str(dtype).removeprefix('torch.') for dtype in NAMES)}; "
                "convert it first"
            )
        start, end = end, end + tensor.numel() * tensor.dtype.itemsize
        entries[name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)


def _stream(file: BinaryIO, header: bytes, tensors: Iterable[Tensor]) -> tuple[int, int]:
    """Write the length, the header and the tensors; the number of bytes and their crc."""
    start = len(header).to_bytes(8, "little") + header
    file.write(start)
    size, crc = len(start), zlib.crc32(start)
    for tensor in tensors:
        plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
        data = tensor_bytes(plain)
        size += len(data)
        for begin in range(0, len(data), CHUNK_BYTES):
            chunk = data[begin : begin + CHUNK_BYTES]
            file.write(chunk)
            crc = zlib.crc32(chunk, crc)
    return size, crc


def _format_digest(crc: int) -> str:
    return f"crc32:{crc:08x}"


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{path} cannot be read as a safetensors file: {error}; {DAMAGED}"
        ) from error
