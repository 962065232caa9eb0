"""Writes models that ranks share, one tensor at a time, so that no rank ever has all of one."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from allfuse.split.parted import Parted
from allfuse.store.writing import StandIns

if TYPE_CHECKING:
    from allfuse.store.run import RunFolder
    from allfuse.training.session import Session


def export_shared(s: Session, folder: RunFolder | None, stem: str) -> None:
    """Write the model that the ranks of a session share to a run folder, which the first rank may
    have, as `Keeper.export` does. All call it."""
    assert isinstance(s.split, Parted)
    if s.place.mates.members[0] != 0:
        return  # another replica writes
    ((name, model),) = s.models.items()
    in_turn = InTurn(s.split, model.state_dict())
    s.keeper.export({name: in_turn.state_dict()}, folder, fill=in_turn.fill, stem=stem)
    in_turn.finish()


class InTurn:
    """The whole tensors of a model, each brought together on the first rank of a replica when its
    turn comes, in the order in which they are written.

    Args:
        values: the state dict that this rank has.
    """

    def __init__(self, split: Parted, values: Mapping[str, Any]) -> None:
        self.split, self.values = split, values
        kept: dict[str, str] = {}  # of tied names the first in alphabetical order, as in the file
        for name in sorted(split.kept):
            kept.setdefault(split.first_names[name], name)
        self._as_kept = {name: kept[split.first_names[name]] for name in split.kept}
        self._order = sorted(kept.values(), key=lambda name: -split.held[name].dtype.itemsize)
        self._stand_ins, self._next = StandIns(), 0

    def state_dict(self) -> dict[str, Any]:
        """With stand-ins for the tensors; tied names have the same one."""
        made = {}
        for at, name in enumerate(self._order):
            held = self.split.held[name]
            read = functools.partial(self._assemble, at)
            made[name] = self._stand_ins.make(held.dtype, held.whole, read)
        own = {name: self.values[name] for name in self.values if name not in self._as_kept}
        return own | {name: made[kept] for name, kept in self._as_kept.items()}

    def fill(self, tensor: Tensor) -> Tensor:
        """What a stand-in stands for."""
        return self._stand_ins.fill(tensor)

    def _assemble(self, at: int) -> Tensor:
        self._skip_to(at)
        name = self._order[at]
        self._next = at + 1
        found = self.split.assemble(name, self.values.get(name))
        assert found is not None
        return found

    def _skip_to(self, end: int) -> None:
        for name in self._order[self._next : end]:
            self.split.assemble(name, self.values.get(name))
        self._next = max(self._next, end)

    def finish(self) -> None:
        """Take part in what is left: all of it on ranks that do not write, nothing where all was
        written."""
        self._skip_to(len(self._order))
