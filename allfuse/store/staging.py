"""Copies of live tensors, in memory that is allocated once and used again.

Fresh memory costs a page fault for every 4 kB that is written to it, several times the copy itself.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor

from allfuse.store.tensorfile import ALIKE

Array = np.ndarray[tuple[int, ...], np.dtype[np.generic]]
ALIGNMENT = 64


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
        self._now.copy(early)
        devices = dict.fromkeys(tensor.device for tensor in tensors.values() if tensor.is_cuda)
        self._ready = {d: torch.cuda.current_stream(d).record_event() for d in devices}

    def copy(self) -> None:
        """Copy the rest; on CUDA, give the copies to the device."""
        staged = self._later.place(self._live)
        on_host = {n: t for n, t in self._live.items() if not t.is_cuda}
        for device, ready in self._ready.items():
            stream = torch.cuda.Stream(device)
            stream.wait_event(ready)
            with torch.cuda.stream(stream):
                self._later.copy({n: t for n, t in self._live.items() if t.device == device})
                self._copied[device] = stream.record_event()
        self._later.copy(on_host)
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
    """One block of host memory, pinned when tensors come from CUDA, that only ever grows.

    The views into it are kept for the next set of tensors of the same types and shapes.
    """

    def __init__(self) -> None:
        self._block = torch.empty(0, dtype=torch.uint8)
        self._layout: list[tuple[str, torch.dtype, torch.Size]] = []
        self._placed: dict[str, Tensor] = {}
        self._arrays: dict[str, Array] = {}

    def place(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A contiguous tensor for each of the given ones, of its type and shape."""
        layout = [(name, tensor.dtype, tensor.shape) for name, tensor in tensors.items()]
        pin = any(tensor.is_cuda for tensor in tensors.values())
        if layout != self._layout or (pin and not self._block.is_pinned()):
            self._lay_out(layout, pin)
        return dict(self._placed)

    def copy(self, sources: Mapping[str, Tensor]) -> None:
        """Copy to the places of the same names.

        On the host NumPy copies: it takes one core and lets go of the interpreter lock; a tensor's
        own copy_ would start a second set of threads beside those that train.
        """
        for name, source in sources.items():
            if source.device.type == "cpu" and source.dtype.itemsize in ALIKE:
                np.copyto(self._arrays[name], _as_numpy(source))
            else:
                self._placed[name].copy_(source, non_blocking=source.is_cuda)

    def _lay_out(self, layout: list[tuple[str, torch.dtype, torch.Size]], pin: bool) -> None:
        sizes = [shape.numel() * dtype.itemsize for _, dtype, shape in layout]
        starts = [0, *itertools.accumulate(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)]
        self._placed, self._arrays, self._layout = {}, {}, []
        if self._block.numel() < starts[-1] or (pin and not self._block.is_pinned()):
            self._block = torch.empty(0, dtype=torch.uint8)  # free the old one first
            self._block = torch.empty(starts[-1], dtype=torch.uint8, pin_memory=pin)
        for (name, dtype, shape), start, size in zip(layout, starts, sizes, strict=False):
            place = self._block[start : start + size].view(dtype).view(shape)
            self._placed[name] = place
            if dtype.itemsize in ALIKE:
                self._arrays[name] = _as_numpy(place)
        self._layout = layout


def _as_numpy(tensor: Tensor) -> Array:
    array: Array = tensor.view(ALIKE[tensor.dtype.itemsize]).numpy()
    return array


def _place(tensor: Tensor) -> tuple[torch.device, int]:
    return tensor.device, tensor.untyped_storage().data_ptr()
