"""Cuts the state of a model evenly over ranks that share out each batch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import Parameter

from allfuse.link import Link
from allfuse.split.shard.blocks import owners_of
from allfuse.split.shard.gather import Block, gathered

CAST = (nn.Linear, nn.modules.conv._ConvNd)
"""Modules whose matrices autocast shortens before each use."""


def shard_model(
    model: nn.Module,
    blocks: Iterable[str],
    link: Link,
    *,
    shortened: bool = False,
    twice: Sequence[str] = (),
) -> list[Block]:
    """Keep this rank's rows of every parameter, in place; blocks bring them together when they run.

    Parameters keep their names and identities, and have the shapes of this rank's rows. Gradients
    are those of the sum of all ranks' losses. What is in no block is in memory from the beginning
    of the forward pass to the end of the backward pass.

    Args:
        blocks: names of modules; see `find_blocks`.
        shortened: the model runs under autocast, and what that shortens travels in the short type.
        twice: names of modules that run again in the backward pass: blocks in them are gathered
            then anyway.
    """
    modules = dict(model.named_modules())
    taken: set[int] = set()
    made = []
    for name in [*blocks, ""]:
        module, again = modules[name], bool(name) and not _is_inside(name, twice)
        parameters = [p for p in module.parameters() if id(p) not in taken]
        taken.update(map(id, parameters))
        own = [
            Block(name, group, owners_of(model, group), link, shortens, again)
            for (_, _, shortens), group in _by_kind(model, parameters, shortened)
        ]
        if own:
            module.forward = _gathering(module.forward, own)
        made += own
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


def _gathering(inner: Callable[..., Any], blocks: list[Block]) -> Callable[..., Any]:
    """A module's forward, for which its parameters are brought together."""

    @functools.wraps(inner)
    def forward(*args: Any, **kwargs: Any) -> Any:
        with gathered(blocks):
            return inner(*args, **kwargs)

    return forward
