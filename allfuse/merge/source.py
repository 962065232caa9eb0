"""A model on disk: which tensors it has, and where their bytes are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from allfuse.base.errors import CheckpointError, MergeError
from allfuse.merge.header import Entry, read_header
from allfuse.store.model_files import (
    INDEX,
    SINGLE,
    TORCH_INDEX,
    TORCH_SINGLE,
    TORCH_SUFFIXES,
    find_model_files,
    indexed_files,
    weight_files,
)

WEIGHTS = (
    ".safetensors", *TORCH_SUFFIXES, ".distcp", ".gguf", ".h5", ".msgpack", ".onnx",
)  # fmt: skip
LARGEST_SIDE_BYTES = 200_000_000
ALLOWED = (
    "a .safetensors file, or one of torch.save (.pt, .pth, .bin, .ckpt); a folder with one of "
    "them, or with several and their index; a run folder; a checkpoint of "
    "torch.distributed.checkpoint; MODEL+ADAPTER, or an adapter that names its model"
)


@dataclass(frozen=True)
class Source:
    """A model on disk.

    Attributes:
        path: what it is called.
        entries: its tensors by name; names that share one (tied weights) have the same bytes.
        tied: of names that share a tensor, under which name it is kept.
        files: which names are kept in which safetensors file, or would be, in order.
        texts: of the first file's header.
        roots: the files or folders that it is read from, where `path` is none.
    """

    path: Path
    entries: dict[str, Entry]
    tied: dict[str, str]
    files: dict[str, list[str]]
    texts: dict[str, str]
    roots: tuple[Path, ...] = ()

    @property
    def places(self) -> tuple[Path, ...]:
        """The files or folders that it is read from."""
        return self.roots or (self.path,)

    def side_files(self) -> list[Path]:
        """Configuration, tokenizer and the like, which belong to the model but are no weights."""
        folder = self.places[0]
        if not folder.is_dir() or (folder / "run.json").exists():
            return []
        return [
            file
            for file in sorted(folder.iterdir())
            if file.is_file()
            and not file.name.startswith(".")
            and not file.name.endswith((*WEIGHTS, ".index.json", ".part"))
            and file.stat().st_size <= LARGEST_SIDE_BYTES
        ]


def open_source(path: Path) -> Source:
    """A model's tensors from the headers of its files alone, in whichever form it is there.

    Raises:
        UserError: there is none, or a file of it is missing or damaged.
    """
    from allfuse.merge.adapter import adapt, find_base, is_adapter

    model, plus, adapter = str(path).rpartition("+")
    if plus and not path.exists():
        if not is_adapter(Path(adapter)):
            raise MergeError(
                f"{adapter}, which {path} adds to {model}, is no folder with an "
                "adapter_config.json; allowed: MODEL+ADAPTER"
            )
        return adapt(open_source(Path(model)), Path(adapter))
    if is_adapter(path):
        return adapt(open_source(find_base(path)), path)
    if not path.exists():
        raise MergeError(f"there is no {path}; allowed: {ALLOWED}")
    try:
        return _open_files(path)
    except CheckpointError as error:
        raise MergeError(str(error)) from error


def _open_files(path: Path) -> Source:
    """One form after the other: what each folder of that form has in it tells it."""
    if path.is_dir() and not any((path / name).is_file() for name in (INDEX, SINGLE)):
        files = [path / TORCH_SINGLE] if (path / TORCH_SINGLE).is_file() else weight_files(path)
        if (path / TORCH_INDEX).is_file():
            files = indexed_files(path / TORCH_INDEX)
        elif (path / ".metadata").is_file():
            from allfuse.merge.distributed_file import open_distributed

            return open_distributed(path)
        elif (path / "run.json").is_file():
            from allfuse.merge.checkpointed import open_checkpoint

            return open_checkpoint(path)
        elif len(files) != 1:
            raise MergeError(
                f"{path} holds {len(files) or 'no'} files of weights"
                f"{' and no index' if files else ''}; allowed: {ALLOWED}"
            )
    else:
        files = [path] if path.is_file() else find_model_files(path)
    if files[0].suffix in TORCH_SUFFIXES:
        from allfuse.merge.torch_file import open_torch

        return open_torch(path, files)
    return _open_safetensors(path, files)


def _open_safetensors(path: Path, files: list[Path]) -> Source:
    if files[0].suffix != ".safetensors":
        raise MergeError(f"{path} is no model by its name; allowed: {ALLOWED}")
    headers = {file.name: read_header(file) for file in files}
    entries: dict[str, Entry] = {}
    for name, header in headers.items():
        twice = sorted(entries.keys() & header.entries.keys())
        if twice:
            raise MergeError(
                f"{path}: {twice[0]} is in {name} and in {entries[twice[0]].file.name}"
            )
        entries |= header.entries
    kept = {name: list(header.entries) for name, header in headers.items()}
    texts = {name: said for header in headers.values() for name, said in header.metadata.items()}
    tied = {n: first for n, first in texts.items() if n not in entries and first in entries}
    entries |= {name: entries[first] for name, first in tied.items()}
    return Source(path, entries, tied, kept, next(iter(headers.values())).metadata)
