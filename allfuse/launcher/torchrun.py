"""Joins the processes that torchrun (or any launcher with its environment) started.

The only file that reads launcher facts from the environment.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING

from allfuse.base.errors import UserError
from allfuse.launcher.base import await_word
from allfuse.launcher.signals import catch_signals
from allfuse.launcher.store import StoreWorld

if TYPE_CHECKING:
    from allfuse.launcher.joined_crew import RolesBeside
    from allfuse.link.base import Board

NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

SIOCGIFADDR = 0x8915  # Linux: the IPv4 address of an interface

_joined = 0  # worlds that this process joined: sessions that follow each other must not meet


class JoinedWorld(StoreWorld):
    """A world that answers to Ctrl-C and SIGTERM while it is open.

    Attributes:
        place, everybody: this process among all that torchrun started.
        all_on_one_host: whether those are all on this host.
        meeting, common: the name at the store where all of them meet, and a board there.
        beside: what runs beside this process, and ends with it.
    """

    place: int
    everybody: int
    all_on_one_host: bool
    meeting: str
    common: Board
    beside: RolesBeside | None = None
    give_back_signals: Callable[[], None]

    def hear(self, key: str, peer: int, operation: str, reason: str) -> bytes:
        """What a process says to all that torchrun started. Raises PeerLost for a reason."""
        return await_word(
            self.common,
            key,
            rank=self.place,
            peer=peer,
            operation=operation,
            reason=reason,
            timeout_s=self.timeout_s,
        )

    def sees_alone(self, devices: Sequence[str]) -> bool:
        """What one process sees may be hidden from others of its host."""
        key = self.new_key("devices")
        self.common.set(f"{key}/{self.place}", " ".join(devices).encode())
        if self.local_size == 1 or not devices:
            return self.local_size == 1
        why = "did not say which devices it sees"
        others = [
            self.hear(f"{key}/{rank}", rank, "compare devices", why).decode().split()
            for rank in range(self.everybody)
            if rank != self.place
        ]
        return not set(devices) & {device for seen in others for device in seen}

    def close(self, error: BaseException | None = None) -> None:
        try:
            super().close(error)
            if self.beside is not None:
                self.beside.close(error)
        finally:
            self.give_back_signals()


def started_by_torchrun() -> bool:
    """Whether this process was started with torchrun's environment."""
    return all(name in os.environ for name in NEEDED)


def environment_number(name: str, default: int) -> int:
    """A launcher fact that must be a whole number."""
    text = os.environ.get(name, str(default))
    if not text.isdigit():
        raise UserError(f"environment variable {name}: received {text!r}; allowed: a whole number")
    return int(text)


def own_address(master: str) -> str | None:
    """The address by which other hosts reach this one; None where it cannot be told.

    That of the interface that GLOO_SOCKET_IFNAME names, else the one that traffic to the master
    goes out from. (A host's own name often resolves to a loopback address, and on the master's host
    so may the master's.) Nothing is sent.
    """
    if interface := os.environ.get("GLOO_SOCKET_IFNAME"):
        return _address_of(interface.split(",")[0])
    elsewhere = "192.0.2.1"  # set aside for documentation (RFC 5737): the default route
    for target in (master, elsewhere):
        with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as way:
            way.connect((target, 9))
            found: str = way.getsockname()[0]
            if not found.startswith("127."):
                return found
    return None


def _address_of(interface: str) -> str:
    import fcntl

    request = struct.pack("256s", interface.encode()[:15])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        try:
            told = fcntl.ioctl(any_socket.fileno(), SIOCGIFADDR, request)
        except OSError as error:
            raise UserError(
                f"environment variable GLOO_SOCKET_IFNAME: received {interface!r} ({error}); "
                "allowed: a network interface of this host with an IPv4 address"
            ) from None
    return socket.inet_ntoa(told[20:24])


def join_torchrun(
    plan: str | None, timeout_s: float = 300.0, *, ranks: int | None = None
) -> JoinedWorld:
    """The world of a process that torchrun started. Meets its peers at torchrun's own store.

    Args:
        ranks: size of a group of consecutive ranks, each a world of its own; None: all are one.
    """
    from allfuse.base.torch_private import PrefixStore, TCPStore
    from allfuse.link.group import StoreBoard

    global _joined
    _joined += 1
    size, rank = environment_number("WORLD_SIZE", 1), environment_number("RANK", 0)
    hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = TCPStore(
        os.environ["MASTER_ADDR"],
        environment_number("MASTER_PORT", 29500),
        None,
        rank == 0 and not hosted,
        timedelta(seconds=timeout_s),
        wait_for_workers=False,
        multi_tenant=True,  # beside the store that the script's own init_process_group may make
    )
    attempt = environment_number("TORCHELASTIC_RESTART_COUNT", 0)
    run = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    local_size = environment_number("LOCAL_WORLD_SIZE", size)
    meeting = f"allfuse/{run}/{attempt}/{_joined}"
    group, inside = divmod(rank, ranks or size)
    world = JoinedWorld(
        PrefixStore(meeting if ranks is None else f"{meeting}/group{group}", store),
        inside,
        ranks or size,
        loopback=local_size == size,
        address=None if local_size == size else own_address(os.environ["MASTER_ADDR"]),
        timeout_s=timeout_s,
        host=None if hosted or group else 0,
    )
    world.place, world.everybody, world.all_on_one_host = rank, size, local_size == size
    world.meeting, world.common = meeting, StoreBoard(PrefixStore(meeting, store))
    world.kind, world.plan = "torchrun", plan
    world.local_rank = environment_number("LOCAL_RANK", rank)
    world.local_size = local_size
    world.give_back_signals = catch_signals(world.ask_to_stop)
    return world
