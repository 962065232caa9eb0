"""Where each tensor of the result lies, in which file, before any of it is known."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from allfuse.base.order import natural
from allfuse.merge.header import ITEM_BYTES, Entry
from allfuse.merge.source import Source


@dataclass(frozen=True)
class Layout:
    """The files of the result.

    Attributes:
        entries: its tensors by name, in the order in which they lie; their files are bare names.
        heads: what each file begins with. sizes: bytes of each file.
        index: of several files, which tensor is where; None of a single one.
    """

    entries: dict[str, Entry]
    heads: dict[str, bytes]
    sizes: dict[str, int]
    index: bytes | None

    @property
    def bytes(self) -> int:
        return sum(self.sizes.values())


def lay_out(like: Source, dtypes: Mapping[str, str], shard_bytes: int | None = None) -> Layout:
    """The files of a model with the names, shapes and files of another one, in these types.

    Args:
        shard_bytes: what each file has at most, where it is more than one tensor; None: the files
            are those of `like`.
    """
    files = like.files if shard_bytes is None else _cut(like, dtypes, shard_bytes)
    single = len(files) == 1
    entries: dict[str, Entry] = {}
    heads: dict[str, bytes] = {}
    sizes: dict[str, int] = {}
    for file, names in files.items():
        name = "model.safetensors" if single else file
        own = [like.entries[each] for each in names]
        own.sort(key=lambda entry: -ITEM_BYTES[dtypes[entry.name]])  # each at its own alignment
        texts = {"format": "pt", **{n: kept for n, kept in like.tied.items() if kept in names}}
        placed, heads[name], sizes[name] = _file(name, own, dtypes, texts)
        entries |= placed
    index = None
    if not single:
        weights = {name: entry.file.name for name, entry in entries.items()}
        total = sum(entry.bytes for entry in entries.values())
        said = {"metadata": {"total_size": total}, "weight_map": weights}
        index = (json.dumps(said, indent=2, sort_keys=True) + "\n").encode()
    return Layout(entries, heads, sizes, index)


def _cut(like: Source, dtypes: Mapping[str, str], shard_bytes: int) -> dict[str, list[str]]:
    """Which names are in which file, 10 after 9, none larger than it may be."""
    groups: list[list[str]] = [[]]
    room = shard_bytes
    for name in sorted(dtypes, key=natural):
        size = like.entries[name].count * ITEM_BYTES[dtypes[name]]
        if size > room and groups[-1]:
            groups.append([])
            room = shard_bytes
        groups[-1].append(name)
        room -= size
    count = len(groups)
    return {
        f"model-{number:05d}-of-{count:05d}.safetensors": names
        for number, names in enumerate(groups, start=1)
    }


def _file(
    name: str, own: list[Entry], dtypes: Mapping[str, str], texts: Mapping[str, str]
) -> tuple[dict[str, Entry], bytes, int]:
    said: dict[str, object] = {"__metadata__": dict(texts)}
    begin, places = 0, []
    for entry in own:
        size = entry.count * ITEM_BYTES[dtypes[entry.name]]
        said[entry.name] = {
            "dtype": dtypes[entry.name],
            "shape": list(entry.shape),
            "data_offsets": [begin, begin + size],
        }
        places.append(begin)
        begin += size
    text = json.dumps(said, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    placed = {
        entry.name: Entry(
            entry.name, dtypes[entry.name], entry.shape, Path(name), len(head) + place
        )
        for entry, place in zip(own, places, strict=True)
    }
    return placed, head, len(head) + begin
