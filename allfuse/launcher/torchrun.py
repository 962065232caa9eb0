"""Joins the processes that torchrun (or any launcher with its environment) started.

The only file that reads launcher facts from the environment.
"""

from __future__ import annotations

import os
import signal
from datetime import timedelta
from types import FrameType

from allfuse.base.errors import UserError
from allfuse.launcher.store import StoreWorld

NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def started_by_torchrun() -> bool:
    """Whether this process was started with torchrun's environment."""
    return all(name in os.environ for name in NEEDED)


def environment_number(name: str, default: int) -> int:
    """A launcher fact that must be a whole number."""
    text = os.environ.get(name, str(default))
    if not text.isdigit():
        raise UserError(f"environment variable {name}: received {text!r}; allowed: a whole number")
    return int(text)


def join_torchrun(plan: str | None, timeout_s: float = 300.0) -> StoreWorld:
    """The world of a process that torchrun started. Meets its peers at torchrun's own store."""
    from allfuse.base.torch_private import PrefixStore, TCPStore

    size, rank = environment_number("WORLD_SIZE", 1), environment_number("RANK", 0)
    hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = TCPStore(
        os.environ["MASTER_ADDR"],
        environment_number("MASTER_PORT", 29500),
        None,
        rank == 0 and not hosted,
        timedelta(seconds=timeout_s),
        wait_for_workers=False,
    )
    attempt = environment_number("TORCHELASTIC_RESTART_COUNT", 0)
    run = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    local_size = environment_number("LOCAL_WORLD_SIZE", size)
    world = StoreWorld(
        PrefixStore(f"allfuse/{run}/{attempt}", store),
        rank,
        size,
        loopback=local_size == size,
        timeout_s=timeout_s,
    )
    world.kind, world.plan = "torchrun", plan
    world.local_rank = environment_number("LOCAL_RANK", rank)
    world.local_size = local_size

    def ask_to_stop(number: int, frame: FrameType | None) -> None:
        if world.stop_requested.is_set():
            raise SystemExit(128 + number)
        world.stop_requested.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, ask_to_stop)
    return world
