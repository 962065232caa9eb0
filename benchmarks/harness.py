"""What all benchmarks share: interleaved timing, figures with their spread, the last JSON line.

A figure is the median of ratios taken in pairs, one pair a round, so that whatever slows the
machine for a while slows both sides of a ratio. Its spread is the interquartile range of them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SPREAD = "interquartile range over the rounds"
QUICK = "a smoke run: the shortest, its figures mean nothing"
ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One measured number.

    Args:
        value, spread: median and interquartile range, both in `unit`.
        target: what it should reach, None where it only informs.
        better: "lower" or "higher".
        floor: the physical limit, or what the number is to be seen beside, in words.
        rounds: how many values it is the median of.
    """

    name: str
    value: float
    spread: float
    target: float | None = None
    better: str = "lower"
    unit: str = "x"
    floor: str = ""
    rounds: int = 1

    def __post_init__(self) -> None:
        if self.better not in ("lower", "higher"):
            raise ValueError(f"better={self.better!r}; allowed: lower, higher")

    @property
    def ok(self) -> bool | None:
        """Whether the target is met; None without one."""
        if self.target is None:
            return None
        return self.value <= self.target if self.better == "lower" else self.value >= self.target

    def plain(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "value": rounded(self.value),
            "spread": rounded(self.spread),
            "target": self.target,
            "better": self.better,
            "ok": self.ok,
            "unit": self.unit,
            "floor": self.floor,
            "rounds": self.rounds,
        }


def figure(name: str, values: Sequence[float], **about: Any) -> Figure:
    """The median of some values and their interquartile range.

    >>> figure("step", [1.0, 1.1, 1.2], target=1.15).ok
    True
    """
    low, middle, high = quartiles(values)
    return Figure(name=name, value=middle, spread=high - low, rounds=len(values), **about)


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile.

    >>> quartiles([3.0, 1.0, 2.0])
    (1.5, 2.0, 2.5)
    """
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def ratios(above: Iterable[float], below: Iterable[float]) -> list[float]:
    """The ratio of each pair."""
    return [a / b for a, b in zip(above, below, strict=True)]


@dataclass(frozen=True, kw_only=True)
class Turns:
    """What the turns of one contender took, one entry a round.

    wall_s: seconds. cpu_s: processor seconds of all threads of this process, which say the same
    on a machine that others use too.
    """

    wall_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)

    def each(self, steps: int) -> Turns:
        """The same for one step of a turn."""
        return Turns(
            wall_s=[value / steps for value in self.wall_s],
            cpu_s=[value / steps for value in self.cpu_s],
        )


def interleave(
    contenders: Mapping[str, Callable[[], None]],
    rounds: int,
    meet: Callable[[], Any] = lambda: None,
) -> dict[str, Turns]:
    """What each contender takes in each round.

    Every other round goes backwards, so that none gains by its place. `meet()` runs before each
    turn and is not timed: processes that are measured together wait there for each other.
    """
    turns = {name: Turns() for name in contenders}
    for number in range(rounds):
        names = list(contenders) if number % 2 == 0 else list(reversed(list(contenders)))
        for name in names:
            meet()
            begin, begin_cpu = time.perf_counter(), time.process_time()
            contenders[name]()
            turns[name].wall_s.append(time.perf_counter() - begin)
            turns[name].cpu_s.append(time.process_time() - begin_cpu)
    return turns


def gather(parts: Iterable[Mapping[str, Turns]]) -> dict[str, Turns]:
    """The turns of several runs, as if they were one."""
    held: dict[str, Turns] = {}
    for part in parts:
        for name, turns in part.items():
            held.setdefault(name, Turns())
            held[name].wall_s.extend(turns.wall_s)
            held[name].cpu_s.extend(turns.cpu_s)
    return held


def rounds_for(seconds: float, least: int = 2) -> Iterator[int]:
    """Numbers of rounds until so many seconds are over; at least `least`."""
    end = time.monotonic() + seconds
    number = 0
    while number < least or time.monotonic() < end:
        yield number
        number += 1


def milliseconds(seconds: Sequence[float]) -> str:
    """The median, in words."""
    return f"{statistics.median(seconds) * 1e3:.2f} ms"


@dataclass(frozen=True, kw_only=True)
class Options:
    """quick: a smoke run, whose figures mean nothing."""

    quick: bool


def parse_options(description: str | None) -> Options:
    """What was asked for on the command line."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help=QUICK)
    return Options(quick=parser.parse_args().quick)


def report(
    benchmark: str, figures: Sequence[Figure], options: Options, skipped: Iterable[str] = ()
) -> None:
    """Print the figures for a person, then as one JSON line."""
    width = max(len(figure.name) for figure in figures)
    for each in figures:
        verdict = {True: "ok", False: "MISSED", None: ""}[each.ok]
        sign = "<=" if each.better == "lower" else ">="
        target = "" if each.target is None else f"target {sign} {each.target:g} {each.unit}"
        print(
            f"{each.name:{width}}  {each.value:9.4g} {each.unit:4} "
            f"(spread {each.spread:.2g} of {each.rounds})  {target:18} {verdict}  {each.floor}"
        )
    for name in skipped:
        print(f"skipped, as it is not installed: {name}")
    print(json_line(benchmark, figures, options, skipped), flush=True)


def json_line(
    benchmark: str, figures: Sequence[Figure], options: Options, skipped: Iterable[str] = ()
) -> str:
    """The last line of a benchmark's output."""
    return json.dumps(
        {
            "benchmark": benchmark,
            "commit": commit(),
            "machine": machine(),
            "figures": [each.plain() for each in figures],
            "spread_is": SPREAD,
            "quick": options.quick,
            "skipped": list(skipped),
        }
    )


def commit() -> str:
    """The commit that is measured; "+" says that files have changed since."""
    try:
        found = _git("rev-parse", "--short=10", "HEAD")
        return found + ("+" if _git("status", "--porcelain", "--", "allfuse") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*arguments: str) -> str:
    return subprocess.run(
        ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()


def machine() -> str:
    """Processor, cores, memory, system and versions, in one line."""
    import torch

    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    parts = [
        f"{_processor()}, {len(os.sched_getaffinity(0))} cores, {pages / 2**30:.0f} GiB",
        f"{platform.system()} {platform.release()}",
        f"Python {platform.python_version()}",
        f"torch {torch.__version__}",
    ]
    if torch.cuda.is_available():
        parts.insert(1, torch.cuda.get_device_name(0))
    return "; ".join(parts)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.machine()


def command() -> str:
    """The command that runs now, as typed from the root of the project."""
    script = Path(sys.argv[0]).resolve()
    name = script.relative_to(ROOT) if script.is_relative_to(ROOT) else script.name
    return " ".join(["python", str(name), *sys.argv[1:]])


def rounded(value: float) -> float:
    """Four digits say all that such a measurement knows."""
    return float(f"{value:.4g}")
