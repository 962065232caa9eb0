"""The numbers of a model that is built already, and gets them when it is known who needs which."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from allfuse.base.heap import Returns
from allfuse.split.absent import Absent
from allfuse.split.hollow import hollow, is_hollow
from allfuse.split.piece import Piece, whole_piece

Remake = Callable[[], Tensor]
"""Gives the whole of a tensor, which may lie in a file still."""


class Pending:
    """Parameters of a model without numbers, and where these come from.

    They are all 0, and cannot be changed in place, until somebody says which pieces are needed.

    Args:
        remakes: by parameter.
        digest: of where they come from: equal where the numbers are.
    """

    def __init__(
        self, model: nn.Module, remakes: Mapping[nn.Parameter, Remake], digest: int = 0
    ) -> None:
        self.model, self.digest = model, digest
        self._remakes = dict(remakes)
        self._handles: list[Any] = []
        for parameter in self._remakes:
            _empty(parameter, parameter.device)

    def __contains__(self, tensor: object) -> bool:
        return tensor in self._remakes if isinstance(tensor, nn.Parameter) else False

    def __len__(self) -> int:
        return len(self._remakes)

    def take(self, parameter: nn.Parameter, remake: Remake) -> None:
        """Have a parameter's numbers come from elsewhere."""
        self._remakes[parameter] = remake

    def move(self, device: torch.device) -> None:
        """Have the parameters be on a device."""
        for parameter in self._remakes:
            _empty(parameter, device)

    def guard(self) -> None:
        """Until the numbers come, whoever reads or changes a parameter gets an error that says so;
        a model that is run or loaded gets all of them before."""

        def before(*_: Any) -> None:
            self.fill()

        for parameter in self._remakes:
            parameter.__class__ = Absent
        self._handles = [self.model.register_forward_pre_hook(before)]
        for module in self.model.modules():
            self._handles.append(module.register_load_state_dict_pre_hook(before))

    @torch.no_grad()
    def fill(self, pieces: Mapping[str, Piece | None] | None = None) -> None:
        """Give each parameter its numbers, or a piece of them, in the model's order; at any time
        one tensor is whole beside what this rank keeps.

        Args:
            pieces: what is needed of those that are not needed whole; None: nothing.
        """
        self.stop_guarding()
        pieces, returns = pieces or {}, Returns()
        for name, parameter in self.model.named_parameters():
            remake = self._remakes.pop(parameter, None)
            if remake is None:
                continue
            piece = pieces.get(name, whole_piece(tuple(parameter.shape)))
            if piece is not None:
                returns.freed(_fill(parameter, piece, remake))

    def stop_guarding(self) -> None:
        """The parameters are as others are: when somebody who knows of it cuts the model."""
        for parameter in self._remakes:
            parameter.__class__ = nn.Parameter
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def _fill(parameter: nn.Parameter, piece: Piece, remake: Remake) -> int:
    """The bytes that were needed for it, and are not any more."""
    whole = remake()
    if is_hollow(parameter):
        like = whole if piece.own == piece.whole else whole.new_empty(piece.own, device="meta")
        parameter.data = torch.empty_like(like, dtype=parameter.dtype, device=parameter.device)
    piece.load(parameter.data, whole)
    return whole.nbytes


def _empty(parameter: nn.Parameter, device: torch.device) -> None:
    """Take its memory from a parameter, and have it be on a device."""
    parameter.data = hollow(parameter.shape, parameter.dtype, device)
