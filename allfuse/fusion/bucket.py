"""Gradients of some parameters end to end, so that they travel as one."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from allfuse.base.errors import UserError
from allfuse.base.torch_private import foreach_copy, storage_users
from allfuse.codec.memory import Memory
from allfuse.link import Work

SMALL_BYTES = 32_000  # gradients below are copied together: one call costs more than the bytes


class Bucket:
    """Gradients of some parameters end to end in one flat tensor, then one flag for each.

    A flag is 1 where this rank has a gradient. Summed, it says whether any rank has one, as one
    process would: a parameter that nobody used keeps `grad=None`, so its optimizer skips it.

    After the flags there may be words: numbers that ranks tell each other (see `carry`). Both are
    the `tail`, which is summed whatever becomes of the gradients.
    """

    def __init__(
        self,
        number: int,
        names: list[str],
        parameters: list[Parameter],
        words: int = 0,
        memory: Memory | None = None,
    ) -> None:
        self.names, self.parameters, self._words = names, parameters, words
        self.memory = memory
        self.tail = len(parameters) + words
        self.operation = f"fuse gradients, bucket {number}"
        self.missing = len(parameters)
        self.large = [parameter.nbytes >= SMALL_BYTES for parameter in parameters]
        self.work: Work | None = None
        self._small = [place for place, is_large in enumerate(self.large) if not is_large]
        self._has_all = True
        self._begun = False  # whether a gradient of this step is in
        self._allocate()

    def _allocate(self) -> None:
        counts = [parameter.numel() for parameter in self.parameters]
        first = self.parameters[0]
        sizes = [*counts, len(counts), self._words]
        flat = torch.zeros(sum(sizes), dtype=first.dtype, device=first.device)
        *pieces, self.flags, self.words = flat.split(sizes)
        self.flat, self.values = flat, flat[: sum(counts)]
        self.views = [
            piece.as_strided(parameter.shape, torch.empty_like(parameter, device="meta").stride())
            for piece, parameter in zip(pieces, self.parameters, strict=True)
        ]  # with the strides of the parameters, as autograd makes gradients
        del pieces  # what is left is held by this bucket alone
        self._holders, self._users = _count_holders(list(self.views)), storage_users(flat)

    def _is_kept(self) -> bool:
        """Whether a script still holds gradients that live here and would be written over."""
        stale = [
            view
            for view, parameter in zip(self.views, self.parameters, strict=True)
            if parameter.grad is not view
        ]
        return bool(stale) and (
            _count_holders(stale) > self._holders or storage_users(self.flat) > self._users
        )

    def take(self, places: Sequence[int]) -> None:
        """Copy gradients in: large ones each as soon as it is final, while still in the cache.

        What a script keeps of the step before stays as it is. A gradient that is its view already
        (after zero_grad(set_to_none=False), or taken before) stays too.
        """
        if not self._begun:
            self._begun = True
            if self._is_kept():
                self._allocate()
        views: list[Tensor] = []
        gradients: list[Tensor] = []
        for place in places:
            parameter, view = self.parameters[place], self.views[place]
            gradient = parameter.grad
            if gradient is view:
                continue
            if gradient is None:
                view.zero_()
                self._has_all = False
                continue
            if gradient.layout != torch.strided:
                raise sparse_gradient(self.names[place])
            views.append(view)
            gradients.append(gradient.detach() if gradient.requires_grad else gradient)
            parameter.grad = view  # frees what autograd made, for the layers that still come
        if views:
            foreach_copy(views, gradients)

    def fill(self) -> None:
        """Take what is not taken yet, and say where there are gradients."""
        if self.missing:  # some were never said to be final, small or large
            self.take(range(len(self.parameters)))
        elif self._small:
            self.take(self._small)
        if self._has_all:
            self.flags.fill_(1)
        else:
            has = [float(parameter.grad is not None) for parameter in self.parameters]
            self.flags.copy_(torch.tensor(has))

    def hand_out(self) -> None:
        """Make each `grad` a view into the sums; None where no rank had one."""
        used = None if self._has_all else self.flags.tolist()
        for place, parameter in enumerate(self.parameters):
            fused = self.views[place] if used is None or used[place] else None
            if parameter.grad is not fused:
                parameter.grad = fused
        self.reset()

    def reset(self) -> None:
        self.work, self.missing = None, len(self.parameters)
        self._begun, self._has_all = False, True


def sparse_gradient(name: str) -> UserError:
    return UserError(
        f"the gradient of {name} is sparse; allowed: dense gradients; next: build the embedding "
        "with sparse=False"
    )


def _count_holders(views: list[Tensor]) -> int:
    """The most that one of them is referred to."""
    return max(map(sys.getrefcount, views))
