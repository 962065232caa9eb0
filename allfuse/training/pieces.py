"""What a learner must not do, or have done to it, where ranks have pieces of parameters."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from allfuse.base.errors import UserError
from allfuse.roles.elementwise import PER_ELEMENT, REASONS

STEPS = 3
SHAPE = (12, 8)  # of the matrix on which optimizers are tried


class Untouched:
    """Notices changes in place of tensors between two moments.

    What is done to `tensor.data` is not seen: torch does not count it.
    """

    def __init__(self) -> None:
        self._seen: dict[str, tuple[Tensor, int]] = {}

    def note(self, tensors: Mapping[str, Tensor]) -> None:
        """These are as they should be."""
        self._seen = {name: (tensor, tensor._version) for name, tensor in tensors.items()}

    def changed(self) -> list[str]:
        """The names of those that were changed since."""
        return [name for name, (t, version) in self._seen.items() if t._version != version]


def refuse_changed_weights(names: Iterable[str]) -> None:
    """Refuse weights that were changed by others than the optimizer.

    Raises:
        UserError: names the first of them.
    """
    for name in names:
        module = name.rpartition(".")[0] or name
        raise UserError(
            f"{name} was changed in place by other code than its optimizer, and this rank has a "
            "piece of it: what reads or draws several of its numbers goes wrong; allowed: changes "
            f"of modules that stay whole; next: keep_whole=[{module!r}] under tensor(n), or a plan "
            "that leaves the model whole, such as data(n)"
        )


def refuse_changed_gradients(names: Iterable[str]) -> None:
    """Refuse gradients that were changed between backward and step, such as by torch's clipping,
    which would take the norm of a piece.

    Raises:
        UserError: names the first of them.
    """
    for name in names:
        raise UserError(
            f"the gradient of {name} was changed between s.backward and optimizer.step(), and "
            "this rank has a piece of it, whose norm is not that of the whole; allowed: clipping "
            "by the session, which knows the whole norm; next: af.session(clip=1.0) instead of "
            "clip_grad_norm_, or a plan that leaves the model whole, such as data(n)"
        )


def check_optimizer(optimizer: Optimizer, cut: Collection[int]) -> None:
    """Refuse an optimizer that does not treat each element by itself, where it holds pieces.

    Args:
        cut: the `id` of each parameter of which this rank has a piece.

    Raises:
        UserError: what becomes of an element depends on others.
    """
    groups = [g for g in optimizer.param_groups if any(id(p) in cut for p in g["params"])]
    for group in groups:
        if works_per_element(optimizer, group):
            continue
        name = type(optimizer).__name__
        why = REASONS.get(name, "what becomes of an element depends on others")
        raise UserError(
            f"the optimizer {name} cannot step a model that is cut: {why}, and each rank has a "
            f"piece of a tensor; allowed: those that treat each element by itself, such as "
            f"{', '.join(PER_ELEMENT)}; next: one of these, or a plan that leaves the model whole"
        )


def works_per_element(optimizer: Optimizer, group: Mapping[str, Any]) -> bool:
    """Whether a matrix comes to the same as its halves, by rows and by columns, to rounding:
    measured over some steps of a copy of the optimizer. False where it cannot be tried."""
    device = next((p.device for p in group["params"]), torch.device("cpu"))
    chance = torch.Generator().manual_seed(0)
    drawn = torch.randn(STEPS + 1, *SHAPE, generator=chance).to(device)
    try:
        whole = _walk(optimizer, group, [drawn])
        halves = [torch.cat(_walk(optimizer, group, drawn.chunk(2, d + 1)), d) for d in (0, 1)]
    except (TypeError, ValueError, RuntimeError, AttributeError, KeyError):
        return False
    return all(torch.allclose(whole[0], each, rtol=1e-4, atol=1e-6) for each in halves)


def _walk(optimizer: Optimizer, group: Mapping[str, Any], parts: Iterable[Tensor]) -> list[Tensor]:
    """Where parameters come to that begin at the first of the values given for each, with the
    others for gradients."""
    values = list(parts)
    held = [Parameter(each[0].clone()) for each in values]
    tried = _bare(optimizer)
    tried.param_groups = [{**_copied(group), "params": held}]
    for step in range(STEPS):
        for parameter, each in zip(held, values, strict=True):
            parameter.grad = each[step + 1].clone()
        type(tried).step(tried)
    return [parameter.detach() for parameter in held]


def _bare(optimizer: Optimizer) -> Optimizer:
    """The same optimizer without state, and without whoever listens to its steps."""
    made = copy.copy(optimizer)  # by its __setstate__: with no hooks
    for name, value in vars(optimizer).items():
        if name not in vars(made) and name != "step":  # schedulers put their own in its place
            setattr(made, name, value)
    made.state = defaultdict(dict)
    return made


def _copied(group: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: value.clone() if isinstance(value, Tensor) else value
        for name, value in group.items()
        if name != "params"
    }
