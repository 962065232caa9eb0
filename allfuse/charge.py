"""Runs a schedule on a clock: adds up the time."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from allfuse.base.tensors import share
from allfuse.execute import segments_of
from allfuse.link.costs import Costs, Path
from allfuse.topology import Layout, Native, Schedule, Topology
from allfuse.topology.ring import ring_phases

NATIVE_SEGMENTS = 2  # gloo's ring has two parts of each chunk under way
LEAST_S_PER_BYTE = 1e-15  # what costs less counts as this, so that no rate is infinite
SAME_TIME_S = 1e-12  # events as close as this happen together

Encoded: TypeAlias = Callable[[int], int]
"""Bytes on the way of so many values of one chunk."""


@dataclass(frozen=True, kw_only=True)
class Charge:
    """What a round costs: seconds until the last peer is done, bytes that each peer sends, and
    phases that follow each other."""

    seconds: float
    bytes_per_peer: tuple[int, ...]
    phases: int


def charge(
    topology: Topology,
    layout: Layout,
    costs: Costs,
    elements: int,
    *,
    element_bytes: int = 4,
    encoded_bytes: Encoded | None = None,
    segments: int | None = None,
    round: int = 0,
    seed: int = 0,
) -> Charge:
    """What one fusion of a block of `elements` takes.

    It plays what `execute.run` does, tick by tick: a peer posts all transfers of a tick, waits for
    what arrives in the order of the schedule, adds it, and goes on when its sends have gone too. A
    transfer begins when both sides have posted it. Those that are under way at the same time share
    the way evenly (max-min) where a host sends, receives or moves them inside. Whoever sends is
    done when all has arrived: what the system would hold for it is not counted.

    Native is charged as the ring in the order of ranks that gloo runs.

    Args:
        encoded_bytes: of a codec's message for the values of one chunk; None leaves them as they
            are. The time that encoding takes is not charged.
        segments: into how many a block is cut; None is as `execute` cuts it.

    Cost: grows with the transfers; some 10 us for each where hosts are alike, up to 1 ms where
    hundreds between many hosts end one by one.
    """
    schedule = _schedule(topology, layout, round, seed)
    if segments is None:
        native = isinstance(topology, Native)
        block_bytes = elements * element_bytes
        if encoded_bytes is not None:
            block_bytes = encoded_bytes(max(elements, 1))
        segments = NATIVE_SEGMENTS if native else segments_of(topology, block_bytes)
    encoded = encoded_bytes or (lambda count: count * element_bytes)
    sizes = _Sizes(schedule.chunks, elements, segments, element_bytes, encoded)
    ticks = list(_ticks(schedule, segments, sizes))
    sent = [0] * layout.size
    for tick in ticks:
        for message in tick:
            sent[message.src] += message.sent_bytes
    seconds = _Clock(layout, costs).run(ticks)
    return Charge(seconds=seconds, bytes_per_peer=tuple(sent), phases=len(schedule.phases))


def host_shares(topology: Topology, layout: Layout) -> dict[str, float]:
    """How many times the bytes of a fusion leave each host, in its first round."""
    schedule = _schedule(topology, layout, 0, 0)
    found = dict.fromkeys(layout.hosts, 0.0)
    for phase in schedule.phases:
        for src, dst, start, stop, _, _ in phase:
            if layout.hosts[src] != layout.hosts[dst]:
                found[layout.hosts[src]] += (stop - start) / schedule.chunks
    return found


def _schedule(topology: Topology, layout: Layout, round: int, seed: int) -> Schedule:
    if isinstance(topology, Native):
        n = layout.size
        return Schedule(n, n, ring_phases(list(range(n)), range(n)))
    return topology.schedule(layout, round, seed)


class _Message:
    """One transfer of one segment.

    posted: sides that are ready, 0 to 2. begin_s: when the later one was. end_s: when it has
    arrived.
    """

    __slots__ = ("begin_s", "dst", "end_s", "op", "own_bytes", "posted", "sent_bytes", "src")

    def __init__(self, src: int, dst: int, op: str, own_bytes: int, sent_bytes: int) -> None:
        self.src, self.dst, self.op = src, dst, op
        self.own_bytes, self.sent_bytes = own_bytes, sent_bytes
        self.posted, self.begin_s, self.end_s = 0, 0.0, 0.0


class _Sizes:
    """Bytes of pieces, as `execute` cuts a block into segments and chunks."""

    def __init__(
        self, chunks: int, elements: int, segments: int, element_bytes: int, encoded: Encoded
    ) -> None:
        self.chunks, self.element_bytes, self.encoded = chunks, element_bytes, encoded
        bounds = (share(elements, segments, s) for s in range(segments))
        self.elements = [stop - start for start, stop in bounds]
        self._known: dict[int, int] = {}

    def of(self, segment: int, start: int, stop: int) -> tuple[int, int]:
        """Bytes of the values of some chunks, and of their messages on the way."""
        size = self.elements[segment]
        cuts = [size * chunk // self.chunks for chunk in range(start, stop + 1)]
        counts = [after - before for before, after in itertools.pairwise(cuts)]
        return (cuts[-1] - cuts[0]) * self.element_bytes, sum(map(self._encoded, counts))

    def _encoded(self, count: int) -> int:
        if count not in self._known:
            self._known[count] = self.encoded(count) if count else 0
        return self._known[count]


def _ticks(schedule: Schedule, segments: int, sizes: _Sizes) -> Iterator[list[_Message]]:
    """Segment s does phase p in tick s + p. What has no elements is not sent."""
    phases = schedule.phases
    known: dict[tuple[int, int, int], tuple[int, int]] = {}
    for tick in range(len(phases) + segments - 1 if phases else 0):
        messages = []
        for s in range(max(0, tick - len(phases) + 1), min(segments, tick + 1)):
            for src, dst, start, stop, op, _ in phases[tick - s]:
                key = (s, start, stop)
                if key not in known:
                    known[key] = sizes.of(*key)
                if known[key][1]:
                    messages.append(_Message(src, dst, op, *known[key]))
        yield messages


class _Way(NamedTuple):
    """From one host to another, or inside one."""

    src: str
    dst: str


class _Flows:
    """The transfers under way from one host to another. All of them move at the same rate.

    moved: bytes that each has moved which was there from the beginning. One that came later ends
    as many bytes later.
    """

    def __init__(self) -> None:
        self.moved = 0.0
        self.ends: list[tuple[float, int, _Message]] = []

    def add(self, message: _Message, number: int) -> None:
        heapq.heappush(self.ends, (self.moved + message.sent_bytes, number, message))

    def left(self) -> float:
        """Bytes until the next one ends."""
        return self.ends[0][0] - self.moved

    def advance(self, count: float, least: float) -> Iterator[_Message]:
        """Each moves so many bytes; those that have ended, or have `least` bytes to go."""
        self.moved += count
        while self.ends and self.left() <= least:
            yield heapq.heappop(self.ends)[2]


_Turn: TypeAlias = tuple[list[_Message], list[_Message]]
"""What a peer receives and sends in a tick."""


class _Clock:
    """Plays ticks of messages: a clock for each peer, and shared ways out of and into hosts."""

    def __init__(self, layout: Layout, costs: Costs) -> None:
        self.layout, self.costs = layout, costs
        self._flows: dict[_Way, _Flows] = {}
        self._rates: dict[tuple[tuple[_Way, int], ...], dict[_Way, float]] = {}
        self._starts: list[tuple[float, int, _Message]] = []
        self._number = 0  # of a start, so that equal times are taken in order
        self._last_s = 0.0

    def run(self, ticks: Sequence[list[_Message]]) -> float:
        """Seconds until every peer has done its part."""
        size = self.layout.size
        self._turns = _turns(ticks, size)
        self._tick, self._left, self._posted_s = [-1] * size, [0] * size, [0.0] * size
        for peer in range(size):
            self._enter(peer, 0.0)
        self._play()
        return self._last_s

    def _enter(self, peer: int, now: float) -> None:
        """Post what a peer does in its next tick."""
        self._tick[peer] += 1
        if self._tick[peer] == len(self._turns[peer]):
            self._last_s = max(self._last_s, now)
            return
        receives, sends = self._turns[peer][self._tick[peer]]
        self._left[peer] = len(receives) + len(sends)
        for message in (*receives, *sends):
            path = self._path(self._way(message))
            message.posted += 1
            message.begin_s = max(message.begin_s, now)
            if message.posted == 2:
                self._number += 1
                start = (message.begin_s + path.alpha_s, self._number, message)
                heapq.heappush(self._starts, start)
            now += path.gap_s
        self._posted_s[peer] = now

    def _play(self) -> None:
        now = 0.0
        while self._starts or self._flows:
            rates = self._shared_rates() if self._flows else {}
            until = self._starts[0][0] if self._starts else float("inf")
            for way, flows in self._flows.items():
                until = min(until, now + flows.left() / rates[way])
            ended: list[_Message] = []
            for way, flows in self._flows.items():
                rate = rates[way]
                ended += flows.advance(rate * (until - now), rate * SAME_TIME_S)
            self._flows = {way: flows for way, flows in self._flows.items() if flows.ends}
            now = until
            while self._starts and self._starts[0][0] <= now + SAME_TIME_S:
                _, number, message = heapq.heappop(self._starts)
                self._flows.setdefault(self._way(message), _Flows()).add(message, number)
            for message in ended:
                message.end_s = now
                for peer in (message.src, message.dst):
                    self._left[peer] -= 1
                    if not self._left[peer]:
                        self._enter(peer, self._done_s(peer))

    def _done_s(self, peer: int) -> float:
        """When a peer is done with its tick: arrivals in the order of the schedule, then sends."""
        receives, sends = self._turns[peer][self._tick[peer]]
        now, gamma = self._posted_s[peer], self.costs.gamma_s_per_byte
        for message in receives:
            now = max(now, message.end_s)
            if message.op == "add":
                now += gamma * message.own_bytes
        for message in sends:
            now = max(now, message.end_s)
        late = [message for message in receives if message.op in ("collect", "mix")]
        return now + gamma * sum(message.own_bytes for message in late)

    def _path(self, way: _Way) -> Path:
        return self.costs.inside if way.src == way.dst else self.costs.between

    def _way(self, message: _Message) -> _Way:
        hosts = self.layout.hosts
        return _Way(hosts[message.src], hosts[message.dst])

    def _shared_rates(self) -> dict[_Way, float]:
        """Bytes per second of each flow on a way."""
        counts = {way: len(flows.ends) for way, flows in self._flows.items()}
        key = tuple(sorted(counts.items()))
        if key not in self._rates:
            self._rates[key] = share_ways(counts, self.costs)
        return self._rates[key]


def _turns(ticks: Sequence[list[_Message]], size: int) -> list[list[_Turn]]:
    """What each peer receives and sends in each tick in which it has a part."""
    turns: list[list[_Turn]] = [[] for _ in range(size)]
    for tick in ticks:
        parts: dict[int, _Turn] = {}
        for message in tick:
            parts.setdefault(message.dst, ([], []))[0].append(message)
            parts.setdefault(message.src, ([], []))[1].append(message)
        for peer, part in parts.items():
            turns[peer].append(part)
    return turns


def share_ways(flows: dict[_Way, int], costs: Costs) -> dict[_Way, float]:
    """Bytes per second of each flow, max-min fair, for so many flows on each way.

    All rise together until a host's way is full or a flow goes as fast as it can alone.
    """
    limits: dict[str, float] = {}
    users: dict[str, list[_Way]] = {}
    tops: dict[_Way, float] = {}
    for way in flows:
        path = costs.inside if way.src == way.dst else costs.between
        tops[way] = 1 / max(path.beta_s_per_byte, LEAST_S_PER_BYTE)
        names = [f"in {way.src}"] if way.src == way.dst else [f"from {way.src}", f"to {way.dst}"]
        for name in names:
            limits[name] = 1 / max(path.shared_s_per_byte, LEAST_S_PER_BYTE)
            users.setdefault(name, []).append(way)
    for name, ways in users.items():
        if sum(flows[way] for way in ways) == 1:  # it shares with nobody
            limits[name] = float("inf")
    rates: dict[_Way, float] = {}
    while len(rates) < len(flows):
        levels: dict[str, float] = {}
        for name, ways in users.items():
            used = sum(rates[way] * flows[way] for way in ways if way in rates)
            open_flows = sum(flows[way] for way in ways if way not in rates)
            levels[name] = (limits[name] - used) / open_flows if open_flows else float("inf")
        level = min(*levels.values(), *(tops[way] for way in flows if way not in rates))
        full = {way for name in users if levels[name] <= level * (1 + 1e-12) for way in users[name]}
        for way in flows:
            if way not in rates and (way in full or tops[way] <= level * (1 + 1e-12)):
                rates[way] = level
    return rates
