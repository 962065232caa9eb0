"""Remembers what was measured on a set of hosts, in the user's cache folder."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from allfuse.link.base import Link
from allfuse.link.costs import NUMBERS, Costs
from allfuse.link.probe import confirm, probe

FORMAT = 2  # of the files; another number when what is measured changes


def known_costs(
    link: Link,
    hosts: Sequence[str],
    device: torch.device | str = "cpu",
    *,
    folder: Path | None = None,
    measure: Callable[[Link, Sequence[str], torch.device | str], Costs] = probe,
    holds: Callable[[Costs, Link, Sequence[str], torch.device | str], bool] = confirm,
) -> tuple[Costs, bool]:
    """The constants of a link, and whether they were measured now rather than remembered.

    All peers must call it; all end with the same numbers, bit for bit: the first one looks them up
    and tells the others. A file that is damaged or of something else counts as none, and where none
    can be written, they are measured again the next time. What is remembered is tried on the link,
    which may have become another since, and measured anew where it does not hold.

    Args:
        hosts: the identity of each peer's host, in the order of peers.
        folder: where they are remembered; None is the user's cache folder.

    Raises:
        PeerLost: from the link.
    """
    place = folder or cache_folder()
    key = key_of(link, hosts, device)
    numbers = torch.full((NUMBERS,), -1.0, dtype=torch.float64)
    if link.rank == 0 and place is not None and (found := look_up(place, key)) is not None:
        numbers = torch.tensor(found.numbers(), dtype=torch.float64)
    numbers = numbers.to(device)
    link.broadcast(numbers, "probe").wait()
    told = numbers.tolist()
    if told[0] >= 0:
        costs = Costs.from_numbers(told)
        if holds(costs, link, hosts, device):
            return costs, False
    costs = measure(link, hosts, device)
    if link.rank == 0 and place is not None:
        with contextlib.suppress(OSError):  # no home, a full disk, or one that is read-only
            remember(place, key, costs)
    return costs, True


def cache_folder() -> Path | None:
    """`$XDG_CACHE_HOME/allfuse`, or `~/.cache/allfuse`; None for a user without a home."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(base):
        return Path(base) / "allfuse"
    with contextlib.suppress(RuntimeError):
        return Path.home() / ".cache" / "allfuse"
    return None


def key_of(link: Link, hosts: Sequence[str], device: torch.device | str) -> str:
    """What the numbers belong to: other hosts, ranks or software have others."""
    said = {
        "format": FORMAT,
        "hosts": list(hosts),
        "device": torch.device(device).type,
        "link": link.kind,
        "torch": str(torch.__version__),
    }
    return json.dumps(said, sort_keys=True)


def look_up(folder: Path, key: str) -> Costs | None:
    """What is remembered under a key; None where nothing is that can be trusted."""
    file = _file(folder, key)
    try:
        if not file.is_file():  # a pipe would keep who opens it waiting
            return None
        found = json.loads(file.read_text(encoding="utf-8"))
        return Costs.from_numbers(found["numbers"]) if found["key"] == key else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def remember(folder: Path, key: str, costs: Costs) -> None:
    """Write a file that is whole or absent; of several runs at once the last one stays.

    Raises:
        OSError: it cannot be written. Nothing is left behind.
    """
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"key": key, "numbers": costs.numbers()}, indent=1)
    handle, partial = tempfile.mkstemp(prefix=".partial-", dir=folder)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(partial, _file(folder, key))
    except OSError:
        Path(partial).unlink(missing_ok=True)
        raise


def _file(folder: Path, key: str) -> Path:
    return folder / f"links-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
