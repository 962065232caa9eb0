"""What a job wants of how its model is cut."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from allfuse.base.errors import UserError, nearest

MOST_NAMES = 12  # in a message


@dataclass(frozen=True)
class Request:
    """Modules and parameters by their names; `*` stands for any part of one.

    Attributes:
        keep_whole: those that `tensor(n)` does not cut.
        cut_also: those that it cuts however small they are.
        recompute: whether blocks run again in the backward pass; see `recompute_blocks`.
        compile: whether blocks go through torch.compile; see `compile_blocks`.
        loss: of outputs and a batch, which the last stage of a pipeline computes, so that its time
            is the last one's; None where it is not known.

    Example:
        Request(keep_whole=("lm_head", "layers.*.attention"))
    """

    keep_whole: tuple[str, ...] = ()
    cut_also: tuple[str, ...] = ()
    recompute: bool = False
    compile: bool = False
    loss: Callable[[Any, Any], Any] | None = None

    def kept(self, model: nn.Module) -> dict[str, str]:
        """The parameters of a model that stay whole, by their first names, with the reason."""
        return {
            name: f"the job keeps {pattern} whole"
            for pattern in self.keep_whole
            for name in find_parameters(model, pattern, "keep_whole")
        }

    def also(self, model: nn.Module) -> list[str]:
        """Those that are to be cut however small they are.

        Raises:
            UserError: one of them is to stay whole, too.
        """
        kept = self.kept(model)
        found = dict.fromkeys(
            name
            for pattern in self.cut_also
            for name in find_parameters(model, pattern, "cut_also")
        )
        both = [name for name in found if name in kept]
        if both:
            raise UserError(
                f"{both[0]} is in both keep_whole={list(self.keep_whole)} and "
                f"cut_also={list(self.cut_also)}; allowed: one of the two"
            )
        return list(found)


NO_WISHES = Request()


def find_parameters(model: nn.Module, pattern: str, field: str) -> list[str]:
    """First names of the parameters that a pattern names, or that are in modules that it names.

    Raises:
        UserError: it names none.
    """
    first: dict[int, str] = {}
    for name, parameter in model.named_parameters():
        first.setdefault(id(parameter), name)
    modules = [name for name, _ in model.named_modules() if name]
    inside = tuple(f"{name}." for name in modules if fnmatchcase(name, pattern))
    found = {
        first[id(parameter)]: None
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if fnmatchcase(name, pattern) or name.startswith(inside)
    }
    if not found:
        raise UserError(
            f"{field}: the model has nothing with parameters called {pattern!r}"
            f"{nearest(pattern, modules)}; allowed: names of modules or parameters, with * for any "
            f"part: {_listed(modules)}"
        )
    return list(found)


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:MOST_NAMES])
    return shown + (f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else "")


def make_request(owner: str, keep_whole: object, cut_also: object) -> Request:
    """A request of lists of names.

    Raises:
        UserError: one is no list of names.
    """
    return Request(_names(owner, "keep_whole", keep_whole), _names(owner, "cut_also", cut_also))


def _names(owner: str, field: str, names: object) -> tuple[str, ...]:
    if isinstance(names, Sequence) and not isinstance(names, str):
        found = tuple(name for name in names if isinstance(name, str))
        if len(found) == len(names):
            return found
    raise UserError(
        f"{owner}({field}={names!r}): allowed: a list of names of modules, such as "
        f'{field}=["lm_head"]'
    )
