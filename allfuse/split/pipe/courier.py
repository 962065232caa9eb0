"""What the stages of one pass over some microbatches send each other.

No headers: both sides know the shapes, and both know from the schedule what comes in which order.
For each microbatch a stage sends what it passes on, and gets as many bytes of gradients back.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from allfuse.base.errors import UserError
from allfuse.link import Link, Work
from allfuse.plan.schedule import Order
from allfuse.split.pipe.itinerary import (
    Exchange,
    Parcel,
    order_exchanges,
    parcel_of,
    taken_by,
)


class Courier:
    """Brings parcels from stage to stage.

    Between one rank and another they come in the order in which the schedule of the sender makes
    them; those that come before they are asked for are kept. What was sent is held until something
    comes that its taker did later, so that no more is held than a schedule needs.

    Where transfers wait in a queue (NCCL) all ranks begin with them in the order of an itinerary,
    so that none wait for each other for ever.

    Args:
        link: to the ranks of the pipeline.
        orders: what each of them does.
        owner: the rank that has a stage.
        empty: a tensor for what crosses after a stage, in a microbatch.
    """

    def __init__(
        self,
        link: Link,
        orders: Sequence[Order],
        stages: int,
        owner: Callable[[int], int],
        empty: Callable[[int, int], Tensor],
    ) -> None:
        self.link, self.owner, self.empty = link, owner, empty
        self.waited_s = 0.0
        self._here: dict[Parcel, Tensor] = {}
        self._sent: dict[int, deque[tuple[Work, Tensor]]] = {}  # by peer, those that are held
        self._gone: Counter[int] = Counter()  # those that are not held any more
        self._coming: dict[int, deque[tuple[Parcel, int]]] = {}
        self._stages, self._orders = stages, orders
        for peer in range(len(orders)):
            if peer != link.rank:
                self._sent[peer], self._coming[peer] = deque(), deque(self._expect(peer))
        self._ahead: deque[Exchange] = deque()
        if link.holds_back:
            self._ahead.extend(order_exchanges(orders, stages, owner)[link.rank])
        self._made: dict[Parcel, Tensor] = {}  # to leave with what comes at the same time
        self._under_way: dict[Parcel, tuple[Work, Tensor]] = {}

    def _expect(self, peer: int) -> Iterator[tuple[Parcel, int]]:
        """What a peer sends here, in order; with each how many from here it had by then."""
        mine = (parcel_of(action, self._stages) for action in self._orders[self.link.rank])
        own = [each for each in mine if each is not None and self._taker(each) == peer]
        places, had = {parcel: at for at, parcel in enumerate(own, start=1)}, 0
        for action in self._orders[peer]:
            taken = taken_by(action, self._stages)
            had = max(had, places.get(taken, 0) if taken is not None else 0)
            parcel = parcel_of(action, self._stages)
            if parcel is not None and self._taker(parcel) == self.link.rank:
                yield parcel, had

    def _taker(self, parcel: Parcel) -> int:
        return self.owner(parcel.taker)

    def _giver(self, parcel: Parcel) -> int:
        return self.owner(parcel.giver)

    @property
    def held(self) -> int:
        """How many tensors are held that were sent."""
        return sum(map(len, self._sent.values())) + len(self._made)

    def give(self, parcel: Parcel, tensor: Tensor) -> None:
        """Send a tensor on its way.

        Raises:
            UserError: it is not what its taker expects.
        """
        tensor = tensor.detach()
        peer = self._taker(parcel)
        if peer == self.link.rank:
            self._here[parcel] = tensor
            return
        expected = self.empty(parcel.crossing, parcel.microbatch)
        if tensor.shape != expected.shape or tensor.dtype != expected.dtype:
            raise UserError(
                f"stage {parcel.giver} passes on {_kind(tensor)} in microbatch "
                f"{parcel.microbatch}, and by the first samples it is {_kind(expected)}; allowed: "
                "a forward pass that goes the same way for all batches, whatever it counts or "
                "draws; next: such a model, or a plan without pipe"
            )
        sent = tensor.contiguous()
        if not self.link.holds_back:
            self._send(parcel, sent)
            return
        self._made[parcel] = sent
        self._begin_before(parcel)
        if self._ahead[0][-1] == parcel:  # else another one goes with it
            self._begin_next()

    def _send(self, parcel: Parcel, sent: Tensor) -> None:
        peer = self._taker(parcel)
        self._sent[peer].append((self.link.send(sent, peer, parcel.operation), sent))

    def _begin_before(self, parcel: Parcel) -> None:
        """Begin with all that is before a parcel in the itinerary."""
        while parcel not in self._ahead[0]:
            self._begin_next()

    def _begin_next(self) -> None:
        for parcel in self._ahead.popleft():
            if parcel in self._made:
                self._send(parcel, self._made.pop(parcel))
            else:
                self._begin_receiving(parcel, self._giver(parcel))
        self.link.start_held()

    def _begin_receiving(self, parcel: Parcel, peer: int) -> None:
        tensor = self.empty(parcel.crossing, parcel.microbatch)
        self._under_way[parcel] = self.link.receive(tensor, peer, parcel.operation), tensor

    def take(self, parcel: Parcel) -> Tensor:
        """What another stage gave. Waits for it. Raises PeerLost."""
        if parcel not in self._here:
            begin = time.perf_counter()
            peer = self._giver(parcel)
            while parcel not in self._here:
                self._receive(*self._coming[peer].popleft(), peer)
            self.waited_s += time.perf_counter() - begin
        return self._here.pop(parcel)

    def _receive(self, parcel: Parcel, had: int, peer: int) -> None:
        if not self.link.holds_back:
            self._begin_receiving(parcel, peer)
        elif parcel not in self._under_way:
            self._begin_before(parcel)
            self._begin_next()
        work, tensor = self._under_way.pop(parcel)
        work.wait()
        self._here[parcel] = tensor
        while self._gone[peer] < had:
            self._sent[peer].popleft()[0].wait()
            self._gone[peer] += 1

    def settle(self) -> None:
        """Wait until all that was sent has gone."""
        begin = time.perf_counter()
        for sent in self._sent.values():
            while sent:
                sent.popleft()[0].wait()
        self.waited_s += time.perf_counter() - begin


def greet(link: Link, device: torch.device) -> None:
    """Exchange a byte with every peer, all at once, before a first pass.

    NCCL connects two ranks when they first pass something on, by what each of them has asked for by
    then, and fails where one asks for both ways and the other for one: as stages do, of which the
    first sends and receives what the second has received alone.
    """
    works, operation = [], "connect stages"
    greetings = torch.zeros(2, link.size, 1, dtype=torch.uint8, device=device)
    for peer in range(link.size):
        if peer != link.rank:
            works.append(link.send(greetings[0, peer], peer, operation))
            works.append(link.receive(greetings[1, peer], peer, operation))
    for work in works:
        work.wait()


def _kind(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
