"""What a dim of a tensor is made of, and which parts of dims must move together.

A dim is stretches laid end to end (as `cat` makes them), each a product of factors, the outermost
first (as `view` and `flatten` make them): channels followed by features of a picture are
(channels x height x width) + features. A factor that moves is permuted wherever it stands. Dims
that an operator ties together are joined: their factors are cut until both read alike, and those
in the same place become one. Where two cannot be made alike their factors are frozen, that is,
stay in their order, which is always right.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from math import prod

Stretch = tuple[int, ...]
Dim = tuple[Stretch, ...]


class Factors:
    """The factors of all dims, each a number; a union-find that also cuts.

    Attributes:
        context: where the model is, for the reasons that frozen factors have.
    """

    def __init__(self) -> None:
        self.context = ""
        self._size: list[int] = []
        self._parent: list[int] = []
        self._cut: list[Dim | None] = []  # what a factor was found to be made of
        self._reason: list[str | None] = []

    # ----- what there is -----

    def new(self, size: int, reason: str | None = None) -> Dim:
        """A dim of one factor, which is frozen if there is a reason."""
        if size == 0:
            return ()
        return (self._new(size, reason),)

    def _new(self, size: int, reason: str | None) -> Stretch:
        if size == 1:
            return ()
        self._size.append(size)
        self._parent.append(len(self._parent))
        self._cut.append(None)
        self._reason.append(reason)
        return (len(self._size) - 1,)

    def find(self, factor: int) -> int:
        """The factor that stands for all that were joined with it."""
        while self._parent[factor] != factor:
            self._parent[factor] = self._parent[self._parent[factor]]
            factor = self._parent[factor]
        return factor

    def size_of(self, dim: Dim) -> int:
        return sum(self._count(stretch) for stretch in dim)

    def _count(self, stretch: Stretch) -> int:
        return prod(self._size[factor] for factor in stretch)

    def reason(self, factor: int) -> str | None:
        """Why a factor is frozen; None: it moves."""
        return self._reason[self.find(factor)]

    def why_all(self, dim: Dim) -> str | None:
        """Why no factor of a dim moves; None: there is one that does, or none at all."""
        reasons = [self._reason[factor] for stretch in self.read(dim) for factor in stretch]
        return None if None in reasons or not reasons else reasons[0]

    def _is_still(self, dim: Dim) -> bool:
        return all(self._reason[factor] for stretch in self.read(dim) for factor in stretch)

    def factor_size(self, factor: int) -> int:
        return self._size[factor]

    def read(self, dim: Dim) -> Dim:
        """A dim in factors that are not cut, each by the number that stands for it."""
        return tuple(piece for stretch in dim for piece in self._read(stretch))

    def _read(self, stretch: Stretch) -> list[Stretch]:
        whole: list[Stretch] = [()]
        for each in stretch:
            factor = self.find(each)
            made = self._cut[factor]
            whole = self._times(whole, [(factor,)] if made is None else list(self.read(made)))
        return whole

    def _times(self, outer: list[Stretch], inner: list[Stretch]) -> list[Stretch]:
        """The product of two dims. Stretches inside of a factor are laid out as often as it says,
        which keeps that factor in its order."""
        if len(inner) == 1:
            return [(*stretch, *inner[0]) for stretch in outer]
        laid: list[Stretch] = []
        for stretch in outer:
            self.freeze((stretch,), "each of its parts has several others inside")
            laid += inner * self._count(stretch)
        return laid

    # ----- what is found out -----

    def freeze(self, dim: Dim, why: str) -> None:
        """Have all factors of a dim stay in their order."""
        for stretch in self.read(dim):
            for factor in stretch:
                self._reason[factor] = self._reason[factor] or f"{why}{self.context}"

    def join(self, one: Dim, other: Dim) -> None:
        """Have two dims of one size move together."""
        if self._is_still(one) and self._is_still(other):
            return
        left, right = deque(one), deque(other)
        while left and right:
            p, q = self._next(left), self._next(right)
            if self._count(p) != self._count(q):
                longer, shorter, rest = (p, q, left) if self._count(p) > self._count(q) else (
                    q, p, right)  # fmt: skip
                (right if rest is left else left).appendleft(shorter)
                rest.appendleft(longer)
                if not self._cut_at(longer, self._count(shorter)):
                    self.freeze((*left, *right), "parts of different length meet")
                    return
            elif self._refine(p, q):
                left.appendleft(p)
                right.appendleft(q)

    def _next(self, rest: deque[Stretch]) -> Stretch:
        first, *others = self._read(rest.popleft())
        rest.extendleft(reversed(others))
        return first

    def _refine(self, p: Stretch, q: Stretch) -> bool:
        """Join two stretches of one size; True: not yet, a factor was cut."""
        if all(self._reason[factor] is not None for factor in (*p, *q)):
            return False
        for x, y in zip(p, q, strict=False):
            a, b = self._size[x], self._size[y]
            if a == b:
                continue
            longer, size = (x, b) if a > b else (y, a)
            if self._size[longer] % size:
                self.freeze((p, q), "products of different numbers meet")
                return False
            self._cut_factor(longer, size)
            return True
        for x, y in zip(p, q, strict=True):
            self._unite(self.find(x), self.find(y))
        return False

    def _unite(self, x: int, y: int) -> None:
        if x != y:
            x, y = min(x, y), max(x, y)
            self._parent[y] = x
            self._reason[x] = self._reason[x] or self._reason[y]

    def _cut_factor(self, factor: int, size: int) -> None:
        """A factor is a product of one of a size and the rest."""
        reason = self._reason[factor]
        inner = self._size[factor] // size
        self._cut[factor] = ((*self._new(size, reason), *self._new(inner, reason)),)

    def _cut_at(self, stretch: Stretch, place: int) -> bool:
        """Cut a stretch in two; False: it cannot be."""
        if not stretch:
            return False
        factor = stretch[0]
        head, rest = divmod(place, self._count(stretch[1:]))
        if rest:
            return False
        reason = self._reason[factor]
        self._cut[factor] = (
            self._new(head, reason),
            self._new(self._size[factor] - head, reason),
        )
        return True

    # ----- what operators make of dims -----

    def part(self, dim: Dim, begin: int, end: int) -> Dim:
        """The places from `begin` to before `end`."""
        if self._is_still(dim):
            return self.new(end - begin, self.why_all(dim) or "it is a place of its own")
        kept: list[Stretch] = []
        rest, place = deque(dim), 0
        while rest:
            stretch = self._next(rest)
            stop = place + self._count(stretch)
            if stop <= begin or place >= end:
                place = stop
            elif begin <= place and stop <= end:
                kept.append(stretch)
                place = stop
            elif self._cut_at(stretch, (begin if begin > place else end) - place):
                rest.appendleft(stretch)
            else:
                self.freeze(dim, "a part of it is taken")
                return self.new(end - begin, f"a part of a whole{self.context}")
        return tuple(kept)

    def merge(self, dims: Iterable[Dim]) -> Dim:
        """Several dims as one."""
        whole: list[Stretch] = [()]
        for dim in dims:
            whole = self._times(whole, list(self.read(dim)))
        return tuple(whole)

    def split(self, dim: Dim, sizes: Sequence[int]) -> list[Dim]:
        """One dim as several of these sizes."""
        if sum(size != 1 for size in sizes) <= 1:
            return [dim if size != 1 else ((),) for size in sizes]
        while True:
            stretches = self.read(dim)
            found = self._deal(stretches[0], sizes) if len(stretches) == 1 else None
            if found is None:
                why = "it is cut into dims that its parts do not fill"
                self.freeze(dim, why)
                return [self.new(size, why + self.context) for size in sizes]
            if isinstance(found, list):
                return found
            self._cut_factor(*found)

    def _deal(self, stretch: Stretch, sizes: Sequence[int]) -> list[Dim] | tuple[int, int] | None:
        """The factors of each dim; or a factor to cut first, and at which size; or None."""
        left = deque(stretch)
        dims: list[Dim] = []
        for size in sizes:
            own: list[int] = []
            missing = size
            while missing > 1:
                factor = left.popleft()
                if missing % self._size[factor] == 0:
                    own.append(factor)
                    missing //= self._size[factor]
                elif self._size[factor] % missing == 0:
                    return factor, missing
                else:
                    return None
            dims.append((tuple(own),))
        return dims

    def view(self, dims: Sequence[Dim], sizes: Sequence[int]) -> list[Dim]:
        """The dims of the same numbers in the same order under another shape."""
        if 0 in sizes:
            return [self.new(size, "it is empty") for size in sizes]
        old, new, made = deque(dims), deque(sizes), []
        while old or new:
            group, wanted = [old.popleft()] if old else [], [new.popleft()] if new else []
            while (have := prod(map(self.size_of, group))) != (want := prod(wanted)):
                if have < want:
                    group.append(old.popleft())
                else:
                    wanted.append(new.popleft())
            if len(group) == len(wanted) == 1:
                made.append(group[0])
            else:
                made += self.split(self.merge(group), wanted)
        return made
