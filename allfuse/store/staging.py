"""Copies of live tensors, in memory that is allocated once and used again.

Fresh memory costs a page fault for every 4 kB that is written to it, several times the copy itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor

ALIGNMENT = 64
_ALIKE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Staging:
    """Copies one set of tensors to host memory, part of it on a background thread.

    In this order: `begin` on the caller's thread, `copy` on the background thread, `hold` on the
    caller's thread before it changes the tensors, `finish` on the background thread. The staged
    tensors are valid until the next `begin`.

    On CUDA the copies run on a stream of their own, after what the caller's stream was given
    before `begin`; `hold` makes the caller's stream wait for them, not the caller.
    """

    def __init__(self) -> None:
        self._now, self._later = _Arena(), _Arena()
        self._names: list[str] = []
        self._early: dict[str, Tensor] = {}
        self._live: dict[str, Tensor] = {}
        self._staged: dict[str, Tensor] = {}
        self._ready: dict[torch.device, torch.cuda.Event] = {}
        self._copied: dict[torch.device, torch.cuda.Event] = {}

    def begin(self, tensors: Mapping[str, Tensor], sooner: Iterable[Tensor]) -> None:
        """Take note of the tensors, and copy at once those that share memory with `sooner`."""
        places = {_place(tensor) for tensor in sooner if tensor.numel()}
        early = {n: t for n, t in tensors.items() if t.numel() and _place(t) in places}
        self._names = list(tensors)
        self._live = {n: t for n, t in tensors.items() if n not in early}
        self._early = early  # held until `finish`, while CUDA may still read them
        self._staged = self._now.place(early)
        self._copied = {}
        _copy(early, self._staged)
        devices = dict.fromkeys(tensor.device for tensor in tensors.values() if tensor.is_cuda)
        self._ready = {d: torch.cuda.current_stream(d).record_event() for d in devices}

    def copy(self) -> None:
        """Copy the rest; on CUDA, give the copies to the device."""
        staged = self._later.place(self._live)
        on_host = {n: t for n, t in self._live.items() if not t.is_cuda}
        for device, ready in self._ready.items():
            stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            stream.wait_event(ready)
            with torch.cuda.stream(stream):
                _copy({n: t for n, t in self._live.items() if t.device == device}, staged)
                self._copied[device] = stream.record_event()
        _copy(on_host, staged)
        self._staged |= staged

    def hold(self) -> None:
        """Let what the caller does next with the tensors come after the copies."""
        for device, copied in self._copied.items():
            torch.cuda.current_stream(device).wait_event(copied)

    def finish(self) -> dict[str, Tensor]:
        """The copies, in the order of the tensors, once every byte is there."""
        for copied in self._copied.values():
            copied.synchronize()
        self._live, self._early = {}, {}
        return {name: self._staged[name] for name in self._names}


class _Arena:
    """One block of host memory, pinned when tensors come from CUDA, that only ever grows."""

    def __init__(self) -> None:
        self._block = torch.empty(0, dtype=torch.uint8)

    def place(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A contiguous tensor for each of the given ones, of its type and shape."""
        starts, end = {}, 0
        for name, tensor in tensors.items():
            starts[name] = end
            end += -(-tensor.numel() * tensor.dtype.itemsize // ALIGNMENT) * ALIGNMENT
        pin = any(tensor.is_cuda for tensor in tensors.values())
        if self._block.numel() < end or (pin and not self._block.is_pinned()):
            self._block = torch.empty(0, dtype=torch.uint8)  # free the old one first
            self._block = torch.empty(end, dtype=torch.uint8, pin_memory=pin)
        placed = {}
        for name, tensor in tensors.items():
            stop = starts[name] + tensor.numel() * tensor.dtype.itemsize
            flat = self._block[starts[name] : stop].view(tensor.dtype)
            placed[name] = flat.view(tensor.shape)
        return placed


def _copy(sources: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> None:
    """Copy by name. On the host NumPy copies: it takes one core, and lets training have the lock;
    a tensor's own copy_ would start a second set of threads beside those that train."""
    for name, source in sources.items():
        target = targets[name]
        if source.device.type == "cpu" and source.dtype.itemsize in _ALIKE:
            np.copyto(_as_numpy(target), _as_numpy(source))
        else:
            target.copy_(source, non_blocking=source.is_cuda)


def _as_numpy(tensor: Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.generic]]:
    array: np.ndarray[tuple[int, ...], np.dtype[np.generic]]
    array = tensor.view(_ALIKE[tensor.dtype.itemsize]).numpy()
    return array


def _place(tensor: Tensor) -> tuple[torch.device, int]:
    return tensor.device, tensor.untyped_storage().data_ptr()
