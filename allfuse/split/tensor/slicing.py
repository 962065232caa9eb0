"""Cuts a model's layers into slices, as a plan says, and has them compute together."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from allfuse.split.hollow import hollow, is_hollow
from allfuse.split.record import argument_leaves, draws, map_arguments
from allfuse.split.tensor.cut import Size
from allfuse.split.tensor.late import put_off
from allfuse.split.tensor.search import TensorPlan, Use
from allfuse.split.tensor.traffic import Entrance, Slice, gather, leave

Function = Callable[..., Any]
Key = tuple[str, int]
"""The name of a function and the `id` of a weight."""


def slice_model(model: nn.Module, plan: TensorPlan, slice_: Slice) -> list[nn.Module]:
    """Keep one slice of a model, in place; what goes in and comes out stays the whole. The modules
    that are more than a program of their own now: those in which slices meet or draw.

    Parameters keep their names and identities and have the shapes of pieces. Parts of gradients are
    summed over the slices in the backward pass.
    """
    weights = dict(model.named_parameters(remove_duplicate=False))
    held = weights | dict(model.named_buffers())
    for name, cut in plan.cuts.items():
        tensor = held[name]
        if is_hollow(tensor):  # its numbers come later
            shape = cut.lie(tuple(tensor.shape), slice_.n, slice_.index).own
            tensor.data = hollow(shape, tensor.dtype, tensor.device)
            continue
        tensor.data = cut.piece(tensor.data, slice_.n, slice_.index).clone(
            memory_format=torch.contiguous_format
        )
    for name in sorted(plan.partial):
        weights[name].register_hook(_summing(slice_, name))
    handlers = _handlers(plan, weights, slice_)
    followed: list[nn.Module] = []
    changed: list[nn.Module] = []
    for name, module in model.named_modules():
        own = {id(p) for p in module.parameters(recurse=False)}
        mine = {key: handler for key, handler in handlers.items() if key[1] in own}
        care = Care(slice_, mine, plan.sizes.get(name, ()), plan.random.get(name, ()))
        if type(module) is nn.Linear and mine:
            module.forward = _linear(module, mine["linear", id(module.weight)])  # type: ignore[method-assign]
            changed.append(module)
        elif care.is_needed:
            module.forward = care.of(module)
            changed.append(module)
            followed.append(module)
    inside = {child for module in followed for child in module.modules()}
    for module in inside.difference(changed):
        module.forward = _shield(module)
    return changed


def _summing(slice_: Slice, name: str) -> Callable[[Tensor], Tensor]:
    return lambda gradient: slice_.sum(gradient, f"sum the gradient of {name}")


def _linear(module: nn.Linear, handler: Handler) -> Function:
    def forward(input: Tensor) -> Tensor:
        result: Tensor = handler(F.linear, (input, module.weight, module.bias), {})
        return result

    return forward


def _handlers(
    plan: TensorPlan, weights: dict[str, nn.Parameter], slice_: Slice
) -> dict[Key, Handler]:
    """What computes each cut map, by the name of its function and the `id` of its weight."""
    entrances = {
        name: entrance
        for columns, _ in plan.regions
        for entrance in [Entrance(slice_, _owner(columns[0]))]
        for name in columns
    }
    found: dict[Key, Handler] = {}
    for use in plan.uses.values():
        weight = use.map.weight
        entrance = entrances.get(weight) or Entrance(slice_, _owner(weight))
        key = use.map.call.name, id(weights[weight])
        found.setdefault(key, Handler(use, slice_, entrance))
    return found


def _owner(weight: str) -> str:
    return weight.rpartition(".")[0] or weight


class Handler:
    """Computes one map of which each rank has a slice."""

    def __init__(self, use: Use, slice_: Slice, entrance: Entrance) -> None:
        self.use, self.slice, self.entrance = use, slice_, entrance
        self.name = _owner(use.map.weight)

    def __call__(self, function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What `function(*args, **kwargs)` gives with the whole weight, or its channels here."""
        match self.use.way:
            case "columns":
                return self._columns(function, args, kwargs)
            case "gathered":
                return self._gather(self._columns(function, args, kwargs))
            case "late":
                piece = self._columns(function, args, kwargs)
                if not (torch.is_grad_enabled() and piece.requires_grad):
                    return self._gather(piece)  # one rank alone may look at predictions
                dim = self._y_dim(piece)
                return put_off(piece, self.slice, dim, self.use.cut.size, self.name)
            case "rows":
                return self._rows(function, args, kwargs)
            case _:
                return self._look_up(*args, **kwargs)

    def _gather(self, piece: Tensor) -> Tensor:
        return gather(piece, self.slice, self._y_dim(piece), self.use.cut.size, self.name)

    def _columns(self, function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        at = 1 if self.use.map.kind == "addmm" else 0
        if len(args) > at:
            args = (*args[:at], self.entrance.enter(args[at]), *args[at + 1 :])
        else:
            kwargs = {**kwargs, "input": self.entrance.enter(kwargs["input"])}
        result: Tensor = function(*args, **kwargs)
        return result

    def _rows(self, function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """The bias is added once, to the sum."""
        match self.use.map.kind:
            case "addmm":
                bias, x, weight = args
                mapped: Tensor = leave(x @ weight, self.slice, self.name) + bias
                return mapped
            case "matmul":
                return leave(function(*args, **kwargs), self.slice, self.name)
        bias = args[2] if len(args) > 2 else kwargs.pop("bias", None)
        args = (*args[:2], None, *args[3:])
        total = leave(function(*args, **kwargs), self.slice, self.name)
        if bias is None:
            return total
        result: Tensor = total + bias.view(-1, *(1,) * self.use.map.spatial)
        return result

    def _y_dim(self, result: Tensor) -> int:
        return result.dim() - 1 - self.use.map.spatial

    def _look_up(
        self, input: Tensor, weight: Tensor, padding_idx: int | None = None, *_: Any, **__: Any
    ) -> Tensor:
        ((first, end),) = self.use.cut.runs(self.slice.n, self.slice.index)
        index = input - first
        here = (index >= 0) & (input < end)
        padding = None
        if padding_idx is not None:
            padding_idx %= self.use.cut.size
            padding = padding_idx - first if first <= padding_idx < end else None
        found = F.embedding(index.masked_fill(~here, 0), weight, padding)
        return leave(found * here.unsqueeze(-1), self.slice, self.name)


# Modules that are more than one map.


class Following(TorchFunctionMode):
    """Takes care of the calls that one module makes itself in one pass: its maps, arguments that
    say how large a tensor is, and random numbers that are to differ from slice to slice."""

    def __init__(self, care: Care) -> None:
        super().__init__()
        self.care = care
        self._drawn = 0

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        named = kwargs or {}
        name = getattr(function, "__name__", "")
        if _running()[-1] is not self:
            return function(*args, **named)
        if name in self.care.sizes:
            args, named = self._smaller(name, args, named)
        if name in self.care.names:
            for leaf in (*args[:3], *named.values()):
                weight = getattr(leaf, "gathered_from", leaf)  # under shard(n)
                handler = self.care.handlers.get((name, id(weight)))
                if handler is not None:
                    return handler(function, args, dict(named))
        if self.care.draws and draws(function):
            within = self.care.draws[self._drawn % len(self.care.draws)]
            self._drawn += 1
            if within and _does_draw(name, args, named):
                with drawing_apart(self.care.slice, args[0]):
                    return function(*args, **named)
        return function(*args, **named)

    def _smaller(self, name: str, args: Any, named: Any) -> tuple[Any, dict[str, Any]]:
        """Arguments with sizes of the whole replaced by those of a slice."""
        given, here = argument_leaves((tuple(args), dict(named))), self.care.slice
        flat = list(given)
        for place, size in self.care.sizes[name]:
            if place < len(given) and type(given[place]) is int and given[place] == size.whole:
                flat[place] = size.of(here.n, here.index)
        rest = iter(flat)
        changed: tuple[Any, dict[str, Any]] = map_arguments(
            lambda _: next(rest), (tuple(args), dict(named))
        )
        return changed


class Care:
    """What is to be done about the calls of one module."""

    def __init__(
        self,
        slice_: Slice,
        handlers: dict[Key, Handler],
        sizes: Iterable[tuple[str, int, Size]],
        draws: Sequence[bool],
    ) -> None:
        self.slice, self.handlers, self.draws = slice_, handlers, draws
        self.names = {name for name, _ in handlers}
        self.sizes: dict[str, list[tuple[int, Size]]] = {}
        for name, place, size in sizes:
            self.sizes.setdefault(name, []).append((place, size))

    @property
    def is_needed(self) -> bool:
        return bool(self.handlers or self.sizes or self.draws)

    def of(self, module: nn.Module) -> Function:
        """The forward of a module, with its own calls taken care of."""
        inner = module.forward

        @functools.wraps(inner)
        def forward(*args: Any, **kwargs: Any) -> Any:
            mode = Following(self)
            with mode, _entered(mode):
                return inner(*args, **kwargs)

        return forward


_local = threading.local()


def _running() -> list[Following | None]:
    """Whose calls are made now, innermost last; None for a module that nothing is changed in."""
    if not hasattr(_local, "running"):
        _local.running = [None]
    running: list[Following | None] = _local.running
    return running


def _shield(module: nn.Module) -> Function:
    """The forward of a module, kept from those who follow the calls of its parent."""
    inner = module.forward

    @functools.wraps(inner)
    def forward(*args: Any, **kwargs: Any) -> Any:
        with _entered(None):
            return inner(*args, **kwargs)

    return forward


@contextmanager
def _entered(mode: Following | None) -> Iterator[None]:
    running = _running()
    running.append(mode)
    try:
        yield
    finally:
        running.pop()


def _does_draw(name: str, args: Any, named: Any) -> bool:
    """Whether a call draws anything: dropout may be switched off."""
    if name.startswith("scaled"):
        return bool(args[4] if len(args) > 4 else named.get("dropout_p", 0.0))
    if "dropout" in name:
        chance = args[1] if len(args) > 1 else named.get("p", 0.5)
        return bool(chance) and bool(args[2] if len(args) > 2 else named.get("training", True))
    return True


@contextmanager
def drawing_apart(slice_: Slice, like: Tensor) -> Iterator[None]:
    """Draw other random numbers than the other slices, and leave the generators as they do."""
    seed = int(torch.randint(2**62, (), dtype=torch.int64))
    devices = [like.device.index] if like.device.type == "cuda" else []
    with torch.random.fork_rng(devices, device_type="cuda"):
        torch.manual_seed(seed + 1 + slice_.index)
        yield
