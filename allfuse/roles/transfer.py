"""A shard on its way from one server to another: weights, optimizers' states, staged updates."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from allfuse.base.errors import CheckpointError
from allfuse.link.post import Malformed
from allfuse.roles.messages import Fetch, Part
from allfuse.roles.shard import Shard
from allfuse.roles.stage import Bundle, Stage

STATE = -1  # in place of a lease: a piece of the shard itself


def nothing(fetch: Fetch, answer: list[int]) -> Part:
    """The answer of one that has no such shard."""
    return Part(
        shard=fetch.shard,
        birth=fetch.birth,
        number=fetch.number,
        answer=answer,
        sequence=-1,
        part=0,
        parts=0,
        piece=0,
        lease=STATE,
    )


def parts_of(
    fetch: Fetch, answer: list[int], sequence: int, shard: Shard, stage: Stage
) -> Iterator[Part]:
    """All of a shard as it is now; what is sent is not copied, and later steps leave it alone."""
    staged = [
        (lease, piece, bundle) for lease, bundle in stage.held() for piece in sorted(bundle.came)
    ]
    count = len(shard.pieces)
    parts = count + len(staged)
    for piece in range(count):
        captured = shard.capture(piece)
        yield Part(
            shard=fetch.shard,
            birth=fetch.birth,
            number=fetch.number,
            answer=answer,
            sequence=sequence,
            part=piece,
            parts=parts,
            piece=piece,
            lease=STATE,
            names=list(captured),
            ended=[] if piece else stage.ended.runs,
            tensors=tuple(captured.values()),
        )
    for part, (lease, piece, bundle) in enumerate(staged, count):
        yield Part(
            shard=fetch.shard,
            birth=fetch.birth,
            number=fetch.number,
            answer=answer,
            sequence=sequence,
            part=part,
            parts=parts,
            piece=piece,
            lease=lease,
            worker=bundle.sender,
            read=bundle.sequence,
            options=[dict(changed) for changed in bundle.options],
            fragment=bundle.fragment,
            tensors=bundle.came[piece],
        )


class Transfer:
    """Takes in the parts of a shard that was asked for, until it is whole.

    Attributes:
        fetch: what was asked. refused: there was nothing to give. is_stuck: nothing came between
        the last two ticks.
    """

    def __init__(self, fetch: Fetch) -> None:
        self.fetch = fetch
        self.refused = self.is_stuck = self._moved = False
        self._answers: dict[tuple[int, ...], dict[int, Part]] = {}
        self._parts: dict[int, Part] = {}  # of the answer that is whole

    def take(self, message: Part) -> None:
        asked = self.fetch
        answers = (message.shard, message.birth, message.number)
        if answers != (asked.shard, asked.birth, asked.number):
            return
        self._moved, self.is_stuck = True, False
        self.refused = message.parts == 0
        if not self.refused and not self._parts:
            parts = self._answers.setdefault(tuple(message.answer), {})
            parts[message.part] = message
            if len(parts) == message.parts:
                self._parts = parts

    def tick(self) -> None:
        """To be called every second or two."""
        self._moved, self.is_stuck = False, not self._moved

    @property
    def is_whole(self) -> bool:
        return bool(self._parts)

    @property
    def sequence(self) -> int:
        """That the weights are of."""
        return next(iter(self._parts.values())).sequence

    def install(self, shard: Shard, stage: Stage) -> None:
        """Make a shard and its stage what they were there; what the stage holds itself stays.

        Raises:
            Malformed: it is of something else; weights may have changed by then.
        """
        for part in self._parts.values():
            if part.lease == STATE:
                _restore(part, shard)
                stage.ended.join(part.ended)
        stage.tidy()
        for part in self._parts.values():
            if part.lease != STATE and part.lease not in stage.ended:
                values = stage.read(part.piece, len(shard.pieces), part.tensors)
                options = stage.read_options(part.options)
                fragment = stage.read_fragment(part.piece, part.fragment)
                bundle = Bundle(part.worker, part.read, options, fragment)
                stage.add(part.lease, part.piece, values, bundle, part.tensors, replaces=True)


def _restore(part: Part, shard: Shard) -> None:
    if not 0 <= part.piece < len(shard.pieces) or len(part.names) != len(part.tensors):
        raise Malformed(f"part {part.part} of a shard: piece {part.piece}, {len(part.names)} names")
    named: dict[str, Tensor] = dict(zip(part.names, part.tensors, strict=True))
    try:
        shard.restore(part.piece, named)
    except CheckpointError as error:
        raise Malformed(str(error)) from error
