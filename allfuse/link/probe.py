"""Measures what moving bytes costs on a link: ping-pongs between a few of its peers, and copies."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from allfuse.link.base import Link
from allfuse.link.costs import Costs, Path

SMALL_BYTES = 4
ROUNDS = 15  # of a small message there and back
BURST = 8  # small messages at once
FIRST_BYTES = 1 << 16  # of a large message; four times as large until it takes LONG_S
MOST_BYTES = 1 << 24
LONG_S = 0.05
REPEATS = 3  # of a large message
MOST_PAIRS = 3  # that are measured within hosts, and between hosts
ADD_BYTES = 1 << 22
CONFIRM_S = 0.02  # that a message takes by what is remembered
CHANGED = 2.0  # times as long or as short: it is another link than it was

Pair: TypeAlias = tuple[int, int]
Samples: TypeAlias = list[float]


class Trial(NamedTuple):
    """Pairs that exchange at the same time. The first one's first peer holds the clock.

    flows: transfers that leave one host at once.
    """

    pairs: tuple[Pair, ...]
    inside: bool
    flows: int = 1

    @property
    def leader(self) -> int:
        return self.pairs[0][0]


def probe(link: Link, hosts: Sequence[str], device: torch.device | str = "cpu") -> Costs:
    """Measure the constants of a link, whose peers are on these hosts, one name for each.

    All peers must call it; all end with the same numbers, bit for bit. A second or two.

    Phases, in each of which other peers wait:
      1. for up to `MOST_PAIRS` pairs within hosts and as many between: small messages there and
         back, `BURST` of them at once, and large ones in both directions at the same time;
      2. for up to `MOST_PAIRS` hosts, and pairs of neighbouring hosts: as many pairs as there are
         exchange large messages at once, which shows what they share; and one peer of each of up
         to `MOST_PAIRS` + 1 hosts with all the others, which shows what crossing streams lose;
      3. all peers add up at the same time;
      4. one sum over the peers brings the table of what was measured to all.

    A link within one host has no ways between hosts, and the other way round: the class that is
    not there costs what the other does. The slowest pair of a class stands for it, since a round
    is as slow as its slowest link.

    Raises:
        PeerLost: from the link.
    """
    bench = Bench(link, torch.device(device))
    alone = lone_trials(hosts)
    together = [*crowds_inside(hosts), *crowds_between(hosts), *crossing(hosts)]
    table = torch.zeros(len(alone) + len(together) + 1, max(4, link.size), dtype=torch.float64)
    for row, trial in zip(table, [*alone, *together], strict=False):
        bench.measure(trial, row)
    table[-1, link.rank] = bench.add()
    table = table.to(device)
    link.all_reduce(table, "probe").wait()
    rows = table.tolist()
    return _combine(alone, together, rows)


def confirm(
    costs: Costs, link: Link, hosts: Sequence[str], device: torch.device | str = "cpu"
) -> bool:
    """Whether a link still costs what was measured on it before: about 0.1 s for each pair.

    Hosts keep their names when their network becomes another. All peers must call it; all get the
    same answer.

    Phases: each pair that `probe` measures alone exchanges large messages, one pair after the
    other; one sum over the peers brings all what it took.

    Raises:
        PeerLost: from the link.
    """
    bench, trials = Bench(link, torch.device(device)), lone_trials(hosts)
    table = torch.zeros(len(trials), dtype=torch.float64)
    for row, trial in enumerate(trials):
        table[row] = bench.compare(trial, costs.inside if trial.inside else costs.between)
    table = table.to(device)
    link.all_reduce(table, "probe").wait()
    for within in (True, False):  # the slowest pair of a class stood for it
        found = [r for r, t in zip(table.tolist(), trials, strict=True) if t.inside == within]
        if found and not 1 / CHANGED <= max(found) <= CHANGED:
            return False
    return True


def lone_trials(hosts: Sequence[str]) -> list[Trial]:
    """Those of one pair each."""
    return [Trial((pair,), inside) for inside in (True, False) for pair in pairs(hosts, inside)]


def pairs(hosts: Sequence[str], inside: bool) -> list[Pair]:
    """A few pairs of peers that stand for all within hosts, or between hosts."""
    groups = _groups(hosts)
    if inside:
        return [(group[0], group[1]) for group in groups if len(group) > 1][:MOST_PAIRS]
    return [(here[0], there[0]) for here, there in _neighbours(groups)]


def crowds_inside(hosts: Sequence[str]) -> list[Trial]:
    """All peers of a host, two by two, where there are more than two."""
    groups = [group for group in _groups(hosts) if len(group) > 3][:MOST_PAIRS]
    crowds = [tuple(zip(group[::2], group[1::2], strict=False)) for group in groups]
    return [Trial(crowd, True, len(crowd)) for crowd in crowds]


def crowds_between(hosts: Sequence[str]) -> list[Trial]:
    """The peers of a host with those of another, where there are several."""
    found = [tuple(zip(*both, strict=False)) for both in _neighbours(_groups(hosts))]
    return [Trial(crowd, False, len(crowd)) for crowd in found if len(crowd) > 1]


def crossing(hosts: Sequence[str]) -> list[Trial]:
    """One peer of each of a few hosts with all the others, where there are more than two."""
    few = [group[0] for group in _groups(hosts)][: MOST_PAIRS + 1]
    return [Trial(tuple(itertools.combinations(few, 2)), False, len(few) - 1)] if few[2:] else []


def _groups(hosts: Sequence[str]) -> list[list[int]]:
    groups: dict[str, list[int]] = {}
    for peer, host in enumerate(hosts):
        groups.setdefault(host, []).append(peer)
    return list(groups.values())


def _neighbours(groups: list[list[int]]) -> list[tuple[list[int], list[int]]]:
    """A few hosts, evenly from all, each with the one after it."""
    count = len(groups)
    if count < 2:
        return []
    chosen = range(count if count > 2 else 1)[:: -(-count // MOST_PAIRS)]
    return [(groups[i], groups[(i + 1) % count]) for i in chosen]


@dataclass
class Bench:
    """One peer's part in the trials."""

    link: Link
    device: torch.device

    def measure(self, trial: Trial, row: Tensor) -> None:
        """Take part in a trial. The leader writes what it took into `row`."""
        self._meet()
        own = [pair for pair in trial.pairs if self.link.rank in pair]
        if not own:
            return
        peers = [pair[pair[0] == self.link.rank] for pair in own]
        numbers = [0.0] * 4
        if len(trial.pairs) == 1:
            peer, first_rank = peers[0], self.link.rank == trial.leader
            numbers[0] = self._time(lambda: self._there_and_back(peer, first_rank, 1), ROUNDS) / 2
            burst = self._time(lambda: self._there_and_back(peer, first_rank, BURST), ROUNDS) / 2
            numbers[1] = max(0.0, burst - numbers[0]) / (BURST - 1)
        numbers[2], numbers[3] = self._large(peers, trial)
        if self.link.rank == trial.leader:
            row[:4] = torch.tensor(numbers, dtype=torch.float64)

    def compare(self, trial: Trial, path: Path) -> float:
        """How many times as long as it costs an exchange of a pair takes, as its leader says."""
        self._meet()
        (pair,) = trial.pairs
        if self.link.rank not in pair:
            return 0.0
        peer = pair[pair[0] == self.link.rank]
        size = CONFIRM_S / max(path.beta_s_per_byte, CONFIRM_S / MOST_BYTES)
        own, other = (self._block(max(FIRST_BYTES, int(size))) for _ in range(2))
        took = self._time(partial(self._exchange, own, [other], [peer]), REPEATS)
        said = path.alpha_s + own.nbytes * path.beta_s_per_byte
        return took / max(said, 1e-9) if self.link.rank == trial.leader else 0.0

    def _large(self, peers: list[int], trial: Trial) -> tuple[float, float]:
        """Bytes of large messages that go both ways at once, and the seconds that they take.

        It grows until the leader says that it takes long enough to be measured. What a message of a
        quarter takes is taken off, and so is its alpha.
        """
        size = FIRST_BYTES
        while True:
            own, others = self._block(size), [self._block(size) for _ in peers]
            took = self._time(partial(self._exchange, own, others, peers), 1)
            said = torch.tensor([took], dtype=torch.float64, device=self.device)
            self._tell(said, trial)
            if float(said) >= LONG_S or size >= MOST_BYTES:
                break
            size *= 4
        seconds = self._time(partial(self._exchange, own, others, peers), REPEATS)
        less = size // 4
        own, others = own[:less], [other[:less] for other in others]
        seconds_less = self._time(partial(self._exchange, own, others, peers), REPEATS)
        return float(size - less), max(seconds - seconds_less, 0.0)

    def _tell(self, said: Tensor, trial: Trial) -> None:
        """The leader's word, to all who take part."""
        if self.link.rank != trial.leader:
            self.link.receive(said, trial.leader, "probe").wait()
            return
        others = {peer for pair in trial.pairs for peer in pair} - {trial.leader}
        for work in [self.link.send(said, peer, "probe") for peer in sorted(others)]:
            work.wait()

    def _exchange(self, own: Tensor, others: list[Tensor], peers: list[int]) -> None:
        works = [self.link.receive(o, p, "probe") for o, p in zip(others, peers, strict=True)]
        works += [self.link.send(own, peer, "probe") for peer in peers]
        for work in works:
            work.wait()

    def _there_and_back(self, peer: int, first: bool, count: int) -> None:
        """So many small messages at once to the peer, and then from it."""
        for sends in (first, not first):
            start = self.link.send if sends else self.link.receive
            works = [start(self._block(SMALL_BYTES), peer, "probe") for _ in range(count)]
            for work in works:
                work.wait()

    def add(self) -> float:
        """Seconds for each byte that is added up, while all peers do."""
        target, source = (self._block(ADD_BYTES).view(torch.float32) for _ in range(2))
        self._meet()
        return self._time(lambda: target.add_(source), 2 * REPEATS) / ADD_BYTES

    def _block(self, size: int) -> Tensor:
        return torch.zeros(size, dtype=torch.uint8, device=self.device)

    def _meet(self) -> None:
        self.link.all_reduce(torch.zeros(1, device=self.device), "probe").wait()

    def _time(self, action: Callable[[], object], repeats: int) -> float:
        """Seconds that it takes where little else goes on: the lower quartile of several times.

        The first does not count.
        """
        found: Samples = []
        for _ in range(repeats + 1):
            begin = time.perf_counter()
            action()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            found.append(time.perf_counter() - begin)
        return sorted(found[1:])[(repeats - 1) // 4]


def _combine(alone: list[Trial], together: list[Trial], rows: list[list[float]]) -> Costs:
    """The slowest of each class."""
    inside, between = (
        _path(
            [row for trial, row in zip(alone, rows, strict=False) if trial.inside == within],
            [
                (trial, row)
                for trial, row in zip(together, rows[len(alone) :], strict=False)
                if trial.inside == within
            ],
            2 if within else 1,
        )
        for within in (True, False)
    )
    one = inside or between
    if one is None:
        one = Path(alpha_s=0.0, gap_s=0.0, beta_s_per_byte=0.0, shared_s_per_byte=0.0)
    return Costs(inside=inside or one, between=between or one, gamma_s_per_byte=max(rows[-1]))


def _path(
    alone: list[list[float]], together: list[tuple[Trial, list[float]]], directions: int
) -> Path | None:
    """A class of ways from the trials on it, None where there were none.

    directions: of an exchange that share one way: both do within a host.
    """
    if not alone:
        return None
    beta = max(row[3] / row[2] for row in alone)
    crowds = [row[3] / row[2] / trial.flows / directions for trial, row in together]
    return Path(
        alpha_s=max(row[0] for row in alone),
        gap_s=max(row[1] for row in alone),
        beta_s_per_byte=beta,
        shared_s_per_byte=max(crowds, default=beta / directions),
    )
