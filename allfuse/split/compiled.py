"""Blocks of a model that is cut, made into programs by torch.compile.

What ranks send each other is no part of a program: modules in which they meet run as they are, and
what is computed between them is compiled.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import nn

from allfuse.base.errors import UserError
from allfuse.split.recompute import repeated_blocks
from allfuse.split.record import is_recording


def blocks_to_compile(model: nn.Module, apart: Collection[str] = ()) -> list[str]:
    """Names of the repeated blocks of a model.

    Args:
        apart: names of modules before which it is cut into stages. Blocks that they are parts of
            run as they are.

    Raises:
        UserError: there are none.
    """
    names = repeated_blocks(model)
    if not names:
        raise UserError(
            f"compile=True: {type(model).__name__} has no blocks that repeat, which are what is "
            "compiled of a model that is cut; allowed: models with several modules of one class "
            "that have parts of their own, such as the layers of a transformer; next: "
            "compile=False"
        )
    return [name for name in names if not any(other.startswith(f"{name}.") for other in apart)]


def compile_blocks(model: nn.Module, names: Iterable[str]) -> None:
    """Have these modules go through torch.compile, in place; not where a pass is only followed."""
    modules = dict(model.named_modules())
    for name in names:
        modules[name].forward = _compiled(modules[name])


def _compiled(module: nn.Module) -> Any:
    inner = module.forward
    program = torch.compile(inner)

    @functools.wraps(inner)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return (inner if is_recording() else program)(*args, **kwargs)

    return forward


def keep_uncompiled(modules: Iterable[nn.Module]) -> None:
    """Have modules in which ranks meet run as they are, with all that they call."""
    for module in modules:
        module.forward = torch.compiler.disable(module.forward)
