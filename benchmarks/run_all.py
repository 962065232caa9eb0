"""Runs every benchmark and writes benchmarks/results.md, which `make bench` does.

python benchmarks/run_all.py            all of them, some minutes
python benchmarks/run_all.py step       some of them; the others keep their entries
python benchmarks/run_all.py --quick    a smoke run that writes nothing
python benchmarks/run_all.py merge --mergekit PYTHON    an option of one of them
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import harness

BENCHMARKS = (
    "step",
    "overhead",
    "scaling",
    "startup",
    "checkpoint",
    "allreduce",
    "socket_link",
    "push_pull",
    "server_cycle",
    "overlap",
    "straggler",
    "lost_worker",
    "network",
    "slow_link",
    "quality",
    "split",
    "loading",
    "merge",
)
HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results.md"
HEAD = """# What was measured

Written by `make bench`; do not edit. Each ratio is taken against a peer in the same run, in pairs
that take turns; its value is the median of them and its spread their interquartile range. A target
that was missed says so.
"""


def run(name: str, quick: bool, more: Sequence[str] = ()) -> dict[str, Any] | None:
    """One benchmark in a process of its own; what its JSON line says, None when it failed."""
    command = [sys.executable, str(HERE / f"{name}.py"), *(["--quick"] if quick else []), *more]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=harness.ROOT)
    print(done.stdout, end="", flush=True)
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        print(f"{name}: failed with exit code {done.returncode}", flush=True)
        return None
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def section(found: dict[str, Any]) -> str:
    """A benchmark as a part of results.md."""
    rows = [
        "| figure | value | spread | rounds | target | ok | beside it |",
        "|---|---|---|---|---|---|---|",
    ]
    for figure in found["figures"]:
        sign = "<=" if figure["better"] == "lower" else ">="
        target = "" if figure["target"] is None else f"{sign} {figure['target']}"
        verdict = {True: "yes", False: "**no**", None: ""}[figure["ok"]]
        unit = " s" if figure["unit"] == "s" else ""
        rows.append(
            f"| {figure['name']} | {figure['value']}{unit} | {figure['spread']} | "
            f"{figure['rounds']} | {target} | {verdict} | {figure['floor']} |"
        )
    day = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    about = [
        f"`python benchmarks/{found['benchmark']}.py`, {day}, commit {found['commit']}, on",
        f"{found['machine']}.",
    ]
    skipped = [f"Skipped, as it is not installed: {name}." for name in found["skipped"]]
    return "\n".join([f"## {found['benchmark']}", "", *about, *skipped, "", *rows, ""])


def kept_sections() -> dict[str, str]:
    """The parts of results.md as it is, by the name of their benchmark."""
    if not RESULTS.exists():
        return {}
    parts = RESULTS.read_text(encoding="utf-8").split("\n## ")[1:]
    return {part.split("\n", 1)[0]: f"## {part.rstrip()}\n" for part in parts}


def write_results(sections: dict[str, str]) -> None:
    """After each benchmark, so that a run that is broken off keeps what it has measured."""
    body = "\n".join(sections[name] for name in BENCHMARKS if name in sections)
    RESULTS.write_text(f"{HEAD}\n{body}", encoding="utf-8")
    print(f"\nwritten: {RESULTS.relative_to(harness.ROOT)}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"{', '.join(BENCHMARKS)}; none: all of them"
    )
    parser.add_argument("--quick", action="store_true", help="a smoke run that writes nothing")
    options, more = parser.parse_known_args()
    if more and len(options.names) != 1:
        parser.error(f"{' '.join(more)}: options are handed on to a single benchmark")
    for name in options.names:
        if name not in BENCHMARKS:
            parser.error(f"there is no benchmark {name!r}; allowed: {', '.join(BENCHMARKS)}")
    chosen = options.names or list(BENCHMARKS)
    failed = []
    for name in chosen:
        print(f"\n{name}", flush=True)
        found = run(name, options.quick, more)
        if found is None:
            failed.append(name)
        elif not options.quick:
            write_results(kept_sections() | {name: section(found)})  # others may have written too
    if failed:
        print(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
