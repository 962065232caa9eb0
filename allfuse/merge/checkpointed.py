"""The model of a run that has not ended, in its newest checkpoint."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from allfuse.base.errors import CheckpointError, MergeError
from allfuse.merge.header import Entry, Header, read_header
from allfuse.merge.source import Source
from allfuse.merge.torch_file import cut_files
from allfuse.store.durable import parse_json
from allfuse.store.manifest import read_manifest
from allfuse.store.shelf import committed
from allfuse.store.tree import unpack

NEXT = "next: train on with `allfuse train --resume`, which writes the model at the end"


def open_checkpoint(path: Path) -> Source:
    """The model in the newest checkpoint of a run folder, where one process wrote all of it.

    Raises:
        MergeError: there is no checkpoint, it is damaged, or it is of several ranks or models.
    """
    found = next(iter(committed(path / "checkpoints").values()), None)
    if found is None:
        raise MergeError(f"run folder {path} has neither a model nor a checkpoint yet; {NEXT}")
    try:
        writers = read_manifest(found).files
        if len(writers) != 1:
            raise MergeError(
                f"{found} was written by {len(writers)} ranks, each its own part or its own "
                f"weights; allowed: a checkpoint of one; {NEXT}"
            )
        (record,) = writers.values()
        header = read_header(found / record.name)
        models = _models(header)
    except (CheckpointError, ValueError) as error:
        raise MergeError(f"{found} is damaged: {error}; {NEXT}") from error
    if len(models) != 1:
        raise MergeError(
            f"{found} holds {len(models)} models ({', '.join(models)}); allowed: one; {NEXT}"
        )
    (state,) = models.values()
    entries = {n: replace(e, name=n) for n, e in state.items() if isinstance(e, Entry)}
    return Source(path, entries, {}, cut_files(entries, {}), {})


def _models(header: Header) -> dict[str, dict[str, Any]]:
    """The state dicts of a checkpoint's models, with their places instead of tensors."""
    state = parse_json(header.metadata.get("skeleton", "null"))
    for key, node in (state or {}).get("dict", []):
        if key == "models":
            entries: Any = header.entries
            models: dict[str, dict[str, Any]] = unpack(node, entries)
            return models
    raise ValueError("it holds no models")
