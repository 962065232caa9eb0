"""A version of all that servers hold, on disk: read from their shards as one, and cut into shards.

Each server's file holds its pieces (see `Snapshots`): of the part `place` of piece `piece` the
tensor "piece/place/weights", and what the optimizer keeps of it, as "piece/place/state/name": one
value for each element, or one for all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from allfuse.base.errors import CheckpointError
from allfuse.roles.blueprint import Blueprint, Held
from allfuse.roles.cutting import Span, cut, find_places
from allfuse.roles.shard import Shard
from allfuse.roles.slices import STATE
from allfuse.roles.snapshots import Snapshots
from allfuse.split.piece import join
from allfuse.store.tensorfile import describe_tensors, read_tensors

WEIGHTS = "weights"
FOR_ALL = frozenset({"step", "eta", "mu", "mu_product"})
"""What torch's optimizers keep of a parameter as one value; of one without dims all looks so."""
READ_AHEAD = 8  # parts of files that are kept, since small tensors share one


class Kept(NamedTuple):
    """A tensor that a server keeps of a part: its type, and whether it has a value for each
    element."""

    dtype: torch.dtype
    is_whole: bool


class Version:
    """What all servers wrote of one version, tensor by tensor: nothing is read before it is asked
    for, and not more than that.

    Args:
        paths: of the servers' files, in the order of shards.

    Raises:
        CheckpointError: a file cannot be read.
    """

    def __init__(self, blueprint: Blueprint, paths: Sequence[Path]) -> None:
        self.blueprint = blueprint
        self._places = find_places(blueprint.blocks)
        self._homes: list[tuple[Span, Path, str]] = []
        self._kept: dict[str, dict[str, Kept]] = {}
        for path, pieces in zip(paths, cut(blueprint.blocks, len(paths)), strict=True):
            found = describe_tensors(path)
            for number, piece in enumerate(pieces):
                for place, span in enumerate(piece):
                    prefix = f"{number}/{place}/"
                    self._homes.append((span, path, prefix))
                    self._kept[f"{path} {prefix}"] = {
                        name.removeprefix(prefix): Kept(dtype, bool(shape))
                        for name, (dtype, shape) in found.items()
                        if name.startswith(prefix)
                    }
        self._read = lru_cache(maxsize=READ_AHEAD)(
            lambda path, name: read_tensors(path, [name])[name]
        )

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor, as the plain model has it."""
        part, shape = self.blueprint.parts[name][0].part, self.blueprint.parts[name][0].shape
        return shape if part is None else part.piece.whole

    def states(self, name: str) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """What the optimizer keeps of a tensor: type and shape by name."""
        kept: dict[str, Kept] = {}
        for held in self.blueprint.parts[name]:
            for _, path, prefix in self._overlapping(self._places[held.name]):
                kept |= self._kept[f"{path} {prefix}"]
        return {
            key.removeprefix(STATE): (each.dtype, self.shape(name) if each.is_whole else ())
            for key, each in kept.items()
            if key.startswith(STATE)
        }

    def weights(self, name: str) -> Tensor:
        return self._join(name, WEIGHTS, self.blueprint.parts[name][0].dtype)

    def state(self, name: str, kind: str) -> Tensor:
        """What the optimizer keeps of a tensor under a name."""
        return self._join(name, f"{STATE}{kind}", self.states(name)[kind][0])

    def _join(self, name: str, what: str, dtype: torch.dtype) -> Tensor:
        """What is kept of a tensor of the plain model, of which ranks may have had parts."""
        found = self.blueprint.parts[name]
        values = [self._gather(held, what, dtype) for held in found]
        pieces = [
            (held.part.piece, value)
            for held, value in zip(found, values, strict=True)
            if held.part is not None
        ]
        if not pieces or pieces[0][1].shape != pieces[0][0].own:
            return values[0]
        try:
            return join(pieces)
        except ValueError as error:
            raise CheckpointError(f"servers do not hold all of {name}: {error}") from None

    def _overlapping(self, span: Span) -> list[tuple[Span, Path, str]]:
        return [
            home
            for home in self._homes
            if home[0].block == span.block
            and home[0].start < span.stop
            and span.start < home[0].stop
        ]

    def _gather(self, held: Held, what: str, dtype: torch.dtype) -> Tensor:
        own, parts = self._places[held.name], []
        for span, path, prefix in self._overlapping(own):
            if what not in self._kept[f"{path} {prefix}"]:  # of a part that was never stepped
                parts.append(torch.zeros(_common(own, span), dtype=dtype))
                continue
            part: Tensor = self._read(path, f"{prefix}{what}")
            if part.dim() == 0:
                return part.clone()
            start, stop = max(own.start, span.start), min(own.stop, span.stop)
            parts.append(part[start - span.start : stop - span.start])
        flat = torch.cat(parts) if parts else torch.empty(0, dtype=dtype)
        if flat.numel() != prod(held.shape):
            count = prod(held.shape)
            raise CheckpointError(f"servers hold {flat.numel()} of {count} of {held.name}")
        return flat.reshape(held.shape)


def _common(own: Span, span: Span) -> int:
    """Of how many elements both are."""
    return min(own.stop, span.stop) - max(own.start, span.start)


def write_version(
    folder: Path,
    blueprint: Blueprint,
    servers: int,
    sequence: int,
    weights: Callable[[str], Tensor],
    states: Callable[[str], Mapping[str, Tensor]],
) -> None:
    """Write what servers are to begin with, one shard after the other.

    A part of a shard has one count of steps: the largest of its tensors. What the optimizer keeps
    of some tensors only begins as zero for the others.

    Args:
        weights, states: of a tensor, by its name: as it is in the model, and what the optimizer
            keeps of it, of the same shape or of one value.

    Raises:
        CheckpointError: a tensor is of another shape, or a file cannot be written.
    """
    places = find_places(blueprint.blocks)
    held = {each.name: each for each in blueprint.tensors}
    plain = {part.name: name for name, parts in blueprint.parts.items() for part in parts}

    def take(values: Tensor, name: str) -> Tensor:
        """What is held under a name, of a tensor of the plain model."""
        found = held[name].part
        is_whole = found is not None and values.shape == found.piece.whole
        return found.piece.take(values) if found is not None and is_whole else values

    def part(values: Tensor, name: str, span: Span) -> Tensor:
        own, values = places[name], take(values, name)
        if values.numel() != own.elements:
            shape = tuple(values.shape)
            raise CheckpointError(f"{name} is {shape} in the checkpoint, and {held[name].shape}")
        start, stop = max(own.start, span.start), min(own.stop, span.stop)
        return values.reshape(-1)[start - own.start : stop - own.start]

    def fill(span: Span) -> dict[str, Tensor]:
        block = blueprint.blocks[span.block]
        names = [
            name
            for name in block.names
            if places[name].start < span.stop and span.start < places[name].stop
        ]
        own = [part(weights(plain[name]), name, span).to(block.dtype) for name in names]
        found = {WEIGHTS: torch.cat(own)}
        kept = {name: states(plain[name]) for name in names}
        for kind in dict.fromkeys(kind for state in kept.values() for kind in state):
            given = [state[kind] for state in kept.values() if kind in state]
            single = [held[name].shape == () for name, state in kept.items() if kind in state]
            if all(each.dim() == 0 for each in given) and (kind in FOR_ALL or not all(single)):
                found[f"{STATE}{kind}"] = torch.stack(given).max()
                continue
            found[f"{STATE}{kind}"] = torch.cat(
                [
                    part(state.get(kind, torch.zeros(held[name].shape).to(given[0])), name, span)
                    for name, state in kept.items()
                ]
            )
        return found

    for index in range(servers):
        shard = Shard(blueprint, index, servers)
        for number, spans in enumerate(shard.pieces):
            tensors = {
                f"{place}/{name}": tensor
                for place, span in enumerate(spans)
                for name, tensor in fill(span).items()
            }
            shard.restore(number, tensors)
        Snapshots(folder, index, servers).save(shard, sequence)
