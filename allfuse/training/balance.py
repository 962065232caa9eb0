"""Shares of each batch by how fast the workers are, measured while they train."""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch

from allfuse.base.errors import PlanError, RunError
from allfuse.base.tensors import share
from allfuse.plan import Data
from allfuse.store.durable import explain, parse_json, replace_bytes

if TYPE_CHECKING:
    from allfuse.link import Link
    from allfuse.split.data import Portion
    from allfuse.split.data.loader import Cut
    from allfuse.training.exchange import Figures
    from allfuse.training.place import Place

EVERY = 8  # steps from one decision to the next, and those that it looks at
LEAST_SEEN = 4  # of them, else nothing is decided
GAIN = 0.05  # of a step's time: what a change must promise
RECORD = "shares.jsonl"

Moment: TypeAlias = tuple[int, int]
"""A batch: (epoch, step of the epoch)."""


class Decision(NamedTuple):
    """What was decided after the batch `at`: nothing new, or `speeds` for all from `start` on; or
    with how many `workers` it began there, evenly."""

    at: Moment
    start: Moment = (0, 0)
    speeds: tuple[float, ...] = ()
    workers: int = 0


class Balance:
    """Shares each batch out among the replicas of a data axis in proportion to their speed.

    Each rank hears from all others how many seconds they worked on their rows, so that all decide
    the same without a message: every `EVERY` steps a replica's speed is the median of rows a second
    over the last ones, and shares change where that makes the slowest sooner done by more than
    `GAIN`. What is decided holds from the first batch on that no loader has asked for yet. Any
    shares give the gradient of the whole batch, for each counts by its rows.

    What is decided is written to the run, also that nothing changes. A run that is resumed reads it
    again, and measures on where its record ends.

    Args:
        link: to the replicas, whose ranks are on CPUs.
        least: rows for each, where the batch has as many.
        warn: is told in words why a decision could not be written.
        sites: how many groups of such replicas share each batch, evenly; each measures by itself,
            and keeps a record of its own. site: which of them this is.
        everybody: a link to the replicas of all sites.
    """

    def __init__(
        self,
        link: Link,
        least: int,
        warn: Callable[[str], None],
        sites: int = 1,
        site: int = 0,
        everybody: Link | None = None,
    ) -> None:
        self.link, self.least, self.ahead = link, least, 0
        self.sites, self.site, self._everybody = sites, site, everybody
        self.script: Cut | None = None  # decides instead, where shares are to be known beforehand
        self._warn = warn
        self._decided = [Decision((0, 0), (0, 0), (1.0,) * link.size)]  # in force, and those to be
        self._known: Moment = (-1, -1)  # up to where the record of a resumed run goes
        self._seen: deque[list[float]] = deque(maxlen=EVERY)
        self._rows: tuple[int, ...] = ()  # of the step before
        self._batch = 0  # rows of the largest batch, or this site's part of it
        self._steps = 0
        self._last: tuple[tuple[int, tuple[float, ...]], tuple[int, ...]] = (0, ()), ()
        self._path: Path | None = None

    def cut(self, total: int, epoch: int, step: int) -> tuple[int, ...]:
        """The rows of each replica in a batch; those of other sites as if they were even, which
        in sum they are."""
        if self.script is not None:
            return self.script(total, epoch, step)
        here = [each for each in self._decided if each.start <= (epoch, step)][-1]
        asked = (total, here.speeds)
        if self._last[0] != asked:
            rows: list[int] = []
            for site in range(self.sites):
                start, stop = share(total, self.sites, site)
                speeds = here.speeds if site == self.site else (1.0,) * self.link.size
                rows += apportion(stop - start, speeds, self.least)
            self._last = asked, tuple(rows)
        return self._last[1]

    def _own(self, shares: Sequence[int]) -> tuple[int, ...]:
        first = self.site * self.link.size
        return tuple(shares[first : first + self.link.size])

    def hear(self, portion: Portion | None, figures: Figures | None) -> None:
        """Take in a step that is done; its figures are of the rows of the step before."""
        if figures is not None and self._rows:
            self._measure(self._rows, figures.busy_s)
        self._rows = () if portion is None else self._own(portion.shares)
        if portion is None:
            return
        at = (portion.epoch, portion.step)
        while len(self._decided) > 1 and self._decided[1].start <= at:
            self._decided.pop(0)
        self._batch = max(self._batch, sum(self._rows))
        self._steps += 1
        if self._steps % EVERY == 0 and at > self._known:
            self._decide(at)

    def _measure(self, rows: Sequence[int], busy_s: Sequence[float]) -> None:
        """Steps in which somebody had nothing to do tell nothing of its speed."""
        if all(rows) and all(0 < seconds < math.inf for seconds in busy_s):
            self._seen.append([n / seconds for n, seconds in zip(rows, busy_s, strict=True)])

    def _decide(self, at: Moment) -> None:
        if len(self._seen) < LEAST_SEEN:
            return self._note(Decision(at))
        speeds = [float(median(column)) for column in zip(*self._seen, strict=True)]

        def seconds(by: Sequence[float]) -> float:
            rows = apportion(self._batch, by, self.least)
            return max([n / speed for n, speed in zip(rows, speeds, strict=True)])

        if seconds(speeds) >= seconds(self._decided[-1].speeds) * (1 - GAIN):
            return self._note(Decision(at))
        start = (at[0], at[1] + 1 + self.ahead)
        told = tuple(float(f"{speed / sum(speeds):.4g}") for speed in speeds)
        self._decided.append(Decision(at, start, told))
        return self._note(self._decided[-1])

    # The record.

    def begin(self, folder: Path | None, here: Moment, resumes: bool) -> None:
        """Before the first step, on the batch `here`: keep a record, and go on as one says.

        Phases: sites wait until the folder is there, which the first one makes. Where a run is
        resumed the first rank of each sends its record, in two broadcasts.

        Raises:
            RunError: it cannot be read or written.
        """
        if folder is None:
            return
        record = [Decision(here, workers=self.link.size)]
        if self._everybody is not None:
            self._everybody.all_reduce(torch.zeros(1), "wait for the run folder").wait()
        if self.link.rank == 0:
            self._path = self._record_in(folder)
        if self._path is not None:
            record = _take_up(self._path, record[0]) if resumes else record
            _write(self._path, record)
        if resumes:
            record = self._spread(record)
        self._decided += [each for each in record if each.speeds]
        self._known = record[-1].at if len(record) > 1 else self._known

    def go_on(self, folder: Path | None, here: Moment) -> None:
        """After a loss, on the batch `here`: the first of those that are left keeps the record.

        Raises:
            RunError: it cannot be read or written.
        """
        if folder is not None and self.link.rank == 0:
            self._path = self._record_in(folder)
        if self._path is not None:
            began = Decision(here, workers=self.link.size)
            record = _take_up(self._path, began) if self.sites == 1 else [began]
            _write(self._path, record)

    def _record_in(self, folder: Path) -> Path | None:
        """Where this site keeps its record; None where its host has no such folder."""
        if folder.is_dir():
            return folder / (RECORD if self.site == 0 else f"shares-{self.site}.jsonl")
        self._warn(
            f"the shares of site {self.site} are not recorded, so that resuming may decide others: "
            f"its host has no folder {folder}"
        )
        return None

    def _spread(self, record: list[Decision]) -> list[Decision]:
        """The first rank's record, since its last change of workers."""
        first = max(place for place, each in enumerate(record) if each.workers)
        content = "".join(map(_line, record[first:])).encode()
        size = torch.tensor([len(content)])
        self.link.broadcast(size, "tell how long the record of shares is").wait()
        told = torch.zeros(int(size), dtype=torch.uint8)
        if self.link.rank == 0:
            told = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        self.link.broadcast(told, "tell the record of shares").wait()
        return parse(bytes(told.tolist()))

    def _note(self, decision: Decision) -> None:
        if self._path is None:
            return
        try:
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(_line(decision))
        except OSError as error:
            self._path = None
            self._warn(
                f"shares are not recorded any more, so that resuming may decide others: "
                f"{explain(error, Path(error.filename or RECORD))}"
            )


