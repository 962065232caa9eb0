"""Nests of tensors (dict, list, tuple), and how tensors are laid end to end."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor


def map_nest(function: Callable[[Any], Any], nest: Any) -> Any:
    """The same nest with `function` applied to every leaf. Named tuples stay what they are."""
    if isinstance(nest, list | tuple) or (hasattr(nest, "keys") and hasattr(nest, "__getitem__")):
        return map_children(lambda child: map_nest(function, child), nest)
    return function(nest)


def map_children(function: Callable[[Any], Any], nest: Any) -> Any:
    """The same dict, list or tuple with `function` applied to what it holds."""
    if isinstance(nest, dict):
        return type(nest)((key, function(value)) for key, value in nest.items())
    if isinstance(nest, tuple) and hasattr(nest, "_fields"):
        return type(nest)(*(function(value) for value in nest))
    if isinstance(nest, list | tuple):
        return type(nest)(function(value) for value in nest)
    return {key: function(nest[key]) for key in nest.keys()}  # noqa: SIM118  BatchEncoding


def leaves(nest: Any) -> Iterator[Any]:
    """The leaves of a nest, in order."""
    if isinstance(nest, list | tuple):
        for value in nest:
            yield from leaves(value)
    elif hasattr(nest, "keys") and hasattr(nest, "__getitem__"):
        for key in nest.keys():  # noqa: SIM118
            yield from leaves(nest[key])
    else:
        yield nest


def count_rows(batch: Any) -> int:
    """Samples in a batch: the length of dim 0 of its first tensor, else of its first list leaf."""
    for leaf in leaves(batch):
        if isinstance(leaf, Tensor) and leaf.dim() > 0:
            return int(leaf.shape[0])
    raise ValueError("a batch must hold at least one tensor whose dim 0 counts the samples")


def cut_rows(batch: Any, start: int, stop: int) -> Any:
    """Rows start..stop of all that has one entry a row: tensors by dim 0, lists of plain values."""
    rows = count_rows(batch)

    def cut(nest: Any) -> Any:
        if isinstance(nest, list) and len(nest) == rows and not any(map(_is_nest, nest)):
            return nest[start:stop]
        if isinstance(nest, Tensor):
            return nest[start:stop] if nest.dim() > 0 and nest.shape[0] == rows else nest
        return map_children(cut, nest) if _is_nest(nest) else nest

    return cut(batch)


def _is_nest(value: Any) -> bool:
    """Whether it holds others: a tensor counts, text does not."""
    return isinstance(value, Tensor | list | tuple) or hasattr(value, "keys")


def share(total: int, parts: int, index: int) -> tuple[int, int]:
    """Start and stop of part `index` when `total` things are cut into `parts` even runs.

    >>> [share(10, 4, i) for i in range(4)]
    [(0, 2), (2, 5), (5, 7), (7, 10)]
    """
    return total * index // parts, total * (index + 1) // parts


def split_buckets(sizes: Sequence[int], bucket_bytes: int, first_bytes: int) -> list[list[int]]:
    """Consecutive indices; a bucket is full once it holds `bucket_bytes`, the first one sooner.

    A tensor is never cut. A bucket may end larger than asked for: closing it before would leave
    the last tensors, which become final last, to a transfer that nothing overlaps.
    """
    buckets: list[list[int]] = []
    held, limit = 0, first_bytes
    for index, size in enumerate(sizes):
        if held == 0:
            buckets.append([])
        buckets[-1].append(index)
        held += size
        if held >= limit:
            held, limit = 0, bucket_bytes
    return buckets


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, without a copy."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


def digest(nest: Any) -> str:
    """A short hash of values, shapes and types in a nest: equal nests, equal digests."""
    state = hashlib.sha256()
    for leaf in leaves(nest):
        if isinstance(leaf, Tensor):
            state.update(f"{leaf.dtype}{tuple(leaf.shape)}".encode())
            if leaf.numel():
                state.update(tensor_bytes(leaf.detach().cpu().contiguous()))
        elif hasattr(leaf, "tobytes"):
            state.update(leaf.tobytes())
        else:
            state.update(repr(leaf).encode())
    return state.hexdigest()[:16]
