"""Reads blocks of tensors from files, and writes them at their places."""

from __future__ import annotations

import os
import threading
import zlib
from pathlib import Path

import torch
from torch import Tensor

from allfuse.base.errors import MergeError
from allfuse.base.tensors import tensor_bytes
from allfuse.merge.header import ITEM_BYTES, Entry
from allfuse.merge.reading import KINDS
from allfuse.store.tensorfile import DTYPES


class Files:
    """Files that are read and written at any place by several threads, each opened once."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self._lock = threading.Lock()
        self._open: dict[Path, int] = {}

    def descriptor(self, file: Path) -> int:
        """Of an open file, which is closed with all others."""
        with self._lock:
            if file not in self._open:
                path = file if self.folder is None else self.folder / file
                flags = os.O_RDONLY if self.folder is None else os.O_RDWR
                self._open[file] = os.open(path, flags | os.O_CLOEXEC)
            return self._open[file]

    def read(self, entry: Entry, begin: int, count: int) -> Tensor:
        """Numbers [begin, begin + count) of a flattened tensor, (count,), in memory of their own.

        They are of the entry's type, or in float32 where they are computed.

        Raises:
            MergeError: the file has become shorter, or cannot be read.
        """
        read = KINDS.get(type(entry))
        if read is not None:
            return read(self, entry, begin, count)
        item = ITEM_BYTES[entry.dtype]
        raw = torch.empty(count * item, dtype=torch.uint8)
        rest, place = tensor_bytes(raw), entry.begin + begin * item
        descriptor = self.descriptor(entry.file)
        while rest:
            try:
                got = os.preadv(descriptor, [rest], place)
            except OSError as error:
                raise MergeError(f"{entry.file} cannot be read: {error.strerror}") from error
            if not got:
                raise MergeError(f"{entry.file} ends within {entry.name}; it was changed meanwhile")
            rest, place = rest[got:], place + got
        return raw.view(DTYPES[entry.dtype])

    def write(self, entry: Entry, begin: int, values: Tensor) -> int:
        """Put numbers at their place; the crc of their bytes."""
        data = tensor_bytes(values)
        rest, place = data, entry.begin + begin * ITEM_BYTES[entry.dtype]
        descriptor = self.descriptor(entry.file)
        while rest:
            done = os.pwrite(descriptor, rest, place)
            rest, place = rest[done:], place + done
        return zlib.crc32(data)

    def sync(self) -> None:
        """Return when all is on the disk."""
        for descriptor in self._open.values():
            os.fsync(descriptor)

    def close(self) -> None:
        with self._lock:
            while self._open:
                os.close(self._open.popitem()[1])
