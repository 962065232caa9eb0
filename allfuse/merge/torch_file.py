"""Models in files that torch.save wrote, whole or in several with an index. Loads no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from allfuse.base.errors import MergeError
from allfuse.merge.archive import Archive, read_file
from allfuse.merge.header import Entry
from allfuse.merge.source import Source
from allfuse.merge.stored import Unreadable, View

KEYS = ("state_dict", "model_state_dict", "model", "module")
"""Under which names checkpoints hold a model's tensors, the first that does so is taken."""
DEEPEST = 4
FILE_BYTES = 5_000_000_000
"""What is written into one file, where the inputs do not say how a model is cut."""
SHOWN = 10


def open_torch(path: Path, files: Iterable[Path]) -> Source:
    """The model in these files.

    Tensors at the top or under the first of `KEYS` are it; what is no tensor there is left out.

    Raises:
        MergeError: a file cannot be read, is damaged, or holds no model or what only code can read.
    """
    entries: dict[str, Entry] = {}
    tied: dict[str, str] = {}
    for file in files:
        archive = read_file(file)
        found, same = name_tensors(archive, pick_state(archive.content, file))
        twice = sorted(entries.keys() & found.keys())
        if twice:
            raise MergeError(f"{path}: {twice[0]} is in {file.name} and in another file of it")
        entries |= found
        tied |= same
    return Source(path, entries, tied, cut_files(entries, tied), {})


def pick_state(content: Any, path: Path) -> dict[str, Any]:
    """The tensors of a model by name, in what a checkpoint holds.

    Raises:
        MergeError: there are none, or one is no plain table of numbers.
    """
    for _ in range(DEEPEST):
        inner = [content[key] for key in KEYS if _is_state(content, key)]
        if not inner:
            break
        content = inner[0]
    if not isinstance(content, Mapping):
        raise MergeError(
            f"{path} holds a {type(content).__name__.lower()} and no tensors by their names; next: "
            "save the state_dict() of the model"
        )
    for name, value in content.items():
        if isinstance(value, Unreadable):
            raise MergeError(f"{path}: {name} is {value.what}; allowed: plain tensors")
    found = {str(n): v for n, v in content.items() if isinstance(v, View | Entry)}
    if not found:
        names = ", ".join(sorted(str(name)[:40] for name in content)[:SHOWN]) or "nothing"
        raise MergeError(
            f"{path} holds no weights: there is {names}; allowed: tensors by their names, at the "
            f"top or under {', '.join(KEYS)}"
        )
    return found


def _is_state(content: Any, key: str) -> bool:
    inner = content.get(key) if isinstance(content, Mapping) else None
    return isinstance(inner, Mapping) and any(
        isinstance(value, View | Entry | Unreadable | Mapping) for value in inner.values()
    )


def name_tensors(
    archive: Archive, state: Mapping[str, View]
) -> tuple[dict[str, Entry], dict[str, str]]:
    """Tensors by name, and of those that are one tensor (tied weights) under which it is kept: the
    first name in alphabetical order.

    Raises:
        MergeError: one lies outside its file, or is of a type that safetensors files do not hold.
    """
    kept: dict[View, str] = {}
    tied: dict[str, str] = {}
    for name in sorted(state):
        first = kept.setdefault(state[name], name)
        if first != name and 0 not in state[name].shape:
            tied[name] = first
    entries = {n: archive.entry(n, view) for n, view in state.items() if n not in tied}
    return entries | {name: entries[first] for name, first in tied.items()}, tied


def cut_files(entries: Mapping[str, Entry], tied: Mapping[str, str]) -> dict[str, list[str]]:
    """Which names are written into which file: as many files as keep each at `FILE_BYTES` or so."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, entry in entries.items():
        if name in tied:
            continue
        if groups[-1] and size + entry.bytes > FILE_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += entry.bytes
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    count = len(groups)
    return {f"model-{n + 1:05d}-of-{count:05d}.safetensors": own for n, own in enumerate(groups)}
