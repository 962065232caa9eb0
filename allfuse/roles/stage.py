"""Updates that a server holds until they are ordered."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from allfuse.codec import MessageCodec
from allfuse.link.post import Malformed
from allfuse.roles.blueprint import Blueprint
from allfuse.roles.cutting import Piece
from allfuse.roles.elementwise import is_option
from allfuse.roles.readers import to_exact
from allfuse.roles.rotation import ALL
from allfuse.roles.shard import Options, Values


@dataclass
class Bundle:
    """The pieces of one lease, or of the first weights, that came so far.

    fragment: of the weights, that it is of, or `ALL`. pieces: their values. came: the tensors that
    they came in, which may be encoded.
    """

    sender: str
    sequence: int = -1
    options: Options = ()
    fragment: int = ALL
    pieces: dict[int, Values] = field(default_factory=dict)
    came: dict[int, Values] = field(default_factory=dict)


class Numbers:
    """A set of whole numbers, kept as runs: those that are added come nearly in order."""

    def __init__(self) -> None:
        self._first: list[int] = []
        self._last: list[int] = []

    def __contains__(self, number: int) -> bool:
        at = bisect_right(self._first, number) - 1
        return at >= 0 and number <= self._last[at]

    @property
    def runs(self) -> list[list[int]]:
        """The first and the last number of each run."""
        return [list(run) for run in zip(self._first, self._last, strict=True)]

    def join(self, runs: Iterable[Sequence[int]]) -> None:
        """Add runs, as `runs` gives them.

        Raises:
            Malformed: they are none.
        """
        for run in runs:
            if len(run) != 2 or not all(type(number) is int for number in run) or run[1] < run[0]:
                raise Malformed(f"a run of numbers {str(run)[:40]}")
            merged = [[run[0], run[1]]]
            for first, last in self.runs:
                if last + 1 < merged[0][0] or first > merged[0][1] + 1:
                    merged.append([first, last])
                else:
                    merged[0] = [min(first, merged[0][0]), max(last, merged[0][1])]
            self._first, self._last = (list(ends) for ends in zip(*sorted(merged), strict=True))

    def add(self, number: int) -> None:
        if number in self:
            return
        at = bisect_right(self._first, number)
        self._first.insert(at, number)
        self._last.insert(at, number)
        if at + 1 < len(self._first) and self._first[at + 1] == number + 1:
            self._last[at] = self._last.pop(at + 1)
            self._first.pop(at + 1)
        if at > 0 and self._last[at - 1] == number - 1:
            self._last[at - 1] = self._last.pop(at)
            self._first.pop(at)


class Stage:
    """Bundles by lease. A lease that has ended is never taken again.

    Args:
        pieces: those of the shard.

    Attributes:
        ended: leases that were ordered or dropped.
    """

    def __init__(self, blueprint: Blueprint, pieces: Sequence[Piece], codec: MessageCodec | None):
        self.blueprint, self.pieces, self.codec = blueprint, pieces, codec
        self._bundles: dict[int, Bundle] = {}
        self.ended = Numbers()

    def missing(self, lease: int) -> list[int]:
        """The pieces that are not here; of which fragment they are is known once one has come."""
        bundle = self._bundles.get(lease) or Bundle("")
        return [
            number
            for number, piece in enumerate(self.pieces)
            if bundle.fragment in (ALL, piece.fragment) and number not in bundle.pieces
        ]

    def add(
        self,
        lease: int,
        piece: int,
        values: Values,
        bundle: Bundle,
        came: Values,
        *,
        replaces: bool = False,
    ) -> bool:
        """Take in a piece of a bundle; whether it is here now. What comes twice, or from another
        sender, changes nothing.

        Of two that were made from different weights, as by a worker that was started anew, the
        newer one counts; once one is whole, that does, unless a newer one `replaces` it.
        """
        if lease in self.ended:
            return False
        held = self._bundles.setdefault(lease, bundle)
        if held.sender != bundle.sender:
            return False
        if held.sequence < bundle.sequence and (replaces or self.missing(lease)):
            held = self._bundles[lease] = bundle
        is_same = (held.sequence, held.fragment) == (bundle.sequence, bundle.fragment)
        if is_same:
            held.pieces.setdefault(piece, values)
            held.came.setdefault(piece, came)
        return is_same

    def held(self) -> Iterator[tuple[int, Bundle]]:
        """What there is of each lease."""
        return iter(list(self._bundles.items()))

    def get(self, lease: int) -> Bundle:
        return self._bundles[lease]

    def end(self, lease: int) -> None:
        """Forget a lease that was ordered or dropped."""
        self._bundles.pop(lease, None)
        self.ended.add(lease)

    def tidy(self) -> None:
        """Forget what is held of leases that ended elsewhere."""
        for lease in [each for each in self._bundles if each in self.ended]:
            del self._bundles[lease]

    def read(self, piece: int, pieces: int, tensors: Values) -> Values:
        """The values of a piece as it was pushed, decoded.

        Raises:
            Malformed: it is not this shard's, or cannot be decoded.
        """
        self.check(piece, pieces, len(tensors))
        blocks = self.blueprint.blocks
        read = []
        for span, tensor in zip(self.pieces[piece], tensors, strict=True):
            dtype = blocks[span.block].dtype
            if tensor.dtype == dtype and tensor.shape == (span.elements,):
                read.append(tensor)
            else:
                like = to_exact(tensor.new_empty(0, dtype=dtype))
                read.append(_decode(self.codec, tensor, span.elements, like))
        return tuple(read)

    def read_fragment(self, piece: int, fragment: int) -> int:
        """The fragment that a push is of.

        Raises:
            Malformed: the piece is of another one.
        """
        if fragment not in (ALL, self.pieces[piece].fragment):
            raise Malformed(f"piece {piece} of fragment {fragment}")
        return fragment

    def check(self, piece: int, pieces: int, tensors: int) -> None:
        """
        Raises:
            Malformed: there is no such piece.
        """
        count = len(self.pieces)
        if pieces != count or not 0 <= piece < count or tensors != len(self.pieces[piece]):
            raise Malformed(f"piece {piece} of {pieces} in {tensors} tensors; there are {count}")

    def read_options(self, options: Sequence[Mapping[str, Any]]) -> Options:
        """
        Raises:
            Malformed: they are not options of the groups.
        """
        groups = self.blueprint.groups
        if len(options) not in (0, len(groups)):
            raise Malformed(f"options of {len(options)} groups; there are {len(groups)}")
        for group, changed in zip(groups, options, strict=False):
            for name, value in changed.items():
                if name not in group.options or not is_option(value):
                    raise Malformed(f"an option {name!r}; allowed: {', '.join(group.options)}")
        return options


def _decode(codec: MessageCodec | None, message: Tensor, elements: int, like: Tensor) -> Tensor:
    """The `elements` values, of the type of `like`, that a message stands for."""
    if codec is None or message.shape != (codec.encoded_bytes(elements),):
        raise Malformed(f"{message.dtype} of {tuple(message.shape)} for {elements} values")
    values = like.new_empty(elements)
    try:
        codec.decode(message, values)
    except (ValueError, IndexError, RuntimeError) as error:
        raise Malformed(f"a message that cannot be decoded: {error}") from error
    return values
