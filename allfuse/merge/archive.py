"""Where the numbers of tensors lie in files that torch.save wrote, old and new. Loads no torch.

New files are zip archives without compression: a pickle of everything, which names for each tensor
a storage, its offset, sizes and strides, and a file `data/KEY` with the bytes of each storage. Old
ones (before torch 1.6) are pickles end to end, and after them the storages, each after the number
of its items. So a tensor is bytes at a known place in both (torch/serialization.py).
"""

from __future__ import annotations

import io
import os
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from allfuse.base.errors import MergeError
from allfuse.merge.entries import placed
from allfuse.merge.header import ITEM_BYTES, Entry
from allfuse.merge.pickled import damaged, unpickle
from allfuse.merge.stored import KNOWN, TYPES, Storage, View, keep_storages

MAGIC = 0x1950A86A20F9469CFC6C
PROTOCOL = 1001
MOST_PICKLE_BYTES = 1 << 30
UTF_8 = 0x800  # the flag of a zip archive's name that is written so


@dataclass(frozen=True)
class Archive:
    """What a file holds.

    Attributes:
        content: dicts, lists and plain values, with `View` for tensors.
        places: where the bytes of each storage begin, from the start of the file, and how many
            there are.
    """

    path: Path
    content: Any
    places: dict[str, tuple[int, int]]

    def entry(self, name: str, view: View) -> Entry:
        """A tensor of it under a name.

        Raises:
            MergeError: it lies outside its storage, or its type cannot be in a safetensors file.
        """
        code = view.kind.code
        if code is None:
            raise MergeError(
                f"{self.path}: {name} is of torch.{view.kind.name}, which safetensors files do not "
                f"hold; allowed: {', '.join(TYPES)}"
            )
        if view.storage.key not in self.places:
            raise damaged(self.path, f"the bytes of {name} are missing")
        begin, length = self.places[view.storage.key]
        item = ITEM_BYTES[code]
        last = sum((size - 1) * step for size, step in zip(view.shape, view.strides, strict=True))
        if 0 not in view.shape and (view.offset + last + 1) * item > length:
            raise damaged(self.path, f"{name} {list(view.shape)} ends outside its storage")
        return placed(name, code, view.shape, self.path, begin + view.offset * item, view.strides)


class Window(io.RawIOBase):
    """A part of a file as a file of its own."""

    def __init__(self, file: BinaryIO, begin: int, length: int) -> None:
        self._file, self._begin, self._length, self._at = file, begin, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        if start + offset < 0:
            raise ValueError("a place before the file's start")
        self._at = start + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        left = max(self._length - self._at, 0)
        wanted = left if size is None or size < 0 else min(size, left)
        self._file.seek(self._begin + self._at)
        found = self._file.read(wanted)
        self._at += len(found)
        return found


def read_file(path: Path) -> Archive:
    """What a file that torch.save wrote holds, in whichever format.

    Raises:
        MergeError: it cannot be read, is damaged, or holds what only code can read.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(4)
            file.seek(0)
            if start[:2] == b"PK":
                return read_archive(file, path, 0, size)
            if start[:1] == b"\x80":
                return _read_old(file, path, size)
    except OSError as error:
        raise MergeError(f"{path} cannot be read: {error.strerror or error}") from error
    raise damaged(path, "it begins neither as a zip archive nor as a pickle")


def read_archive(file: BinaryIO, path: Path, begin: int, length: int) -> Archive:
    """What a zip archive of torch.save holds that is a part of a file, or all of it.

    Raises:
        MergeError: it is damaged, or holds what only code can read.
    """
    window = Window(file, begin, length)
    try:
        with zipfile.ZipFile(window) as archive:
            files = {info.filename: info for info in archive.infolist()}
            pickles = [name for name in files if name.endswith("/data.pkl")]
            if len(pickles) != 1:
                raise damaged(path, f"{len(pickles)} data.pkl in it; allowed: 1")
            top = pickles[0].removesuffix("data.pkl")
            if any(name.startswith((f"{top}code/", f"{top}constants.pkl")) for name in files):
                raise MergeError(
                    f"{path} is a TorchScript program, which is never run; next: save the "
                    "state_dict() of what torch.jit.load gives"
                )
            about = files[pickles[0]]
            if about.file_size > min(length, MOST_PICKLE_BYTES):
                raise damaged(path, f"its data.pkl would have {about.file_size:,} bytes")
            order = f"{top}byteorder"
            if order in files and archive.read(order) != b"little":
                raise MergeError(f"{path} has its numbers big end first; allowed: little end first")
            content = archive.read(pickles[0])
    except (MergeError, OSError):
        raise
    except Exception as error:  # whatever damaged bytes lead to
        raise damaged(path, f"it is cut off, or no zip archive ({error})") from error
    storages: dict[str, Storage] = {}
    found = unpickle(io.BytesIO(content), path, KNOWN, keep_storages(storages))
    places = {}
    for key, storage in storages.items():
        info = files.get(f"{top}data/{key}")
        if info is not None:
            places[key] = _place(window, path, begin, length, info, storage)
    return Archive(path, found, places)


def _place(
    window: Window, path: Path, begin: int, length: int, info: zipfile.ZipInfo, storage: Storage
) -> tuple[int, int]:
    """Where a storage's bytes lie in the file, by the local header before them."""
    window.seek(info.header_offset)
    head = window.read(30)
    if len(head) < 30 or head[:4] != b"PK\x03\x04" or info.compress_type != zipfile.ZIP_STORED:
        raise damaged(path, f"{info.filename} in it is compressed or not where it should be")
    name, extra = int.from_bytes(head[26:28], "little"), int.from_bytes(head[28:30], "little")
    code = "utf-8" if info.flag_bits & UTF_8 else "cp437"
    if window.read(name).decode(code, errors="replace") != info.orig_filename:
        raise damaged(path, f"{info.filename} in it has another name where it lies")
    start = info.header_offset + 30 + name + extra
    if start + info.file_size > length or info.file_size != info.compress_size:
        raise damaged(path, f"{info.filename} ends outside the file")
    if storage.kind.code and storage.count * ITEM_BYTES[storage.kind.code] != info.file_size:
        raise damaged(
            path,
            f"{info.filename} has {info.file_size:,} bytes, not {storage.count:,} "
            f"of {storage.kind.name}",
        )
    return begin + start, info.file_size


def _read_old(file: BinaryIO, path: Path, size: int) -> Archive:
    """What a file holds in the format before zip archives."""
    if unpickle(file, path, {}) != MAGIC or unpickle(file, path, {}) != PROTOCOL:
        raise damaged(path, "it is a pickle, and not one that torch.save wrote")
    system = unpickle(file, path, {})
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise MergeError(f"{path} has its numbers big end first; allowed: little end first")
    storages: dict[str, Storage] = {}
    found = unpickle(file, path, KNOWN, keep_storages(storages))
    keys = unpickle(file, path, {})
    if not isinstance(keys, list) or {str(key) for key in keys} != storages.keys():
        raise damaged(path, "its list of storages is another one than its tensors have")
    places, begin = {}, file.tell()
    for key in map(str, keys):
        kind = storages[key].kind
        if kind.code is None:
            raise MergeError(f"{path} holds a {kind.name}, which safetensors files do not hold")
        file.seek(begin)
        count = int.from_bytes(file.read(8), "little", signed=True)
        length = count * ITEM_BYTES[kind.code]
        if count != storages[key].count or begin + 8 + length > size:
            raise damaged(path, f"the storage {key} of {count:,} numbers ends outside the file")
        places[key] = (begin + 8, length)
        begin += 8 + length
    return Archive(path, found, places)
