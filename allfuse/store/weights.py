"""The weights of a model in safetensors files, of which each reader reads its bytes alone."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from allfuse.store.model_files import find_model_files
from allfuse.store.tensorfile import describe_tensors, read_metadata, read_tensors

MOST_TOLD = 10  # differences in a message

Shapes = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


class Weights(Protocol):
    """Tensors by name, of which the shapes are known before the numbers are read."""

    source: str

    @property
    def shapes(self) -> Shapes: ...

    def read(self, name: str) -> Tensor: ...


class WeightFiles:
    """Weights in one file or several; tensors lie in them until somebody takes their numbers.

    Names that a file says are tied to another one's are there, too.

    Raises:
        CheckpointError: a file is missing or damaged.
    """

    def __init__(self, paths: Iterable[Path], source: str) -> None:
        self.source = source
        self.shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        self._places: dict[str, tuple[Path, str]] = {}
        for path in paths:
            found = describe_tensors(path)
            self.shapes |= found
            self._places |= {name: (path, name) for name in found}
            for name, kept in read_metadata(path).items():
                if name != "format" and name not in found and kept in found:
                    self.shapes[name], self._places[name] = found[kept], (path, kept)

    def read(self, name: str) -> Tensor:
        """A tensor that lies in its file: only the bytes that are looked at are read."""
        path, kept = self._places[name]
        return read_tensors(path, [kept], mapped=True)[kept]


class HeldWeights:
    """Weights that are in memory, or in files that are open."""

    def __init__(self, tensors: Mapping[str, Tensor], source: str) -> None:
        self.source, self._tensors = source, tensors
        self.shapes: Shapes = {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()}

    def read(self, name: str) -> Tensor:
        return self._tensors[name]


def open_weights(path: str | Path) -> WeightFiles:
    """Those of a safetensors file, or of a folder with one, or with an index of several.

    Raises:
        UserError: there are none. CheckpointError: they cannot be read.
    """
    return WeightFiles(find_model_files(Path(path)), str(path))


def find_differences(
    own: Mapping[str, Tensor], same: Mapping[str, Iterable[str]], shapes: Shapes
) -> list[str]:
    """In words, what is not alike in a model and in weights for it.

    Args:
        own: the model's tensors by name. same: of each name, all names of the same tensor.
    """
    told = [
        f"{name} is not in the file"
        for name in own
        if not any(other in shapes for other in (name, *same.get(name, ())))
    ]
    told += [f"the model has no {name}" for name in shapes if name not in own]
    for name, tensor in own.items():
        if name not in shapes or is_lazy(tensor):
            continue
        dtype, shape = shapes[name]
        if shape != tuple(tensor.shape):
            told.append(f"{name} is {shape} in the file and {tuple(tensor.shape)} in the model")
        elif torch.promote_types(dtype, tensor.dtype) != tensor.dtype:
            told.append(f"{name} is {dtype} in the file and {tensor.dtype} in the model")
    return told


def list_differences(told: list[str]) -> str:
    """The first of them, and how many more there are."""
    more = f"; and {len(told) - MOST_TOLD} more" if len(told) > MOST_TOLD else ""
    return "; ".join(told[:MOST_TOLD]) + more


def reader(weights: Weights, name: str) -> Callable[[], Tensor]:
    return functools.partial(weights.read, name)
