"""Cuts the state of a model evenly over ranks that share out each batch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import Parameter

from allfuse.link import Link
from allfuse.split.shard.blocks import owners_of
from allfuse.split.shard.gather import Block, gathered
from allfuse.split.shard.memory import Spare

CAST = (nn.Linear, nn.modules.conv._ConvNd)
"""Modules whose matrices autocast shortens before each use."""


@dataclass(frozen=True)
class Stages:
    """Those of this rank, where the model is cut between its layers, too.

    Attributes:
        here: names of the parameters that this rank has.
        uses: of each of its stages, by number, names of the parameters that it uses.
        running: the number of the stage that runs; None: all of the model is followed.
    """

    here: Collection[str]
    uses: Mapping[int, Collection[str]]
    running: Callable[[], int | None]

    def users(self, name: str) -> frozenset[int]:
        return frozenset(number for number, names in self.uses.items() if name in names)


def shard_model(
    model: nn.Module,
    blocks: Iterable[str],
    link: Link,
    *,
    shortened: bool = False,
    twice: Sequence[str] = (),
    home: torch.device | None = None,
    stages: Stages | None = None,
) -> list[Block]:
    """Keep this rank's rows of every parameter, in place; blocks bring them together when they run.

    Parameters keep their names and identities, and have the shapes of this rank's rows. Gradients
    are those of the sum of all ranks' losses. What is in no block is in memory from the beginning
    of the forward pass to the end of the backward pass; in a stage, of which several microbatches
    may be between these, while the one or the other runs.

    Args:
        blocks: names of modules; see `find_blocks`.
        shortened: the model runs under autocast, and what that shortens travels in the short type.
        twice: names of modules that run again in the backward pass: blocks in them are gathered
            then anyway.
        home: where rows, gradients and optimizer state live; None is where the parameters are.
        stages: None: all of the model is here. Parameters that this rank has not stay as they are.
    """
    modules, made = dict(model.named_modules()), list[Block]()
    left = {id(p): (name, p) for name, p in model.named_parameters()}
    if stages is not None:
        left = {key: named for key, named in left.items() if named[0] in stages.here}
    spare = Spare()

    def cut(name: str, parameters: Sequence[Parameter], again: bool) -> list[Block]:
        kinds = _by_kind(model, parameters, shortened)
        found = [
            Block(name, group, owners_of(model, group), link, shortens, again, home, spare)
            for (_, _, shortens), group in kinds
        ]
        made.extend(found)
        return found

    for name in blocks:
        module = modules[name]
        parameters = [left.pop(id(p))[1] for p in module.parameters() if id(p) in left]
        if own := cut(name, parameters, not _is_inside(name, twice)):
            module.forward = _gathering(module.forward, functools.partial(list, own))
    groups: dict[frozenset[int], list[Parameter]] = {}
    for name, parameter in left.values():
        users = frozenset[int]() if stages is None else stages.users(name)
        groups.setdefault(users, []).append(parameter)
    rest = [(users, cut("", group, stages is not None)) for users, group in groups.items()]

    def chosen() -> list[Block]:
        stage = None if stages is None else stages.running()
        return [each for users, own in rest if stage is None or stage in users for each in own]

    if rest:
        model.forward = _gathering(model.forward, chosen)
    return made


def _is_inside(name: str, others: Sequence[str]) -> bool:
    return any(name == other or name.startswith(f"{other}.") for other in others)


def _by_kind(
    model: nn.Module, parameters: Sequence[Parameter], shortened: bool
) -> list[tuple[tuple[torch.dtype, bool, bool], list[Parameter]]]:
    """What may travel as one: of one type, learned or not, shortened by autocast or not."""
    kinds: dict[tuple[torch.dtype, bool, bool], list[Parameter]] = {}
    for parameter, owners in zip(parameters, owners_of(model, parameters), strict=True):
        is_matrix = parameter.dim() > 1 and parameter.dtype == torch.float32
        shortens = shortened and is_matrix and all(isinstance(module, CAST) for module, _ in owners)
        kind = (parameter.dtype, parameter.requires_grad, shortens)
        kinds.setdefault(kind, []).append(parameter)
    return list(kinds.items())


def _gathering(
    inner: Callable[..., Any], blocks: Callable[[], Sequence[Block]]
) -> Callable[..., Any]:
    """A module's forward, for which its parameters are brought together."""

    @functools.wraps(inner)
    def forward(*args: Any, **kwargs: Any) -> Any:
        here = blocks()
        with gathered(here) if here else nullcontext():
            return inner(*args, **kwargs)

    return forward
