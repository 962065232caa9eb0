"""How all ranks of a group follow what its first one hears from the scheduler.

Where they have the whole model, the first rank begins a lease and tells the others. Where they
share it, each gets its weights from the servers by itself (see `roles.limb`), so that a lease is
begun once all have them:

      first rank                        every other rank
        |--- what it heard, a lease ------> |     when its own weights are here
        |                               waits for its own
        |<------- ready, or not ----------- |     a sum over all
        |--- begun, or not ---------------> |     else another lease may come
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgpack
import torch

from allfuse.base.errors import PeerLost
from allfuse.roles.limb import Standing
from allfuse.roles.messages import MESSAGES, Lease, Message

if TYPE_CHECKING:
    from allfuse.roles.agent import Agent
    from allfuse.roles.limb import Limb
    from allfuse.training.place import Place


class Following:
    """Tells the ranks of a group, which all ask for the same at the same time.

    Raises:
        PeerLost: no weights came to one of them for as long as a wait may take.

    Args:
        agent: on the first rank.

    Attributes:
        limb: of a rank that has servers of its own to talk to.
        shares_model: whether there are such ranks.
    """

    def __init__(self, place: Place, agent: Agent | None) -> None:
        self.place, self._link, self._agent = place, place.everyone, agent
        self.limb: Limb | None = None
        self.shares_model = False
        self._told_s = 0.0  # when the others heard of the first rank last
        self._moved_s = 0.0  # when some weights came to a rank last

    def share_name(self, name: str) -> str:
        """The name of the worker, which the first rank has. Those of the first replica ask."""
        mates, device = self.place.mates, self.place.device
        if mates.size == 1:
            return name
        size = torch.tensor([len(name.encode())], device=device)
        mates.broadcast(size, "spread the name of a worker").wait()
        text = torch.zeros(int(size), dtype=torch.uint8, device=device)
        if name:
            text.copy_(torch.frombuffer(bytearray(name.encode()), dtype=torch.uint8))
        mates.broadcast(text, "spread the name of a worker").wait()
        return text.cpu().numpy().tobytes().decode()

    def next_lease(self) -> Lease:
        """The next lease, which all ranks have begun, or the end; raises as `Agent.next_lease`."""
        self._told_s = time.monotonic()
        if not self.shares_model:
            return self.share(None if self._agent is None else self._agent.next_lease())
        self._moved_s = time.monotonic()
        while True:
            lease = self.share(None if self._agent is None else self._agent.next_ready())
            if self._have_begun(lease):
                return lease
            waited_s = time.monotonic() - self._moved_s
            if waited_s > self.place.world.timeout_s:
                raise PeerLost(
                    "no weights came to one of the ranks that share the model",
                    rank=self.place.rank,
                    peer=None,
                    operation="wait for the weights of a lease",
                    step=lease.done,
                    seconds=waited_s,
                )

    def _have_begun(self, lease: Lease) -> bool:
        limb, agent = self.limb, self._agent
        standing = Standing.READY if limb is None else limb.await_lease()
        counts = torch.tensor(
            [float(standing is each) for each in (Standing.COMING, Standing.STUCK)],
            device=self.place.device,
        )
        self._link.all_reduce(counts, "find out whether all have their weights").wait()
        coming, stuck = counts.tolist()
        if agent is not None:
            agent.await_others(not (coming or stuck), get_some=bool(coming and not stuck))
        if coming:
            self._moved_s = time.monotonic()
        begun = not (coming or stuck) and (agent is None or agent.begin(lease))
        begun = bool(self.tell(int(begun), "begin a lease"))
        if limb is not None:
            limb.begin() if begun else limb.release()
        return begun

    def tell(self, number: int, operation: str) -> int:
        """The number that the first rank has."""
        if self._link.size == 1:
            return number
        told = torch.tensor([number], device=self.place.device)
        self._link.broadcast(told, operation).wait()
        return int(told)

    def share(self, lease: Lease | None) -> Lease:
        """The lease that the first rank has."""
        if self._link.size == 1:
            assert lease is not None
            return lease
        if lease is not None:
            self._say(*self._take_heard(), lease)
            return lease
        while lease is None:
            told = self._receive()
            if told is not None:
                lease = self._hear(told)
        return lease

    def hold_on(self) -> None:
        """While the first rank waits: the others hear what it has heard. They wait for it, and not
        longer than a link's deadline."""
        if self._link.size == 1:
            return
        heard, kept = self._take_heard()
        if heard:
            self._say(heard, kept, None)
        elif time.monotonic() - self._told_s > self.place.world.timeout_s / 4:
            self._told_s = time.monotonic()
            self.tell(0, "spread a lease")

    def _take_heard(self) -> tuple[list[Message], int]:
        if self._agent is None or not self.shares_model:
            return [], -1
        return self._agent.take_heard()

    def _say(self, heard: Sequence[Message], kept: int, lease: Lease | None) -> None:
        self._told_s = time.monotonic()
        plain = [[message.kind, vars(message)] for message in heard]
        packed = msgpack.packb([plain, kept, None if lease is None else vars(lease)])
        self.tell(len(packed), "spread a lease")
        text = torch.frombuffer(bytearray(packed), dtype=torch.uint8).to(self.place.device)
        self._link.broadcast(text, "spread a lease").wait()

    def _receive(self) -> Any:
        """What the first rank says; None while it waits itself."""
        size = self.tell(0, "spread a lease")
        if not size:
            return None
        text = torch.empty(size, dtype=torch.uint8, device=self.place.device)
        self._link.broadcast(text, "spread a lease").wait()
        return msgpack.unpackb(text.cpu().numpy().tobytes(), strict_map_key=False)

    def _hear(self, told: Any) -> Lease | None:
        plain, kept, fields = told
        lease = None if fields is None else Lease(**fields)
        if self.limb is not None:
            heard = [MESSAGES[kind](**each) for kind, each in plain]
            self.limb.hear(heard, lease, kept)
        return lease
