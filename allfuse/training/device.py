"""On which device a rank computes."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from allfuse.base.errors import UserError

if TYPE_CHECKING:
    from allfuse.launcher import World


def choose_device(name: str | None, world: World) -> torch.device:
    """The GPU of this rank, or the CPU where there are not enough; `name` overrides.

    A process that sees as many GPUs as its host has workers takes that of its local rank. One that
    sees fewer takes its first, where no other process sees it (Slurm's --gpus-per-task, or a
    CUDA_VISIBLE_DEVICES of its own).

    Raises:
        UserError: there is no such device here. PeerLost: another process did not say what it sees.
    """
    place, seen = None, 0
    if name in (None, "cuda"):
        place, seen = _find_gpu(world)
    if name is None:
        name = "cpu" if place is None else "cuda"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name}: there is no such device; allowed: cpu, cuda") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError(f"--device {name}: torch sees no GPU here; allowed: cpu")
        if name == "cuda":
            if place is None:
                raise UserError(
                    f"--device cuda: this process sees {seen} GPUs for {world.local_size} workers, "
                    "and others see the same; next: fewer workers, a GPU of its own for each "
                    "(Slurm's --gpus-per-task=1), or --device cpu"
                )
            device = torch.device("cuda", place)
        torch.cuda.set_device(device)
    elif device.type != "cpu":
        raise UserError(f"--device {name}: received {device.type}; allowed: cpu, cuda")
    return device


def room_bytes(device: torch.device, sharing: int) -> int | None:
    """What one of the ranks that share a device may still take of its memory: of a host's, where
    that says how much is free. None where nobody knows."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if "MemAvailable" in line)
    except (OSError, StopIteration):
        return None
    with contextlib.suppress(OSError, ValueError):  # no control group, or "max"
        free = min(free, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return free // sharing


def _find_gpu(world: World) -> tuple[int | None, int]:
    """Which of the GPUs that this process sees is its own, None where none is; how many it sees."""
    seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    enough = seen >= world.local_size
    alone = world.sees_alone([_identity(index) for index in range(seen)])  # all ask, for all
    if seen and (enough or alone):
        return (world.local_rank if enough else 0), seen
    return None, seen


def _identity(index: int) -> str:
    """Of a GPU, whatever number a process sees it under."""
    return str(torch.cuda.get_device_properties(index).uuid)
