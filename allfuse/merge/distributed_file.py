"""Models in checkpoints of torch.distributed.checkpoint. Loads no torch.

Such a folder has a pickle `.metadata`, which says for each tensor its type, its sizes and its
pieces, and for each piece in which file it lies, from which byte on. Each piece is a file of
torch.save by itself (torch/distributed/checkpoint/{metadata,filesystem}.py).
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from allfuse.base.errors import MergeError
from allfuse.merge.archive import read_archive
from allfuse.merge.entries import Piece, Pieced
from allfuse.merge.header import Entry
from allfuse.merge.pickled import Record, damaged, record, unpickle
from allfuse.merge.source import Source
from allfuse.merge.stored import KNOWN, Kind, View
from allfuse.merge.torch_file import cut_files, pick_state

METADATA = ".metadata"
_CHECKPOINT = "torch.distributed.checkpoint"
_KNOWN = {
    **KNOWN,
    **{
        (f"{_CHECKPOINT}.{module}", name): record(name)
        for module, name in [
            ("metadata", "Metadata"),
            ("metadata", "TensorStorageMetadata"),
            ("metadata", "TensorProperties"),
            ("metadata", "ChunkStorageMetadata"),
            ("metadata", "BytesStorageMetadata"),
            ("metadata", "MetadataIndex"),
            ("metadata", "StorageMeta"),
            ("metadata", "_MEM_FORMAT_ENCODING"),
            ("filesystem", "_StorageInfo"),
            ("filesystem", "_StoragePrefix"),
        ]
    },
}

Place = tuple[str, int, int]
"""A file's name, the first byte in it, and how many."""


def open_distributed(path: Path) -> Source:
    """The model in a folder that torch.distributed.checkpoint wrote: its tensors at the top or
    under one of `torch_file.KEYS`, from whatever number of ranks.

    Raises:
        MergeError: it cannot be read, is damaged, or holds no model.
    """
    where = path / METADATA
    try:
        about = unpickle(io.BytesIO(where.read_bytes()), where, _KNOWN)
    except OSError as error:
        raise MergeError(f"{where} cannot be read: {error.strerror or error}") from error
    try:
        tensors, places = _tensors(where, about), _places(about)
        tree = _nest(tensors, about.state.get("planner_data"))
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise damaged(where, str(error)[:200]) from error
    state: dict[str, Pieced] = pick_state(tree, where)
    with ExitStack() as stack:
        files: dict[str, BinaryIO] = {}
        entries = {
            name: _with_pieces(path, name, tensor, places, files, stack)
            for name, tensor in state.items()
        }
    return Source(path, entries, {}, cut_files(entries, {}), {})


def _tensors(where: Path, about: Any) -> dict[str, Pieced]:
    """The tensors by their full names; of each piece only its place in the tensor is known."""
    found = {}
    for name, said in about.field("state_dict_metadata").items():
        if not isinstance(said, Record) or said.kind != "TensorStorageMetadata":
            continue
        kind = _kind(said.field("properties"))
        shape = _sizes(said.field("size"))
        pieces = []
        for chunk in said.field("chunks"):
            offsets, sizes = _sizes(chunk.field("offsets")), _sizes(chunk.field("sizes"))
            inside = len(offsets) == len(sizes) == len(shape) and all(
                offset + size <= whole
                for offset, size, whole in zip(offsets, sizes, shape, strict=True)
            )
            if not inside:
                raise ValueError(f"a piece of {name} lies outside of it")
            pieces.append(Piece(offsets, Entry(name, kind, sizes, where, 0)))
        if sum(piece.entry.count for piece in pieces) != prod(shape):
            raise ValueError(f"the pieces of {name} are more or less than {list(shape)}")
        if not _are_disjoint(pieces):
            raise ValueError(f"the pieces of {name} overlap")
        found[str(name)] = Pieced(str(name), kind, shape, where, 0, tuple(pieces))
    return found


