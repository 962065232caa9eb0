"""A model is built without memory for it: numbers are given up once they are drawn, and come back
when somebody looks at them.

What builds the model runs as it is, every call of torch with real numbers. Each call that writes to
large memory is noted, with the state of the generator that it draws from. When more memory is in
use than a window, that which was used least lately is emptied; a call that takes a tensor in it has
its writes done again first. So initializations may look at numbers (`trunc_normal_`), depend on
each other (`orthogonal_`, copies of layers), or be done twice, and a parameter can be had at any
time by itself, with the bits that a plain seed gives. Costs drawing once more for what is kept.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, UntypedStorage, nn
from torch.overrides import TorchFunctionMode

from allfuse.base.heap import Returns
from allfuse.base.tensors import tensor_bytes
from allfuse.base.torch_private import DispatchMode, memory_key, memory_users
from allfuse.split.draws import Draw
from allfuse.split.history import History, Seen, View, Write, copied
from allfuse.split.pending import Pending
from allfuse.split.record import argument_leaves, map_arguments

LARGE_BYTES = 1 << 16
"""Memory from here on is given up; smaller things stay as they are."""
WINDOW_BYTES = 1 << 25
"""Large memory that is kept while a model is built, beside what a call needs."""

LOOKING = frozenset(
    [
        "numpy",
        "tolist",
        "data_ptr",
        "untyped_storage",
        "storage",
        "_typed_storage",
        "share_memory_",
        "pin_memory",
        "__array__",
        "__dlpack__",
        "__deepcopy__",
        "__reduce_ex__",
        "__repr__",
        "__str__",
        "__format__",
    ]
)
"""Functions that reach for the memory of a tensor itself: it stays from then on."""
REPLACING = frozenset({"set_", "resize_", "resize_as_"})
"""Calls after which a tensor may lie in other memory: it stays, too."""
ALIKE = frozenset({"detach", "alias", "view"})
"""Views that do not look at how much memory there is."""

UNUSED = memory_users(torch.empty(0).untyped_storage())
"""How many share memory that no tensor has any more, but who looks at it."""


def build_without_memory(build: Callable[[], Any]) -> tuple[Any, Pending | None]:
    """What a function builds, with parameters that have no numbers yet, and who has them.

    None where it builds no module.
    """
    builder = Builder()
    try:
        with _Looking(builder), builder:
            made = build()
    except BaseException:
        builder.abandon()
        raise
    if not isinstance(made, nn.Module):
        builder.bring_all_back()
        return made, None
    return made, builder.finish(made)


class _Looking(TorchFunctionMode):
    """Hears of functions that no call of torch is made for."""

    def __init__(self, builder: Builder) -> None:
        super().__init__()
        self._builder = builder

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        named = kwargs or {}
        looks = getattr(function, "__name__", "") in LOOKING
        if looks and not self._builder.is_working:
            for leaf in argument_leaves((tuple(args), named)):
                if isinstance(leaf, Tensor):
                    self._builder.keep(leaf)
        return function(*args, **named)


class Builder(DispatchMode):
    """Notes the calls that write to large memory, and empties that which is not used."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.digest = 0  # of all that was noted: equal where all came to equal numbers
        self.is_working = False  # then calls are its own
        self._histories: dict[int, History] = {}
        self._here: dict[History, None] = {}  # those with numbers, last used last
        self._calls, self._returns = 0, Returns()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        named = dict(kwargs or {})
        if self.is_working or function.overloadpacket.__name__ in ALIKE:
            return function(*args, **named)
        with self._working():
            return self._call(function, tuple(args), named)

    @contextmanager
    def _working(self) -> Iterator[None]:
        before, self.is_working = self.is_working, True
        try:
            yield
        finally:
            self.is_working = before

    def _call(self, function: Any, placed: tuple[Any, ...], named: dict[str, Any]) -> Any:
        taken = [leaf for leaf in argument_leaves((placed, named)) if isinstance(leaf, Tensor)]
        if function.overloadpacket.__name__ in REPLACING:
            for tensor in taken:
                self.keep(tensor)
            return function(*placed, **named)
        busy = [history for tensor in taken if (history := self._of(tensor)) is not None]
        for history in busy:
            self._use(history)
        write = None if function.is_view else self._prepare(function, placed, named, taken)
        result = function(*placed, **named)
        if write is None:
            self._lose_track(function, placed, named)
        else:
            busy += self._note(write, (placed, named), taken, result)
        self._empty_others(busy)
        return result

    # What calls take and give.

    def _of(self, tensor: Tensor) -> History | None:
        memory = _memory_of(tensor)
        return None if memory is None else self._histories.get(memory_key(memory))

    def _prepare(
        self, function: Any, placed: tuple[Any, ...], named: dict[str, Any], taken: list[Tensor]
    ) -> Write | None:
        """A call that is about to be made; None if it takes large memory that nobody knows the
        history of."""
        if any(self._of(x) is None and _is_large(x) for x in taken):
            return None

        def see(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            history = self._of(leaf)
            return copied(leaf) if history is None else Seen(history, View.of(leaf))

        device = named.get("device") or next((x.device for x in taken), None)
        draw = Draw.before(function, named, None if device is None else torch.device(device))
        own = {key: value for key, value in named.items() if key != "generator"}
        return Write(self._calls, function, map_arguments(see, (placed, own)), draw)

    def _note(
        self,
        write: Write,
        arguments: tuple[tuple[Any, ...], dict[str, Any]],
        taken: list[Tensor],
        result: Any,
    ) -> list[History]:
        """Note what a call has written to; the memory that it has made."""
        changed = [self._of(tensor) for tensor in _changed(write.function, *arguments)]
        write.changed = tuple(dict.fromkeys(each for each in changed if each is not None))
        old = {memory_key(memory) for x in taken if (memory := _memory_of(x)) is not None}
        made, places = [], {}
        given = [leaf for leaf in argument_leaves(result) if isinstance(leaf, Tensor)]
        for place, tensor in enumerate(given):
            memory = _memory_of(tensor)
            if memory is None or not _is_large(tensor) or memory_key(memory) in old:
                continue
            history = History(len(self._histories), memory.nbytes(), memory)
            self._histories[memory_key(memory)] = history
            places[id(history)] = place
            made.append(history)
            old.add(memory_key(memory))
        write.made = places
        for history in (*write.changed, *made):
            history.writes.append(write)
            self._here[history] = None
        if made or write.changed:
            self._calls += 1
            self._digest(write)
        return made

    def _digest(self, write: Write) -> None:
        def describe(leaf: Any) -> Any:
            if isinstance(leaf, Seen):
                return f"{leaf.history.number} {leaf.view}"
            if isinstance(leaf, Tensor):
                return f"{View.of(leaf)} {_checksum(leaf.untyped_storage())}"
            return repr(leaf)

        told = [str(write.function), repr(map_arguments(describe, write.arguments))]
        if write.draw is not None:
            told.append(str(_checksum(write.draw.state.untyped_storage())))
        self.digest = zlib.crc32(" ".join(told).encode(), self.digest)

    # Memory that is emptied, and comes back.

    def _use(self, history: History) -> None:
        """Have the numbers of some memory, which was used last from now on."""
        self._here.pop(history, None)
        self._here[history] = None
        if not history.is_here:
            history.refill()

    def _empty_others(self, busy: list[History]) -> None:
        """Keep no more than the window, but what was just used."""
        others = [history for history in self._here if history not in busy]
        for history in others:
            if not self._users(history):
                self._empty(history)
        total = sum(history.nbytes for history in self._here)
        for history in others:
            if total <= WINDOW_BYTES:
                return
            if history in self._here:
                self._empty(history)
                total -= history.nbytes

    def _users(self, history: History) -> int:
        """How many tensors lie in some memory."""
        assert history.memory is not None
        return memory_users(history.memory) - UNUSED

    def _empty(self, history: History) -> None:
        assert history.memory is not None
        history.memory.resize_(0)
        self._returns.freed(history.nbytes)
        self._here.pop(history, None)

    def keep(self, tensor: Tensor) -> None:
        """Have the numbers of a tensor stay in memory, whatever becomes of them."""
        with self._working():
            history = self._of(tensor)
            if history is not None:
                self._use(history)
                self._release(history)

    def _release(self, history: History) -> None:
        """What is in some memory is not this one's any more."""
        assert history.memory is not None
        del self._histories[memory_key(history.memory)]
        self._here.pop(history, None)
        history.memory = None

    def _lose_track(self, function: Any, placed: tuple[Any, ...], named: dict[str, Any]) -> None:
        """What was changed by something unknown stays in memory."""
        for tensor in _changed(function, placed, named):
            self.keep(tensor)

    def bring_all_back(self) -> None:
        for history in list(self._histories.values()):
            if self._users(history):
                self._use(history)
            self._release(history)

    def abandon(self) -> None:
        """Have memory in all places, for who looks at what has failed."""
        for history in self._histories.values():
            if history.memory is not None and self._users(history):
                history.memory.resize_(history.nbytes)

    def finish(self, model: nn.Module) -> Pending:
        """Take the numbers from the parameters of a model that can come by them again; whatever
        else has none gets them back."""
        found: dict[nn.Parameter, tuple[History, View]] = {}
        for parameter in model.parameters():
            history = self._of(parameter)
            if history is not None and parameter.is_leaf and self._users(history) == 1:
                found[parameter] = history, View.of(parameter)
        for history, _ in found.values():
            self._empty(history)
            self._release(history)
        self.bring_all_back()
        return Pending(
            model, {p: _remake(history, view) for p, (history, view) in found.items()}, self.digest
        )


def _remake(history: History, view: View) -> Callable[[], Tensor]:
    return lambda: view.on(history.again())


def _memory_of(tensor: Tensor) -> UntypedStorage | None:
    """What a plain tensor lies in; None of other kinds of tensors."""
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided:
        return None
    return None if tensor.is_meta or tensor.is_quantized else tensor.untyped_storage()


def _is_large(tensor: Tensor) -> bool:
    memory = _memory_of(tensor)
    return memory is None or (memory.nbytes() >= LARGE_BYTES and tensor.nbytes >= LARGE_BYTES)


def _checksum(memory: UntypedStorage) -> int:
    as_bytes = View(torch.uint8, (memory.nbytes(),), (1,), 0).on(memory)
    return zlib.crc32(tensor_bytes(as_bytes.cpu()))


def _changed(function: Any, placed: tuple[Any, ...], named: dict[str, Any]) -> list[Tensor]:
    """The tensors that a call changes, by what torch declares of it."""
    found = []
    for at, argument in enumerate(function._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = placed[at] if at < len(placed) else named.get(argument.name)
            found += [leaf for leaf in argument_leaves((value,)) if isinstance(leaf, Tensor)]
    return found
