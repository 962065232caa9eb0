"""Ranks on emulated hosts: the world that torchrun would make of several machines, on one.

`netlab.sh` makes the hosts; each rank is a process on one of them with torchrun's environment.
A function runs on every rank, named as text, and what it returns comes back as JSON:

    with hosts.emulated(4, "100mbit"):
        found = hosts.launch("network:measure", {"size": 5_000_000}, hosts=4, each=2)
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
NETLAB = HERE / "netlab.sh"
FIRST_ADDRESS = "10.83.0.1"  # of host 0
RESULT = "result: "  # begins the line on which a rank says what it found
GRACE_S = 5.0

_ports = itertools.count(29500)  # a new one for each launch: an old one may be held for a while


def why_not() -> str | None:
    """Why hosts cannot be emulated here, None where they can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "emulated hosts (they need Linux and root)"
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    return f"emulated hosts (they need {' and '.join(missing)} of iproute2)" if missing else None


@contextlib.contextmanager
def emulated(hosts: int, rate: str) -> Iterator[None]:
    """So many hosts, each sending and receiving at `rate` at most (as tc writes it: 100mbit).

    They are taken down at the end, after SIGTERM too.

    Raises:
        RuntimeError: they could not be made; the message is netlab's.
    """
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        _netlab("up", str(hosts), rate)
        try:
            yield
        finally:
            _netlab("down")
    finally:
        signal.signal(signal.SIGTERM, before)


def _netlab(*arguments: str) -> None:
    done = subprocess.run([str(NETLAB), *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr.strip())


def launch(
    function: str,
    arguments: Mapping[str, Any],
    *,
    hosts: int,
    each: int = 1,
    timeout_s: float = 300.0,
) -> list[Any]:
    """Run `module:function(**arguments)` as `each` ranks on each host; what every rank returned.

    Ranks are dealt host by host and have one thread each. All are ended when one fails.

    Raises:
        RuntimeError: a rank failed or was not done in time; with the end of what it said.
    """
    port = str(next(_ports))
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        outputs = [Path(folder) / str(rank) for rank in range(hosts * each)]
        ranks = []
        for rank, output in enumerate(outputs):
            environment = os.environ | {
                "RANK": str(rank),
                "WORLD_SIZE": str(hosts * each),
                "LOCAL_RANK": str(rank % each),
                "LOCAL_WORLD_SIZE": str(each),
                "MASTER_ADDR": FIRST_ADDRESS,
                "MASTER_PORT": port,
                "GLOO_SOCKET_IFNAME": "eth0",
                "OMP_NUM_THREADS": "1",
            }
            command = [sys.executable, __file__, function, json.dumps(arguments)]
            file = stack.enter_context(output.open("w"))
            ranks.append(
                subprocess.Popen(
                    [str(NETLAB), "run", str(rank // each), *command],
                    env=environment,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                )
            )
            stack.callback(_end, ranks[-1])
        _wait_for(ranks, outputs, timeout_s)
        return [_result(output) for output in outputs]


def _wait_for(ranks: list[subprocess.Popen[bytes]], outputs: list[Path], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while True:
        codes = [rank.poll() for rank in ranks]
        failed = [number for number, code in enumerate(codes) if code]
        if failed or time.monotonic() > deadline:
            number = failed[0] if failed else codes.index(None)
            why = f"ended with {codes[number]}" if failed else f"was not done in {timeout_s:g} s"
            said = outputs[number].read_text(encoding="utf-8", errors="replace")[-2000:]
            raise RuntimeError(f"rank {number} {why}:\n{said}")
        if all(code == 0 for code in codes):
            return
        time.sleep(0.05)


def _end(process: subprocess.Popen[bytes]) -> None:
    """`netlab.sh run` becomes the command that it runs, so that this ends the rank itself."""
    process.terminate()
    try:
        process.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _result(output: Path) -> Any:
    lines = output.read_text(encoding="utf-8", errors="replace").splitlines()
    found = [line for line in lines if line.startswith(RESULT)]
    return json.loads(found[-1].removeprefix(RESULT))


def main() -> None:
    """Runs in each rank."""
    name, arguments = sys.argv[1:]
    module, _, function = name.partition(":")
    found = getattr(importlib.import_module(module), function)(**json.loads(arguments))
    print(f"{RESULT}{json.dumps(found)}", flush=True)


if __name__ == "__main__":
    main()