def _are_disjoint(pieces: Sequence[Piece]) -> bool:
    """Whether no place is in two pieces: along the dim with most cuts, each is compared with those
    that have not ended where it begins."""
    starts = zip(*(piece.offsets for piece in pieces), strict=True)
    cuts = [len(set(each)) for each in starts]
    if not cuts:
        return len(pieces) <= 1
    dim = cuts.index(max(cuts))
    open_ones: list[Piece] = []
    for piece in sorted(pieces, key=lambda piece: piece.offsets[dim]):
        begin = piece.offsets[dim]
        open_ones = [
            other for other in open_ones if other.offsets[dim] + other.entry.shape[dim] > begin
        ]
        if any(_overlap(piece, other) for other in open_ones):
            return False
        open_ones.append(piece)
    return True


def _overlap(one: Piece, two: Piece) -> bool:
    return all(
        max(first, second) < min(first + size, second + other)
        for first, size, second, other in zip(
            one.offsets, one.entry.shape, two.offsets, two.entry.shape, strict=True
        )
    )


def _kind(properties: Any) -> str:
    """The type in `TensorProperties`, whose state is a tuple, or a dict where an older torch wrote
    it. One that safetensors files lack is refused where it is read."""
    state = properties.state
    kind = state.get("dtype") if isinstance(state, dict) else state[0]
    if not isinstance(kind, Kind):
        raise ValueError("a tensor without a type")
    return kind.code or kind.name


def _sizes(said: Any) -> tuple[int, ...]:
    if not isinstance(said, tuple) or any(type(size) is not int or size < 0 for size in said):
        raise ValueError("sizes that are none")
    return said


def _places(about: Any) -> dict[tuple[str, tuple[int, ...] | None], Place]:
    """Where each piece lies, by its tensor's name and its offsets."""
    found = {}
    for index, info in about.field("storage_data").items():
        if info.state.get("transform_descriptors"):
            raise ValueError(f"it is compressed ({info.state['transform_descriptors']})")
        name, begin, length = (
            info.field("relative_path"),
            info.field("offset"),
            info.field("length"),
        )
        if Path(name).name != name:
            raise ValueError("it names files in other folders")
        if any(type(number) is not int or number < 0 for number in (begin, length)):
            raise ValueError(f"a piece from {begin} on, of {length} bytes")
        found[index.field("fqn"), index.state.get("offset")] = name, begin, length
    return found


def _nest(tensors: Mapping[str, Pieced], paths: Any) -> dict[Any, Any]:
    """The dicts that tensors were in before their names were made one."""
    tree: dict[Any, Any] = {}
    for name, tensor in tensors.items():
        path = paths.get(name, (name,)) if isinstance(paths, Mapping) else (name,)
        inner = tree
        for key in path[:-1]:
            inner = inner.setdefault(key, {})
        inner[path[-1]] = tensor
    return tree


def _with_pieces(
    folder: Path,
    name: str,
    tensor: Pieced,
    places: Mapping[Any, Place],
    files: dict[str, BinaryIO],
    stack: ExitStack,
) -> Entry:
    """A tensor under its name in the model, with the places of its pieces in files."""
    found = []
    for piece in tensor.pieces:
        place = places.get((tensor.name, piece.offsets), places.get((tensor.name, None)))
        if place is None:
            raise damaged(tensor.file, f"it does not say where a piece of {tensor.name} is")
        found.append(Piece(piece.offsets, _piece(folder, piece.entry, place, files, stack)))
    if len(found) == 1:
        (only,) = found
        return replace(only.entry, name=name)
    return Pieced(name, tensor.dtype, tensor.shape, tensor.file, 0, tuple(found))


def _piece(
    folder: Path, said: Entry, place: Place, files: dict[str, BinaryIO], stack: ExitStack
) -> Entry:
    file, begin, length = place
    path = folder / file
    try:
        if file not in files:
            files[file] = stack.enter_context(path.open("rb"))
        archive = read_archive(files[file], path, begin, length)
    except (OSError, ValueError) as error:  # a name may be one that no file can have
        raise MergeError(f"{path} cannot be read: {getattr(error, 'strerror', error)}") from error
    view = archive.content
    if not isinstance(view, View):
        raise damaged(path, f"there is no tensor where {said.name} should be")
    entry = archive.entry(said.name, view)
    if (entry.shape, entry.dtype) != (said.shape, said.dtype):
        raise damaged(
            path,
            f"{said.name} is {entry.dtype}{list(entry.shape)} there, not "
            f"{said.dtype}{list(said.shape)}",
        )
    return entry
