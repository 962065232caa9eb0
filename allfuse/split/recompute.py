"""Blocks of a model that keep only what goes in, and run again when their gradient is computed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from allfuse.base.errors import UserError


def repeated_blocks(model: nn.Module) -> list[str]:
    """Names of the outermost modules with parts of their own of which another module holds several
    of one class, as a transformer does its layers.

    >>> repeated_blocks(nn.Sequential(*(nn.Sequential(nn.Linear(2, 2)) for _ in range(3))))
    ['0', '1', '2']
    """
    return list(_look_into(model, ""))


def _look_into(module: nn.Module, name: str) -> Iterator[str]:
    children = {f"{name}.{key}" if name else key: each for key, each in module.named_children()}
    kinds = [type(each) for each in children.values() if _has_parts(each)]
    for path, child in children.items():
        if _has_parts(child) and kinds.count(type(child)) > 1 and not _holds_only(child):
            yield path
        else:
            yield from _look_into(child, path)


def _has_parts(module: nn.Module) -> bool:
    learns = any(True for _ in module.parameters())
    return learns and any(True for _ in module.children())


def _holds_only(module: nn.Module) -> bool:
    """Whether a module is a list or a dict of others, which nobody calls."""
    return isinstance(module, nn.ModuleList | nn.ModuleDict)


def recompute_blocks(model: nn.Module, apart: Collection[str] = ()) -> None:
    """Have the repeated blocks of a model run again in the backward pass, in place.

    The numbers are those of a model that keeps everything, random ones included. Costs one forward
    pass more for each step; of activations what goes into each block stays, and those of one block
    at a time.

    Args:
        apart: names of modules before which a model is cut into stages. Blocks that they are parts
            of keep everything.

    Raises:
        UserError: there are no such blocks.
    """
    names = repeated_blocks(model)
    if not names:
        raise UserError(
            f"recompute=True: {type(model).__name__} has no blocks that repeat; allowed: models "
            "with several modules of one class that have parts of their own, such as the layers of "
            "a transformer; next: recompute=False, and accumulate= to save memory"
        )
    modules = dict(model.named_modules())
    for name in names:
        if any(other.startswith(f"{name}.") for other in apart):
            continue
        modules[name].forward = _recomputed(modules[name])


def _recomputed(module: nn.Module) -> Callable[..., Any]:
    inner = module.forward
    buffers = [buffer for buffer in module.buffers() if buffer is not None]

    def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        return nullcontext(), _unchanged(buffers)

    options: dict[str, Any] = {"context_fn": contexts} if buffers else {}

    @functools.wraps(inner)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return inner(*args, **kwargs)
        return checkpoint(inner, *args, use_reentrant=False, **options, **kwargs)

    return forward


@contextmanager
def _unchanged(buffers: Sequence[Tensor]) -> Iterator[None]:
    """What a pass makes of buffers (running statistics) counts once."""
    before = [buffer.detach().clone() for buffer in buffers]
    try:
        yield
    finally:
        for buffer, kept in zip(buffers, before, strict=True):
            buffer.data.copy_(kept)  # autograd may have saved it, and looks at its version
