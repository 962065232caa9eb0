"""Which host this is: ranks with the same answer share its network and its memory."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from pathlib import Path


def host_identity() -> str:
    """Equal in processes of one host, and different in another host or container.

    A machine is told by its boot, a container by its own network or shared memory.
    """
    parts = [socket.gethostname()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    with suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/net"))
    with suppress(OSError):
        found = os.stat("/dev/shm")
        parts.append(f"{found.st_dev}/{found.st_ino}")
    return " ".join(parts)
