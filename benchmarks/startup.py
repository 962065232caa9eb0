"""How long a person waits: for `allfuse --help`, and from `allfuse train` to its first step.

The peer of the second is a script with torch.multiprocessing.spawn, init_process_group and
DistributedDataParallel that does the same first step with 2 workers. Each run is cold processes;
the two sides take turns.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import harness

HELP_TARGET_S = 0.3
TARGET = 1.3
SECONDS = 70.0  # for the turns of both sides
HERE = Path(__file__).resolve().parent


def run(*command: str) -> None:
    """Run to its end; what it printed is shown when it fails."""
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed\n{done.stdout}{done.stderr}")


def seconds_of(*command: str) -> float:
    begin = time.perf_counter()
    run(*command)
    return time.perf_counter() - begin


def until_stamp(stamp: Path, *command: str) -> float:
    """Seconds from the start of a command to the time that it writes into a file."""
    stamp.unlink(missing_ok=True)
    begin = time.time()
    run(*command)
    return float(stamp.read_text(encoding="utf-8")) - begin


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def first_steps(seconds: float) -> tuple[list[float], list[float]]:
    """Seconds to the first step, of allfuse and of the script, in turns."""
    ours: list[float] = []
    bare: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        stamp = Path(folder) / "stamp"
        train = ("-m", "allfuse", "train", str(HERE / "first_step_job.py"), "--workers", "2")
        for number in harness.rounds_for(seconds, least=1):
            turns = [
                lambda: ours.append(until_stamp(stamp, *train, "--set", f"stamp={stamp}")),
                lambda: bare.append(
                    until_stamp(
                        stamp, str(HERE / "first_step_bare.py"), str(stamp), str(free_port())
                    )
                ),
            ]
            for turn in turns if number % 2 == 0 else reversed(turns):
                turn()
    return ours, bare


def main() -> None:
    options = harness.parse_options(__doc__)
    os.environ["OMP_NUM_THREADS"] = "1"
    run("-m", "allfuse", "--help")  # so that every file is compiled and in memory
    helps = [seconds_of("-m", "allfuse", "--help") for _ in range(2 if options.quick else 12)]
    pythons = [seconds_of("-c", "pass") for _ in range(2 if options.quick else 12)]
    loads = [seconds_of("-c", "import torch") for _ in range(1 if options.quick else 3)]
    ours, bare = first_steps(0.0 if options.quick else SECONDS)
    told = f"allfuse {harness.quartiles(ours)[1]:.2f} s, script {harness.quartiles(bare)[1]:.2f} s"
    found = [
        harness.figure(
            "allfuse --help",
            helps,
            target=HELP_TARGET_S,
            unit="s",
            floor=f"python that does nothing: {harness.quartiles(pythons)[1]:.3f} s",
        ),
        harness.figure(
            "first step of allfuse train over spawn + DistributedDataParallel",
            harness.ratios(ours, bare),
            target=TARGET,
            floor=f"{told}; import torch alone {harness.quartiles(loads)[1]:.2f} s",
        ),
    ]
    harness.report("startup", found, options)


if __name__ == "__main__":
    main()
