"""A state that one rank hands to its peers, over a link."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from allfuse.link import Link
from allfuse.store.tree import pack, unpack

TYPES = {
    str(each).removeprefix("torch."): each
    for each in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    )
}


@torch.no_grad()
def hand_over(link: Link, root: int, state: Any, device: torch.device) -> Any:
    """The root's nest of tensors and plain values, on every peer; tensors are on the device.

    Phases, each a broadcast: 8 bytes of size, a header in JSON, then each tensor as it is.

    Raises:
        PeerLost: a peer did not come.
    """
    if link.size == 1:
        return state
    operation, header = "hand over a state", b""
    tensors: dict[str, Tensor] = {}
    if link.rank == root:
        skeleton, tensors = pack(state)
        kinds = [
            [name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]
            for name, tensor in tensors.items()
        ]
        header = json.dumps([skeleton, kinds]).encode()
    size = torch.tensor([len(header)], dtype=torch.int64, device=device)
    link.broadcast(size, operation, root).wait()
    told = torch.zeros(int(size), dtype=torch.uint8)
    if link.rank == root:
        told = torch.frombuffer(bytearray(header), dtype=torch.uint8)
    told = told.to(device)
    link.broadcast(told, operation, root).wait()
    skeleton, kinds = json.loads(bytes(told.tolist()))
    received: dict[str, Tensor] = {}
    for name, kind, shape in kinds:
        if link.rank == root:
            tensor = tensors[name].detach().to(device).contiguous()
        else:
            tensor = torch.empty(shape, dtype=TYPES[kind], device=device)
        link.broadcast(tensor, operation, root).wait()
        received[name] = tensor
    return unpack(skeleton, received)
