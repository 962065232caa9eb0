"""The one place where names that torch does not document are used.

Seen working in torch 2.11 to 2.13. Each has a plain fallback or is checked by a test, so that a
torch that moves one of them fails here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, UntypedStorage
from torch._C._distributed_c10d import PrefixStore, ProcessGroupGloo, Store, TCPStore
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = [
    "DispatchMode",
    "PrefixStore",
    "Store",
    "TCPStore",
    "arguments_of",
    "assert_soon",
    "below_torch_functions",
    "clone_store",
    "fake_tensors",
    "foreach_copy",
    "foreach_lerp",
    "foreach_multiply",
    "gloo_group",
    "is_fake",
    "is_written",
    "memory_key",
    "memory_users",
    "nccl_group",
    "reduce_scatter",
    "past_subclasses",
    "shaped_like",
    "start_together",
    "storage_users",
]

DispatchMode = TorchDispatchMode
"""Hears, while in force, of every call below autograd that torch makes in this thread."""


def clone_store(store: Any) -> Store:
    """A connection of its own to the same store, so that one thread's wait holds up no other."""
    copy: Store = store.clone()
    return copy


def fake_tensors() -> AbstractContextManager[object]:
    """Within it calls of torch compute shapes and types, and no numbers."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def is_fake(tensor: Tensor) -> bool:
    """Whether a tensor has a shape and a type, and no numbers."""
    return isinstance(tensor, FakeTensor)


def shaped_like(kind: type[Tensor], shape: Sequence[int], like: Tensor) -> Any:
    """A tensor of a class of its own that has a shape, and what else `like` has, and no memory."""
    return Tensor._make_wrapper_subclass(kind, shape, dtype=like.dtype, device=like.device)


def past_subclasses() -> AbstractContextManager[object]:
    """Within it functions of torch do not ask classes of tensors what they are to do."""
    return torch._C.DisableTorchFunctionSubclass()


def below_torch_functions() -> AbstractContextManager[object]:
    """Within it they ask nobody, those who follow a model's calls neither."""
    return torch._C.DisableTorchFunction()


def is_written(function: Any, place: int) -> bool:
    """Whether a call of torch changes its argument at a place."""
    taken = function._schema.arguments
    return place < len(taken) and bool(taken[place].alias_info and taken[place].alias_info.is_write)


def arguments_of(function: Any, placed: Sequence[Any], named: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call of torch by name, with those that were left out."""
    found = {}
    for place, taken in enumerate(function._schema.arguments):
        if place < len(placed):
            found[taken.name] = placed[place]
        elif taken.name in named:
            found[taken.name] = named[taken.name]
        elif taken.has_default_value():
            found[taken.name] = taken.default_value
    return found


def assert_soon(condition: Tensor, message: str) -> None:
    """Fail if a tensor of one truth value is false, by the time that a GPU has come to it."""
    torch._assert_async(condition, message)


def foreach_copy(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy many tensors in one call: one trip through Python instead of one for each."""
    torch._foreach_copy_(list(targets), list(sources))


def gloo_group(
    store: Store, rank: int, size: int, timeout_s: float, address: str | None
) -> dist.ProcessGroup:
    """A gloo group that stands beside the default one.

    Args:
        address: of this host, by which peers find it; None is what its own name resolves to, which
            on many a Debian is an address that no other host reaches.
    """
    options: Any = vars(ProcessGroupGloo)["_Options"]()
    if address is not None:
        options._devices = [ProcessGroupGloo.create_device(hostname=address)]
    else:
        options._devices = [ProcessGroupGloo.create_default_device()]
    options._timeout = timedelta(seconds=timeout_s)
    group: Any = ProcessGroupGloo(store, rank, size, options)
    return group  # type: ignore[no-any-return]


def nccl_group(
    store: Store, rank: int, size: int, timeout_s: float, device: torch.device
) -> dist.ProcessGroup:
    """An NCCL group that stands beside the default one. All members must be there already.

    NCCL's own watchdog ends the process at its deadline without a word that says who is lost, so
    that comes long after `timeout_s`, at which whoever waits says it.
    """
    nccl: Any = vars(dist)["ProcessGroupNCCL"]  # only in builds with CUDA
    options = nccl.Options()
    options._timeout = timedelta(seconds=2 * timeout_s + 60)
    group: Any = nccl(store, rank, size, options)
    group.eager_connect_single_device(device)
    return group  # type: ignore[no-any-return]


def start_together(group: Any, starts: Sequence[Callable[[], object]]) -> Any:
    """Start some transfers of an NCCL group as one. One by one each would wait for the one before,
    and two peers that both send first would wait for each other for ever."""
    group._start_coalescing()
    for start in starts:
        start()
    return group._end_coalescing()


def reduce_scatter(group: Any, target: Tensor, parts: Tensor) -> Any:
    """Start to sum parts (n, ...) over the members of an NCCL group, each its own. Before torch
    2.13 the method had another name."""
    start = getattr(group, "reduce_scatter_single", None) or group._reduce_scatter_base
    return start(target, parts, dist.ReduceScatterOptions())


def foreach_lerp(targets: Sequence[Tensor], ends: Sequence[Tensor], share: float) -> None:
    """Move many tensors in place by a share of the way to others of their types, in one call."""
    torch._foreach_lerp_(list(targets), list(ends), share)


def foreach_multiply(tensors: Sequence[Tensor], factor: float) -> None:
    """Multiply many tensors in place by a number, in one call."""
    torch._foreach_mul_(list(tensors), factor)


def storage_users(tensor: Tensor) -> int:
    """How many tensors share a tensor's memory, itself and this look at it included."""
    return memory_users(tensor.untyped_storage())


def memory_users(memory: UntypedStorage) -> int:
    """How many tensors share some memory, this look at it included."""
    count: int = vars(torch._C)["_storage_Use_Count"](memory._cdata)
    return count


def memory_key(memory: UntypedStorage) -> int:
    """A number that no other memory has while this one is held."""
    key: int = memory._cdata
    return key
