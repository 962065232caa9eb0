"""What a checkpoint consists of: the file that is written last and makes the others count."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from allfuse.base.errors import CheckpointError
from allfuse.store.durable import parse_json
from allfuse.store.tensorfile import DAMAGED, FileRecord

NAME = "manifest.json"
FORMAT = 1
LARGEST_BYTES = 64 << 20


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """One checkpoint: when it was taken, what is known of it, and the file of each writing rank."""

    step: int
    time: float
    score: float | None = None
    note: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[int, FileRecord]


def file_name(rank: int) -> str:
    """The name of the tensors that a rank wrote."""
    return f"rank-{rank}.safetensors"


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write and sync the manifest of a folder.

    Raises:
        OSError: it cannot be written.
    """
    content = {"format": FORMAT, **asdict(manifest)}
    with open(folder / NAME, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder, every value checked for its type.

    Raises:
        CheckpointError: it is missing, damaged, or of a newer format.
    """
    path = folder / NAME
    try:
        if path.stat().st_size > LARGEST_BYTES:
            raise CheckpointError(f"{path} is damaged: it is larger than {LARGEST_BYTES} bytes")
        content = parse_json(path.read_bytes())
        return _parse(content)
    except OSError as error:
        said = error.strerror or str(error)
        raise CheckpointError(f"cannot read {path}: {said}; {DAMAGED}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {error}; {DAMAGED}") from error


def parse_record(value: Any, rank: int) -> FileRecord:
    """The record of the file that a rank wrote.

    Raises:
        ValueError: it is none; a name that leads elsewhere is refused too.
    """
    match value:
        case {"name": str(name), "bytes": int(size), "digest": str(digest)}:
            if name != file_name(rank):
                raise ValueError(f"the file of rank {rank} cannot be {name!r}")
            if isinstance(size, bool) or size < 0 or not re.fullmatch(r"\w+:[0-9a-f]+", digest):
                raise ValueError(f"no file has {size} bytes and the digest {digest!r}")
            return FileRecord(name=name, bytes=size, digest=digest)
    raise ValueError(f"the file of rank {rank} has no name, bytes and digest")


def _parse(content: Any) -> Manifest:
    match content:
        case {"format": int(version)} if version > FORMAT:
            raise ValueError(
                f"it has format {version}, this allfuse reads {FORMAT}; update allfuse"
            )
        case {
            "format": 1,
            "step": int(step),
            "time": int() | float() as time,
            "score": None | int() | float() as score,
            "note": dict(note),
            "files": dict(files),
        } if files and step >= 0:
            records = {_rank(key): parse_record(value, _rank(key)) for key, value in files.items()}
            return Manifest(step=step, time=time, score=score, note=note, files=records)
    raise ValueError("it lacks format, step, time, score, note or files, or one is of a wrong type")


def _rank(text: str) -> int:
    if not re.fullmatch(r"0|[1-9]\d{0,8}", text):
        raise ValueError(f"{text!r} is no rank")
    return int(text)
