"""How ranks come to equal weights and repeatable randomness."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from allfuse.base.errors import JobError
from allfuse.base.keys import mix
from allfuse.base.tensors import split_buckets
from allfuse.split.data.generators import seed_generators

if TYPE_CHECKING:
    from allfuse.link import Link

SPREAD_BYTES = 25_000_000  # that travel as one

_building = threading.Lock()  # torch's generators belong to the process; ranks may be threads


def seed_all(device: torch.device, *key: int) -> None:
    """Seed torch (this device's generator too), NumPy and Python from a key. Cost: 9 µs.

    torch.manual_seed takes hundreds of µs where there are devices that nobody has used yet.
    """
    seed = mix(*key)
    seed_generators(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def build_model(build: Callable[[], nn.Module] | nn.Module, seed: int) -> nn.Module:
    """A module from a function, with the numbers that a plain seed gives; a module as it is."""
    if isinstance(build, nn.Module):
        return build
    if not callable(build):
        raise JobError(
            f"the model is a {type(build).__name__}; allowed: a torch module, or a function that "
            "builds one"
        )
    with seeded(seed):
        made = build()
    return require_module(made)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """The process's generator of torch alone, seeded, for building a model."""
    with _building:
        torch.manual_seed(seed)
        yield


def require_module(made: object) -> nn.Module:
    """What a model function has built. Raises JobError if it is no module."""
    if not isinstance(made, nn.Module):
        raise JobError(
            f"the model function returned {type(made).__name__}; allowed: a torch module"
        )
    return made


@torch.no_grad()
def spread(tensors: Iterable[Tensor], link: Link) -> None:
    """Give every peer the tensors of the link's first rank, in place, those of a type together.

    Takes memory for `SPREAD_BYTES`, or for the largest tensor.
    """
    if link.size == 1:
        return
    kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    for (dtype, _), several in kinds.items():
        sizes = [tensor.nbytes for tensor in several]
        for places in split_buckets(sizes, SPREAD_BYTES, SPREAD_BYTES):
            group = [several[place] for place in places]
            flat = torch.cat([tensor.detach().reshape(-1) for tensor in group])
            as_bytes = flat.view(torch.uint8) if dtype == torch.bool else flat
            link.broadcast(as_bytes, "spread the first weights").wait()
            for tensor, piece in zip(group, flat.split([t.numel() for t in group]), strict=True):
                tensor.detach().copy_(piece.view_as(tensor))


@torch.no_grad()
def take_over(held: Mapping[int, Tensor], told: Mapping[int, Tensor]) -> None:
    """Take tensors that another rank has handed over, in place."""
    for key, tensor in held.items():
        tensor.detach().copy_(told[key])


def refuse_lazy(module: nn.Module) -> None:
    for name, parameter in (*module.named_parameters(), *module.named_buffers()):
        if is_lazy(parameter):
            raise JobError(
                f"the model's {name} has no shape before a first batch (a lazy module); allowed: "
                "modules of known sizes; next: give the sizes, or run one batch while building it"
            )


def shape_of(module: nn.Module) -> str:
    """Names, shapes and types of all parameters and buffers, as text."""
    held = (*module.named_parameters(), *module.named_buffers())
    return " ".join(f"{name}{tuple(value.shape)}{value.dtype}" for name, value in held)
