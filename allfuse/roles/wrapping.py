"""A state on its way from a worker to the scheduler, in pieces."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from allfuse.base.tensors import tensor_bytes
from allfuse.link.post import Malformed
from allfuse.roles.cutting import PIECE_BYTES
from allfuse.roles.messages import Save
from allfuse.store.tensorfile import NAMES

BACK = {name: dtype for dtype, name in NAMES.items()}


def wrap(
    skeleton: Any,
    tensors: Mapping[str, Tensor],
    *,
    sequence: int,
    done: int,
    score: float | None,
) -> list[Save]:
    """A state as `store.tree.pack` gives it, in messages; what they say of it is in each."""
    plain = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    layout = [[name, NAMES[t.dtype], list(t.shape)] for name, t in plain.items()]
    values = [
        torch.frombuffer(tensor_bytes(t), dtype=torch.uint8) for t in plain.values() if t.numel()
    ]
    flat = torch.cat(values) if values else torch.empty(0, dtype=torch.uint8)
    content = json.dumps({"skeleton": skeleton, "layout": layout})
    pieces = flat.split(PIECE_BYTES) if flat.numel() else (flat,)
    return [
        Save(
            sequence=sequence,
            done=done,
            score=score,
            piece=number,
            pieces=len(pieces),
            content=content if number == 0 else "",
            tensors=(piece,),
        )
        for number, piece in enumerate(pieces)
    ]


def split_parts(messages: Sequence[Save]) -> list[list[Save]]:
    """What several ranks have handed in as one, each by itself: the first message of each says what
    it is."""
    parts: list[list[Save]] = []
    for message in messages:
        if message.content or not parts:
            parts.append([])
        parts[-1].append(message)
    return parts


def unwrap(messages: Sequence[Save]) -> tuple[Any, dict[str, Tensor]]:
    """What `wrap` was given, of all its messages in their order.

    Raises:
        Malformed: it is something else.
    """
    try:
        content = json.loads(messages[0].content)
        flat = torch.cat([tensor for message in messages for tensor in message.tensors])
        if flat.dtype != torch.uint8:
            raise ValueError(f"tensors of {flat.dtype}")
        tensors: dict[str, Tensor] = {}
        at = 0
        for name, kind, shape in content["layout"]:
            dtype = BACK[kind]
            size = prod(shape) * dtype.itemsize
            part = flat[at : at + size].clone()
            tensors[str(name)] = part.view(dtype).reshape(shape)
            at += size
        if at != flat.numel():
            raise ValueError(f"{flat.numel() - at} bytes too many")
        return content["skeleton"], tensors
    except (KeyError, TypeError, ValueError, IndexError, RuntimeError) as error:
        raise Malformed(f"a state that cannot be: {error!r}") from error
