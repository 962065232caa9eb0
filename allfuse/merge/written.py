"""Writes a model whose tensors are in memory, as a merge on disk writes its own."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from allfuse.base.errors import MergeError
from allfuse.merge.blocks import Files
from allfuse.merge.folder import finish, held, make_files, refuse_folder
from allfuse.merge.header import FLOATS
from allfuse.merge.layout import Layout, lay_out
from allfuse.merge.origin import carry_job
from allfuse.merge.source import Source
from allfuse.store.durable import explain, partial_path
from allfuse.store.tensorfile import DTYPES

MOST_NAMED = 10


def plan_model(
    like: Source,
    out: Path,
    overwrite: bool = False,
    dtype: str | None = None,
    models: Sequence[Path] = (),
) -> Layout:
    """Where each tensor will be, once it is known that it can be written there.

    Args:
        like: whose names, shapes, files and types the result has. dtype: of its floating-point
            tensors, instead. models: others that `out` must not lie in.

    Raises:
        MergeError: `out` is there already, lies in a model, or there is no room; or no such type.
    """
    if dtype is not None and dtype not in FLOATS:
        raise MergeError(f"dtype {dtype}; allowed: {', '.join(FLOATS)}")
    dtypes = {
        name: dtype if dtype and entry.is_float else entry.dtype
        for name, entry in like.entries.items()
        if name not in like.tied
    }
    layout = lay_out(like, dtypes)
    refuse_folder([*like.places, *models], layout.bytes, out, overwrite)
    return layout


def write_model(
    like: Source,
    tensors: Mapping[str, Tensor],
    out: Path,
    overwrite: bool = False,
    dtype: str | None = None,
    made_of: tuple[Sequence[Path], Mapping[str, Any]] = ((), {}),
) -> int:
    """Write tensors as a model like another one, which appears under its name when it is whole;
    the bytes written. Of one that could not be written nothing is left.

    Names, files, types and side files are those of `like`; numbers are rounded to those types.

    Args:
        made_of: the models it was made of, of which the first that is a run gives its job, and
            what else is recorded then.

    Raises:
        MergeError: as `plan_model`, or a tensor is missing, too many or of another shape.
    """
    layout = plan_model(like, out, overwrite, dtype)
    _refuse_others(layout, like, tensors)
    try:
        with held(partial_path(out)) as folder, _removed_after_errors(folder):
            make_files(layout, folder, fresh=True)
            files = Files(folder)
            try:
                for name, entry in layout.entries.items():
                    values = tensors[name].detach().to("cpu", DTYPES[entry.dtype])
                    files.write(entry, 0, values.contiguous())
                files.sync()
            finally:
                files.close()
            carry_job(made_of[0], folder, made_of[1])
            finish(layout, like.side_files(), folder, out)
    except OSError as error:
        raise MergeError(explain(error, out)) from error
    return layout.bytes


@contextmanager
def _removed_after_errors(folder: Path) -> Iterator[None]:
    """Nobody goes on with what was begun."""
    try:
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _refuse_others(layout: Layout, like: Source, tensors: Mapping[str, Tensor]) -> None:
    wrong = [
        f"{name} is {tuple(tensors[name].shape)}, not {entry.shape}"
        if name in tensors
        else f"{name} is missing"
        for name, entry in layout.entries.items()
        if name not in tensors or tuple(tensors[name].shape) != entry.shape
    ]
    wrong += [f"{name} is too many" for name in tensors if name not in like.entries]
    if wrong:
        more = f" and {len(wrong) - MOST_NAMED} more" if len(wrong) > MOST_NAMED else ""
        raise MergeError(
            f"the tensors are not those of {like.path}: {'; '.join(wrong[:MOST_NAMED])}{more}"
        )
