"""A model on disk: which tensors it has, and where their bytes are."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from allfuse.base.errors import MergeError
from allfuse.merge.header import Entry, read_header

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx")
ALLOWED = (
    "a .safetensors file, a folder with one, a folder with several and their index "
    f"({INDEX}), or the folder of a run that has ended"
)
LARGEST_SIDE_BYTES = 200_000_000


@dataclass(frozen=True)
class Source:
    """A model on disk.

    Attributes:
        entries: its tensors by name; names that share one (tied weights) have the same bytes.
        tied: of names that share a tensor, under which name it is kept.
        files: which names are kept in which file, in order.
        texts: of the first file's header.
    """

    path: Path
    entries: dict[str, Entry]
    tied: dict[str, str]
    files: dict[str, list[str]]
    texts: dict[str, str]

    @property
    def folder(self) -> Path:
        return self.path if self.path.is_dir() else self.path.parent

    def side_files(self) -> list[Path]:
        """Configuration, tokenizer and the like, which belong to the model but are no weights."""
        if not self.path.is_dir() or (self.path / "run.json").exists():
            return []
        return [
            file
            for file in sorted(self.path.iterdir())
            if file.is_file()
            and not file.name.startswith(".")
            and not file.name.endswith((*WEIGHTS, ".index.json", ".part"))
            and file.stat().st_size <= LARGEST_SIDE_BYTES
        ]


def open_source(path: Path) -> Source:
    """A model's tensors from the headers of its files alone.

    Raises:
        MergeError: there is none, or a file of it is missing or damaged.
    """
    if not path.exists():
        raise MergeError(f"{path}: there is nothing of that name; allowed: {ALLOWED}")
    headers = {file.name: read_header(file) for file in _files(path)}
    entries: dict[str, Entry] = {}
    for file, header in headers.items():
        twice = sorted(entries.keys() & header.entries.keys())
        if twice:
            raise MergeError(
                f"{path}: {twice[0]} is in {file} and in {entries[twice[0]].file.name}"
            )
        entries |= header.entries
    files = {file: list(header.entries) for file, header in headers.items()}
    texts = {name: kept for header in headers.values() for name, kept in header.metadata.items()}
    tied = {n: kept for n, kept in texts.items() if n not in entries and kept in entries}
    entries |= {name: entries[kept] for name, kept in tied.items()}
    return Source(path, entries, tied, files, next(iter(headers.values())).metadata)


def _files(path: Path) -> list[Path]:
    if path.is_file():
        if path.suffix != ".safetensors":
            raise MergeError(f"{path} is no model that can be read; allowed: {ALLOWED}")
        return [path]
    indices = sorted(path.glob("*.safetensors.index.json"))
    if indices:
        return _indexed(indices[0])
    found = sorted(path.glob("*.safetensors"))
    if (path / SINGLE) in found:
        return [path / SINGLE]
    if len(found) != 1:
        what = f"{len(found)} files of weights and no index" if found else "no file of weights"
        raise MergeError(f"{path} has {what}; allowed: {ALLOWED}")
    return found


def _indexed(index: Path) -> list[Path]:
    """The files that an index names, each with the names that it says."""
    try:
        said = json.loads(index.read_text())["weight_map"]
        names = sorted({str(file) for file in said.values()})
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise MergeError(f"{index} is no index of a model's files: {error}") from error
    for name in names:
        file = index.parent / name
        if Path(name).name != name or not file.is_file():
            raise MergeError(f"{index} names {name}, and there is no such file beside it")
    return [index.parent / name for name in names]