def make_balance(place: Place, least: int, warn: Callable[[str], None]) -> Balance | None:
    """What shares out batches where a plan says balance=speed; None where shares are even.

    Raises:
        PlanError: on a GPU: the process that queues a step's work does not see when it is done, and
        what waits for others (global BatchNorm, a fusion) is queued in between.
    """
    axis = place.plan.axis("data")
    if not isinstance(axis, Data) or axis.balance == "even" or axis.n == 1:
        return None
    if place.device.type != "cpu":
        why = f"speeds are measured on CPUs in this version, and this rank runs on {place.device}"
        raise PlanError(str(place.plan), why, str(replace(axis, balance="even")))
    site = place.plan.axis("site")
    if site is None or site.n == 1:
        return Balance(place.data, least, warn)
    number = place.coordinates["site"]
    return Balance(place.data, least, warn, site.n, number, place.replicas)


def apportion(total: int, speeds: Sequence[float], least: int = 1) -> tuple[int, ...]:
    """Rows for each in proportion to speed, so that the last to be done is done as soon as can be.

    Nobody gets fewer than `least`, or an even share where that is less.

    >>> apportion(64, [1, 4, 4, 4]), apportion(3, [1, 1]), apportion(2, [1, 1, 9])
    ((5, 20, 20, 19), (2, 1), (0, 0, 2))
    """
    least, whole = min(least, total // len(speeds)), sum(speeds)
    rows = [max(least, int(total * speed / whole)) for speed in speeds]
    while (rest := total - sum(rows)) != 0:
        everybody = range(len(rows))
        if rest > 0:  # to whoever is done first with one more
            rows[min(everybody, key=lambda i: (rows[i] + 1) / speeds[i])] += 1
        else:  # from whoever is done last
            rows[max(everybody, key=lambda i: (rows[i] > least, rows[i] / speeds[i]))] -= 1
    return tuple(rows)


def _take_up(path: Path, here: Decision) -> list[Decision]:
    """The record of a run that goes on at `here`. Other workers than before begin evenly, and what
    was decided beyond is of no use to them."""
    try:
        record = parse(path.read_bytes()) if path.exists() else []
    except OSError as error:
        raise RunError(explain(error, path)) from error
    last = [each.workers for each in record if each.workers][-1:]
    if last == [here.workers]:
        return record
    return [*(each for each in record if each.at < here.at), here]


def _write(path: Path, record: Iterable[Decision]) -> None:
    try:
        replace_bytes(path, "".join(map(_line, record)).encode())
    except OSError as error:
        raise RunError(explain(error, path)) from error


def _line(decision: Decision) -> str:
    empty = Decision(decision.at)
    told = {
        name: value
        for name, value in decision._asdict().items()
        if name == "at" or value != getattr(empty, name)
    }
    return json.dumps(told) + "\n"


def parse(content: bytes) -> list[Decision]:
    """The decisions in a record, up to a line that a crash or a hand has spoilt."""
    found: list[Decision] = []
    for line in content.splitlines():
        try:
            found.append(_read(parse_json(line)))
        except ValueError:
            break
    return found


def _read(value: Any) -> Decision:
    match value:
        case {"at": [int(epoch), int(step)], **rest} if min(epoch, step) >= 0:
            at = (epoch, step)
        case _:
            raise ValueError("a decision is made at a batch")
    match rest:
        case {"workers": int(workers)} if len(rest) == 1 and workers > 0:
            return Decision(at, workers=workers)
        case {"start": [int(epoch), int(step)], "speeds": list(speeds)} if len(rest) == 2:
            if speeds and all(type(v) is float and 0 < v < math.inf for v in speeds):
                return Decision(at, (epoch, step), tuple(speeds))
        case {} if not rest:
            return Decision(at)
    raise ValueError("a decision is one on speeds, on workers, or on nothing new")
