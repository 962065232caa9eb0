"""What the scheduler orders, as servers read it."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from allfuse.link.post import Malformed
from allfuse.roles.cutting import Piece
from allfuse.roles.records import split_readers
from allfuse.roles.shard import Shard
from allfuse.roles.stage import Stage


class Order(NamedTuple):
    """An entry of `Orders`, checked."""

    leases: list[tuple[int, float]]
    to: list[str]
    dropped: list[int]
    save: bool
    factor: float = 1.0
    of: Mapping[str, int] = MappingProxyType({})

    def gets(self, worker: str, piece: Piece) -> bool:
        """Whether one of those in `to` gets a piece of the weights."""
        return self.of.get(worker, piece.fragment) == piece.fragment

    @property
    def ended(self) -> list[int]:
        """Leases of which nothing is kept from then on."""
        return [*(lease for lease, _ in self.leases), *self.dropped]


def carry_out(order: Order, piece: int, shard: Shard, stage: Stage) -> None:
    """Step a piece by the updates of an order, with the options that came with the first."""
    bundles = [(weight, stage.get(lease)) for lease, weight in order.leases]
    pushes = [(weight, each.pieces[piece]) for weight, each in bundles if piece in each.pieces]
    if pushes:  # else they are of another fragment
        shard.update(piece, pushes, bundles[0][1].options, order.factor)


def read_order(entry: list[Any]) -> Order:
    """
    Raises:
        Malformed: it is no order.
    """
    match entry:
        case [list() as leases, list() as to, list() as dropped, bool() as save, *more]:
            pairs = [pair for pair in leases if is_weighted(pair)]
            names = all(is_reader(each) for each in to)
            fits = not more or (len(more) == 1 and isinstance(more[0], float))
            whole = len(pairs) == len(leases) and names and fits
            if whole and all(type(n) is int for n in dropped):
                leases = [(lease, weight) for lease, weight in pairs]
                to, of = split_readers(to)
                return Order(leases, to, dropped, save, more[0] if more else 1.0, of)
    raise Malformed(f"an order {str(entry)[:80]}")


def is_reader(entry: object) -> bool:
    """Whether it is who gets weights: a name, or a name and a fragment."""
    match entry:
        case str() | [str(), int()]:
            return True
    return False


def is_weighted(pair: object) -> bool:
    """Whether it is a lease and its weight."""
    match pair:
        case [int(), int() | float()]:
            return True
    return False
