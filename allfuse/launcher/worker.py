"""What a forked worker does: runs the function that it was sent and reports how it ended."""

from __future__ import annotations

import atexit
import os
import pickle
import signal
import socket
import struct
import sys
import threading
import traceback
from datetime import timedelta
from typing import Any

import cloudpickle

from allfuse.base.errors import AllfuseError, PeerLost
from allfuse.launcher.base import entered
from allfuse.launcher.store import StoreWorld


def send_message(channel: socket.socket, message: Any) -> None:
    """One pickled message, its length in front. Between a launcher and its own children only."""
    body = cloudpickle.dumps(message)
    channel.sendall(struct.pack("<Q", len(body)) + body)


def receive_message(channel: socket.socket) -> Any:
    """The next message, or None when the other end has closed."""
    header = _receive_exactly(channel, 8)
    if header is None:
        return None
    body = _receive_exactly(channel, struct.unpack("<Q", header)[0])
    return None if body is None else pickle.loads(body)  # noqa: S301  our own child or parent


def _receive_exactly(channel: socket.socket, count: int) -> bytes | None:
    parts = bytearray()
    while len(parts) < count:
        try:
            piece = channel.recv(min(count - len(parts), 1 << 20))
        except ConnectionResetError:
            return None
        if not piece:
            return None
        parts += piece
    return bytes(parts)


def work(channel: socket.socket, request: dict[str, Any]) -> None:
    """Runs in a fresh fork. Never returns."""
    code = 1
    try:
        code = _work(channel, request)
        atexit._run_exitfuncs()
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except (OSError, ValueError):
                continue
        os._exit(code)


def _work(channel: socket.socket, request: dict[str, Any]) -> int:
    import torch

    from allfuse.base.torch_private import PrefixStore, TCPStore

    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.path[:], sys.argv[:] = request["path"], request["command"]
    rank, size = request["index"], request["workers"]
    torch.set_num_threads(request["threads"])
    store = TCPStore("127.0.0.1", request["port"], None, False, timedelta(seconds=300))
    world = StoreWorld(
        PrefixStore(request["run"], store),
        rank,
        size,
        loopback=True,
        timeout_s=request["timeout_s"],
    )
    world.kind, world.plan = "local", request["plan"]
    world.local_rank, world.local_size = rank, size
    function = receive_message(channel)
    listener = threading.Thread(target=_listen, args=(channel, world), daemon=True)
    listener.start()
    with entered(world):
        try:
            result = function()
        except BaseException as error:
            world.tell_why_gone(f"ended with {type(error).__name__}: {error}")
            send_message(channel, ("failed", describe_failure(error, world.step)))
            return int(getattr(error, "exit_code", 1))
        send_message(channel, ("done", cloudpickle.dumps(result if rank == 0 else None)))
        world.tell_why_gone("had finished its work")
        return 0


def _listen(channel: socket.socket, world: StoreWorld) -> None:
    """Obeys the launcher: a message asks to stop, a closed channel means that it died."""
    while receive_message(channel) is not None:
        world.stop_requested.set()
    os._exit(1)


def describe_failure(error: BaseException, step: int | None) -> dict[str, Any]:
    """A failure as plain values: exceptions of users need not be picklable."""
    expected = isinstance(error, AllfuseError)
    if isinstance(error, SystemExit):  # a script that calls sys.exit
        text, code = f"the script called exit({error.code})", error.code
        exit_code = code if isinstance(code, int) else 1
    else:
        text, exit_code = str(error), int(getattr(error, "exit_code", 1))
    return {
        "type": type(error).__name__,
        "text": text,
        "trace": "".join(traceback.format_exception(error)),
        "expected": expected,
        "peer_lost": isinstance(error, PeerLost),
        "exit_code": exit_code,
        "step": step,
    }
