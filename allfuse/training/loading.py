"""A rank's loader for any kind of data."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from allfuse.base.errors import DataError, UserError
from allfuse.split.data import BatchPlan, IterableLoader, Loader, Source, Stream, plan_batches

if TYPE_CHECKING:
    from allfuse.training.balance import Balance
    from allfuse.training.place import Place


@dataclass(frozen=True, kw_only=True)
class Order:
    """How samples are put into batches. None takes what a DataLoader says of itself."""

    batch_size: int | None = None
    seed: int = 0
    shuffle: bool | None = None
    drop_last: bool | None = None
    loaders: int | None = None

    def record(self) -> dict[str, Any]:
        """What a run keeps when it is resumed."""
        return {"seed": self.seed, "shuffle": self.shuffle, "drop_last": self.drop_last}


def make_loader(
    source: Source | Stream,
    order: Order,
    place: Place,
    balance: Balance | None = None,
    *,
    agrees: bool = True,
) -> Loader | IterableLoader:
    """This rank's loader; with `balance` it decides the shares of each batch.

    Args:
        agrees: find out how far ahead the loaders of other ranks read; else that is known.

    Raises:
        UserError: more replicas than samples in a batch.
        DataError: no batch size, what the data itself decides was given, or a stream is to be
            balanced.
    """
    pin = place.device.type == "cuda"
    if isinstance(source, Stream):
        if balance is not None:
            raise DataError(
                f"{place.plan}: the data is a stream, whose samples replicas take in turns; "
                "balance=speed needs samples that can be fetched by their number; next: a data "
                "set with a length, or balance=even"
            )
        size = order.batch_size or source.settings.batch_size
        if size is None:
            raise DataError(
                "batch_size is missing; give the samples of a step, all workers together"
            )
        refuse_small(size, place)
        return IterableLoader(
            source,
            size,
            parts=place.parts,
            index=place.index,
            agree=lambda rows: agree_on_rows(rows, place),
            seed=order.seed,
            drop_last=bool(
                source.settings.drop_last if order.drop_last is None else order.drop_last
            ),
            pin_memory=pin,
        )
    plan = plan_batches(
        source,
        batch_size=order.batch_size,
        seed=order.seed,
        shuffle=order.shuffle,
        drop_last=order.drop_last,
    )
    if isinstance(plan, BatchPlan):
        refuse_small(plan.batch_size, place)
    loader = Loader(
        source,
        plan,
        parts=place.parts,
        index=place.index,
        processes=source.settings.processes if order.loaders is None else order.loaders,
        cut=None if balance is None else balance.cut,
        pin_memory=pin,
    )
    if balance is not None and agrees:  # hosts may have other numbers of loader processes
        balance.ahead = max(agree_on_rows(loader.ahead, place))
    return loader


def order_of_all(source: Source | Stream, batch_size: int | None, place: Place) -> Order:
    """Every sample once, in order, for measuring. A sampler of the data's own still decides."""
    settings = source.settings
    if settings.batch_sampler is not None:
        return Order()
    size = batch_size or settings.batch_size or 64 * place.parts
    return Order(
        batch_size=max(size, place.parts),
        shuffle=None if settings.sampler is not None or isinstance(source, Stream) else False,
        drop_last=False,
    )


def batch_size_of(loader: Loader | IterableLoader) -> int | None:
    """Samples of one step, or None where a sampler of the user's own decides."""
    if isinstance(loader, IterableLoader):
        return loader.batch_size
    return loader.plan.batch_size if isinstance(loader.plan, BatchPlan) else None


def refuse_small(batch_size: int, place: Place) -> None:
    if batch_size < place.parts:
        raise UserError(
            f"batch_size={batch_size}: plan {place.plan} cuts each batch into {place.parts} "
            f"shares; allowed: a batch_size of at least {place.parts}, or fewer workers"
        )


DATA_DIFFERS = (
    "the training data of rank {other} is not that of rank {first}; allowed: the same samples in "
    "the same order on every rank, of which allfuse gives each its share; next: seed what the "
    "script draws, and leave sharding to allfuse"
)
MODEL_DIFFERS = (
    "the model of rank {other} is not that of rank {first}; allowed: parameters and buffers of the "
    "same names, shapes and types on every rank; next: build it the same way everywhere"
)


def refuse_unequal(fingerprint: str, place: Place, message: str) -> None:
    """Refuse what differs from rank to rank.

    Raises:
        DataError: on all ranks alike.
    """
    link = place.everyone
    slots = torch.zeros(link.size, dtype=torch.int64, device=place.device)
    slots[link.rank] = zlib.crc32(fingerprint.encode())
    link.all_reduce(slots, "compare all ranks").wait()
    seen = slots.tolist()
    for rank, value in zip(link.members, seen, strict=True):
        if value != seen[0]:
            raise DataError(message.format(other=rank, first=link.members[0]))


def agree_on_rows(rows: int, place: Place) -> tuple[int, ...]:
    """How many samples each replica has for the next step of a stream of unknown length."""
    slots: Any = torch.zeros(place.parts, dtype=torch.int64, device=place.device)
    slots[place.index] = rows
    place.replicas.all_reduce(slots, "agree on samples").wait()
    return tuple(int(value) for value in slots)
