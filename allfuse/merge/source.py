"""A model on disk: which tensors it has, and where their bytes are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from allfuse.base.errors import CheckpointError, MergeError
from allfuse.merge.header import Entry, read_header
from allfuse.store.model_files import find_model_files

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx")
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
        UserError: there is none, or a file of it is missing or damaged.
    """
    try:
        headers = {file.name: read_header(file) for file in find_model_files(path)}
    except CheckpointError as error:
        raise MergeError(str(error)) from error
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
