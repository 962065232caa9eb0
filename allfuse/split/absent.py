"""Parameters whose numbers are not here: they tell their shape, and refuse everything else."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from allfuse.base.errors import UserError

ABOUT = frozenset(
    [
        "size",
        "dim",
        "ndimension",
        "numel",
        "nelement",
        "stride",
        "storage_offset",
        "is_contiguous",
        "element_size",
        "is_floating_point",
        "is_complex",
        "is_signed",
        "get_device",
        "__len__",
        "__hash__",
        "requires_grad_",
        "register_hook",
        "register_post_accumulate_grad_hook",
        "empty_like",
        "zeros_like",
        "ones_like",
        "full_like",
        "new_empty",
        "new_zeros",
        "new_ones",
        "new_full",
        "new_tensor",
    ]
)
"""Functions that do not look at numbers."""
ALIKE = frozenset({"detach", "data", "view_as"})
"""Functions and attributes that give the same numbers once more, which are not here either."""
NUMBERS = frozenset({"T", "mT", "H", "mH", "real", "imag"})
"""Attributes that are tensors."""

NOT_HERE = (
    "the numbers of this weight are not here yet: a model that several ranks share gets them, "
    "piece by piece, when the loop over s.batches(...) begins; allowed until then: shapes, "
    "optimizers, load_state_dict on the model, a forward pass; next: change weights in the "
    "function that builds the model, or give s.model a module that is built already, which has "
    "all numbers on every rank"
)


class Absent(nn.Parameter):
    """What a parameter is until it has its numbers: its class is changed, so that it stays the same
    object."""

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name, sets = function.__name__, False
        if name in ("__get__", "__set__", "__delete__"):
            name, sets = function.__self__.__name__, name != "__get__"
            is_about = name not in NUMBERS | ALIKE
        else:
            is_about = name in ABOUT
        if not is_about and (sets or name not in ALIKE):
            raise UserError(f"{name} of a weight: {NOT_HERE}")
        result = _plain(function, types, args, kwargs or {})
        if isinstance(result, Tensor) and name in ALIKE:
            result.__class__ = cls
        return result

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"a parameter of shape {tuple(self.shape)}, whose numbers are not here yet"


def _plain(function: Any, types: Any, args: Any, named: Any) -> Any:
    return nn.Parameter.__torch_function__(function, types, args, named)
