"""A server: holds a shard of the weights, and does what the scheduler orders. Sans I/O."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Executor
from pathlib import Path

from allfuse.base.errors import AllfuseError
from allfuse.link.post import Malformed
from allfuse.roles.blueprint import Blueprint, read_codec
from allfuse.roles.limbs import name_of, worker_of
from allfuse.roles.messages import (
    SCHEDULER,
    Applied,
    Ask,
    Copied,
    Copy,
    Fetch,
    Found,
    Give,
    Mail,
    Measure,
    Measured,
    Message,
    Orders,
    Part,
    Partners,
    Push,
    Refused,
    Serve,
    Staged,
    Weights,
)
from allfuse.roles.norms import square_of
from allfuse.roles.order import Order, carry_out, is_weighted, read_order
from allfuse.roles.readers import Readers
from allfuse.roles.ring import Own, Ring
from allfuse.roles.shard import Shard, Values
from allfuse.roles.snapshots import Snapshots
from allfuse.roles.stage import Bundle, Stage

SERVE_S = 2.0
GIVEN = -1  # in place of a lease: the first weights


class Server:
    """Holds shard `index` of `servers`.

    Pieces of updates are staged by their lease. Orders are carried out by their sequence, each
    once: the optimizer steps by the weighted sum of the leases' updates, in their order, with the
    options that came with the first; then those who are named get the weights of that version,
    which later updates leave alone; then the shard is written to disk where it is asked
    for. Weights that workers give are taken until the first order, those that were whole last.

    `handle` may raise `Malformed`: whoever sent that is wrong, and nothing has changed.

    Attributes:
        refusal: why the scheduler does not take this server; empty where it does.

    Args:
        birth: random; of this process.
        place: where workers find it.
        replicas: on how many other servers there is a copy of each shard.
        folder: for snapshots; None keeps none, and what is to be written counts as written.
        executor: writes them, as `Snapshots` says.

    Example:
        server = Server(0, 1, birth=7, place="127.0.0.1:7078")
        for receiver, message in server.tick(now_s):
            send(receiver, message)
    """

    def __init__(
        self,
        index: int,
        servers: int,
        *,
        birth: int,
        place: str,
        replicas: int = 0,
        folder: Path | None = None,
        executor: Executor | None = None,
    ) -> None:
        self.index, self.servers, self.birth, self.place = index, servers, birth, place
        self.ring = Ring(index, servers, birth, replicas)
        self.snapshots = Snapshots(folder, index, servers, executor) if folder else None
        self.shard: Shard | None = None
        self.saved = self.snapshots.newest() if self.snapshots else -1
        self._sequence = self.saved
        self._failed: tuple[int, str] = (-1, "")
        self._has_weights = False
        self._takes_weights = True  # until the first order after they were given
        self._given: dict[str, dict[int, Values]] = {}  # by giver
        self._served_s = float("-inf")
        self.refusal = ""

    @property
    def applied(self) -> int:
        """The version of the weights here; before `Found`, that of a copy, or on disk; -1 for
        none."""
        if self.shard is None:
            return self._sequence if self.ring.rescue is None else self.ring.rescue.sequence
        return self._sequence if self._has_weights else -1

    @property
    def is_writing(self) -> bool:
        """Whether something that was to be written is not on disk yet."""
        return self.snapshots is not None and self.snapshots.is_writing

    def tick(self, now_s: float) -> list[Mail]:
        """To be called a few times a second."""
        mail: list[Mail] = []
        if self._note_saved():
            mail.append((SCHEDULER, self._applied()))
        if self.refusal or now_s - self._served_s < SERVE_S:
            return mail
        self._served_s = now_s
        mail += self.ring.tick(now_s, self.applied)
        if self.shard is not None:
            mail += self.ring.remind(self._stage)
        mail.append((SCHEDULER, self._serve()))
        if self._has_weights:
            mail.append((SCHEDULER, self._applied()))  # it may have got lost
        return mail

    def _serve(self) -> Serve:
        return Serve(
            index=self.index,
            birth=self.birth,
            applied=self.applied,
            place=self.place,
            found=self.shard is not None,
            settled=self.ring.is_settled,
            whole=self.ring.rescue is not None,
        )

    @property
    def _own(self) -> Own | None:
        if self.shard is None:
            return None
        is_fixed = self._has_weights and not self._takes_weights
        return Own(self.shard, self._stage, self._sequence, is_fixed)

    def _note_saved(self) -> bool:
        """Whether there is something new about the disk: what is on it, or could not be written."""
        if self.snapshots is None:
            return False
        before = self.saved, self._failed
        self.saved = max(self.saved, self.snapshots.written())
        self._failed = self.snapshots.failed
        return (self.saved, self._failed) != before

    def lost(self, name: str, now_s: float) -> list[Mail]:
        """The connection of a rank of a worker has ended: nothing that it sent is on its way."""
        self._given.pop(worker_of(name), None)
        if self.shard is not None:
            self._readers.forget(worker_of(name))
        return []

    def handle(self, sender: str, message: Message, now_s: float) -> list[Mail]:
        """What there is to say to a message.

        Raises:
            Malformed: it is not what this server takes.
        """
        return list(self.answer(sender, message))

    def answer(self, sender: str, message: Message) -> Iterator[Mail]:
        """`handle`, message by message, each to be sent before the next is made: while the first
        pieces of weights travel, the next are stepped. To be gone through to its end.
        """
        match message:
            case Found() if sender == SCHEDULER:
                self._found(message)
            case Refused() if sender == SCHEDULER and self.shard is None:
                self._step_back(message.reason)
            case Measure() if sender == SCHEDULER:
                yield from self._measure(message)
            case Orders() if sender == SCHEDULER:
                yield from self._carry_out(message)
            case Give():
                yield from self._take_given(sender, message)
            case Push():
                yield from self._stage_push(sender, message)
            case Ask():
                yield from self._tell_missing(sender, message.lease)
            case Partners() if sender == SCHEDULER:
                yield from self.ring.meet(message)
            case Copied(shard=self.index) if self.ring.replicas:
                yield from self._hear_copied(message)
            case Copy() | Fetch() | Part() if self.ring.replicas:
                yield from self._hear_server(sender, message)
            case _:
                raise Malformed(f"a {message.kind} from {sender}, which servers do not take")

    def _hear_server(self, sender: str, message: Message) -> Iterator[Mail]:
        was_settled = self.ring.is_settled
        yield from self.ring.handle(sender, message, self._own)
        if self.ring.is_settled and not was_settled:
            yield SCHEDULER, self._serve()

    def _found(self, message: Found) -> None:
        """Make the shard. Comes again and again; the first one counts."""
        blueprint = Blueprint.from_plain(message.blueprint)
        if message.servers != self.servers:
            raise Malformed(f"a job of {message.servers} servers; this one is of {self.servers}")
        if self.shard is not None:
            if self.shard.blueprint.digest != blueprint.digest:
                raise Malformed("another model than this server holds")
            return
        shard = Shard(blueprint, self.index, self.servers)
        codec = read_codec(blueprint.codec)
        stage = Stage(blueprint, shard.pieces, codec)
        if self.snapshots is not None:
            self.snapshots.drop_after(message.sequence)
            self.saved = self.snapshots.newest()
        rescue = self.ring.rescue
        if rescue is not None and rescue.sequence == message.sequence:
            rescue.install(shard, stage)
            self._has_weights, self._takes_weights = True, False
        elif self.snapshots is not None and self.saved >= 0:
            self.snapshots.load(shard, self.saved)
            self._has_weights, self._takes_weights = True, False
        self.shard, self._sequence, self._stage = shard, message.sequence, stage
        self._readers = Readers(codec, self.index, after=message.born)
        self.ring.begin(blueprint)

    def _step_back(self, reason: str) -> None:
        """The newest snapshot may be of a history that the run has left: offer the one before."""
        older = self.snapshots.newest(self.saved - 1) if self.snapshots and self.saved >= 0 else -1
        if older < 0:
            self.refusal = reason
        self.saved = self._sequence = older
        self._served_s = float("-inf")

    # The first weights.

    def _take_given(self, sender: str, message: Give) -> Iterator[Mail]:
        shard = self.shard
        if shard is None:
            return
        values = self._stage.read(message.piece, message.pieces, message.tensors)
        pieces = self._given.setdefault(worker_of(sender), {})
        if self._takes_weights and message.piece not in pieces:
            pieces[message.piece] = values
            if len(pieces) == len(shard.pieces):
                for piece, each in pieces.items():
                    shard.put(piece, each)
                self._has_weights = True
                if self.ring.replicas and self._sequence >= 0:
                    self._takes_weights = False  # copies wait for them, and orders for copies
                    yield from self.ring.answer_all(self._own)
        if not self._missing_given(sender):
            yield from self._say(Staged(lease=GIVEN, birth=self.birth), sender)

    def _missing_given(self, sender: str) -> list[int]:
        """What a giver has not brought yet; nothing where weights are not taken any more."""
        assert self.shard is not None
        held = self._given.get(worker_of(sender), {})
        count = len(self.shard.pieces) if self._takes_weights else 0
        return [number for number in range(count) if number not in held]

    # Updates.

    def _stage_push(self, sender: str, message: Push) -> Iterator[Mail]:
        if self.shard is None or message.lease in self._stage.ended:
            return
        if message.lease < 0:
            raise Malformed(f"lease {message.lease}; they count from 0")
        options = self._stage.read_options(message.options)
        values = self._stage.read(message.piece, message.pieces, message.tensors)
        fragment = self._stage.read_fragment(message.piece, message.fragment)
        worker = worker_of(sender)
        self._readers.confirm(worker, message.sequence)
        bundle, lease, piece = (
            Bundle(worker, message.sequence, options, fragment),
            message.lease,
            message.piece,
        )
        if self._stage.add(lease, piece, values, bundle, message.tensors):
            yield from self.ring.pass_on(lease, piece, self._stage)
        yield from self._say_staged(lease, sender)

    def _say(self, message: Message, sender: str) -> Iterator[Mail]:
        """To a rank of a worker, and to its first one, which speaks for all."""
        for name in dict.fromkeys((worker_of(sender), sender)):
            yield name, message

    def _say_staged(self, lease: int, sender: str = "") -> Iterator[Mail]:
        """To who pushed, once all of it is here and with all copies."""
        if self.shard is None or lease in self._stage.ended or self._stage.missing(lease):
            return
        bundle = self._stage.get(lease)
        if self.ring.keepers.hold(lease, bundle.sequence):
            is_of = worker_of(sender) == bundle.sender
            to = sender if is_of else bundle.sender
            yield from self._say(Staged(lease=lease, birth=self.birth), to)

    def _tell_missing(self, sender: str, lease: int) -> Iterator[Mail]:
        if self.shard is None or lease in self._stage.ended:
            return
        missing = self._missing_given(sender) if lease == GIVEN else self._stage.missing(lease)
        if lease == GIVEN or missing:
            yield sender, Staged(lease=lease, birth=self.birth, missing=missing)
            return
        yield from self._say_staged(lease, sender)

    def _hear_copied(self, message: Copied) -> Iterator[Mail]:
        lease = message.lease
        if self.shard is None or lease in self._stage.ended or self._stage.missing(lease):
            return
        for piece in message.missing:
            if piece in self._stage.get(lease).came:
                yield from self.ring.pass_on(lease, piece, self._stage)
        if not message.missing:
            self.ring.keepers.confirm(lease, message.sequence, message.birth)
            yield from self._say_staged(lease)

    def _measure(self, message: Measure) -> Iterator[Mail]:
        shard, pairs = self.shard, [pair for pair in message.leases if is_weighted(pair)]
        if len(pairs) < len(message.leases):
            raise Malformed(f"leases {str(message.leases)[:80]}")
        if shard is None or any(self._stage.missing(lease) for lease, _ in pairs):
            return
        bundles = [(weight, self._stage.get(lease)) for lease, weight in pairs]
        square = 0.0
        for piece in range(len(shard.pieces)):
            pushes = [(weight, bundle.pieces[piece]) for weight, bundle in bundles]
            square += square_of(shard, piece, pushes) if pushes else 0.0
        yield SCHEDULER, Measured(leases=message.leases, birth=self.birth, square=square)

    # Orders.

    def _carry_out(self, message: Orders) -> Iterator[Mail]:
        if self.shard is None or not self._has_weights:
            return
        orders = [read_order(entry) for entry in message.entries]
        for sequence, order in enumerate(orders, message.first):
            if sequence == self._sequence + 1:
                yield from self._carry_out_one(sequence, order)
        yield SCHEDULER, self._applied()
        yield from self.ring.answer_all(self._own)
        for sequence, order in enumerate(orders, message.first):
            yield from self.ring.hear(sequence, order)

    def _applied(self) -> Applied:
        failed, reason = self._failed
        return Applied(sequence=self._sequence, saved=self.saved, failed=failed, reason=reason)

    def _carry_out_one(self, sequence: int, order: Order) -> Iterator[Mail]:
        shard, stage = self.shard, self._stage
        assert shard is not None
        for lease, _ in order.leases:
            if lease in stage.ended or stage.missing(lease):
                raise AllfuseError(
                    f"server {self.index} was ordered to apply lease {lease} at sequence "
                    f"{sequence}, which it does not hold; allowed: leases that it said it holds; "
                    "the weights can go no further: start the job again from its last snapshot"
                )
        self._readers.begin(sequence)
        readers = order.to if self._readers.may_send else []
        for piece, spans in enumerate(shard.pieces):
            carry_out(order, piece, shard, stage)
            to = [worker for worker in readers if order.gets(worker, spans)]
            if to:
                weights = shard.read(piece)
            for worker in to:
                base, tensors = self._readers.message(worker, spans.fragment, piece, weights)
                message = Weights(
                    sequence=sequence,
                    piece=piece,
                    pieces=len(shard.pieces),
                    base=base,
                    tensors=tensors,
                )
                for rank in spans.ranks:
                    yield name_of(worker, rank), message
        self._readers.end()
        for lease in order.ended:
            stage.end(lease)
            self.ring.keepers.forget(lease)
        self._sequence, self._takes_weights = sequence, False
        self._given.clear()
        if order.save:
            if self.snapshots is not None:
                self.snapshots.save(shard, sequence)
                self._note_saved()
            else:
                self.saved = sequence
