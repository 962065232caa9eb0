"""A checkpoint that one process writes at once, from wherever its values are."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from allfuse.base.errors import CheckpointError
from allfuse.store import shelf
from allfuse.store.durable import explain, sync_folder
from allfuse.store.manifest import Manifest, file_name
from allfuse.store.saving import Saved
from allfuse.store.tensorfile import write_tensors
from allfuse.store.tree import pack


class StandIns:
    """Tensors that take no memory and stand for values that are read when they are written.

    Example:
        standins = StandIns()
        state = {"weight": standins.make(torch.float32, (1000, 1000), read_weight)}
        write_checkpoint(folder, 10, state, note={}, fill=standins.fill)
    """

    def __init__(self) -> None:
        self._made: dict[int, tuple[Tensor, Callable[[], Tensor]]] = {}

    def make(
        self, dtype: torch.dtype, shape: tuple[int, ...], read: Callable[[], Tensor]
    ) -> Tensor:
        tensor = torch.zeros((), dtype=dtype).expand(shape)
        if tensor.numel():
            self._made[tensor.data_ptr()] = tensor, read
        return tensor

    def fill(self, tensor: Tensor) -> Tensor:
        """What a tensor stands for; one that stands for nothing else is itself."""
        found = self._made.get(tensor.data_ptr()) if tensor.numel() else None
        if found is None:
            return tensor
        values = found[1]()
        if values.shape != tensor.shape or values.dtype != tensor.dtype:
            raise CheckpointError(
                f"{values.dtype} of {tuple(values.shape)} came instead of {tensor.dtype} of "
                f"{tuple(tensor.shape)}"
            )
        return values


def write_checkpoint(
    folder: Path,
    step: int,
    state: Any,
    *,
    note: Mapping[str, Any],
    score: float | None = None,
    keep: int = 3,
    fill: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> Saved:
    """Write a state as the one file of a checkpoint, as `Checkpoints` does, and commit it.

    Args:
        folder: of the checkpoints. step, score, note, keep: as for `Checkpoints.start`.
        fill: gives the values of tensors that stand for them, one at a time.

    Raises:
        CheckpointError: it cannot be written; the checkpoints that were there stay.
    """
    begin = time.perf_counter()
    skeleton, tensors = pack(state)
    partial: Path | None = None
    try:
        partial = shelf.open_partial(folder, step)
        path = partial / file_name(0)
        record = write_tensors(path, tensors, {"skeleton": json.dumps(skeleton)}, fill=fill)
        sync_folder(partial)
        manifest = Manifest(step=step, time=time.time(), score=score, note=note, files={0: record})
        path = shelf.commit(folder, partial, manifest)
    except (OSError, CheckpointError) as error:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError):
            raise CheckpointError(explain(error, folder)) from error
        raise
    with suppress(OSError):
        shelf.drop_surplus(folder, step, keep)
    seconds = time.perf_counter() - begin
    return Saved(step=step, path=path, bytes=record.bytes, seconds=seconds, stalled_seconds=0.0)
