"""One stage of a model: the model's own forward pass, of which only a part is computed.

A stage runs the model's code as it is. Modules that an earlier stage has computed give tensors of
the right shapes and no contents; the first module of the stage takes what came from there; before
the first module of the next stage the pass ends. So no model is rewritten or traced.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from allfuse.base.tensors import map_nest
from allfuse.split.pipe.boundary import Boundary, Skip, StagePlan, passes_before
from allfuse.split.pipe.sizes import Sizes
from allfuse.split.record import Recording, Ref, tensors_in


class _Passed(BaseException):
    """The pass has come to the next stage. No `Exception`, so that a model's code lets it by."""

    def __init__(self, value: Tensor) -> None:
        self.value = value


class Stage:
    """Computes one stage of a model, which may have several: each changes what modules do while it
    runs, and nothing at other times.

    Args:
        model: the whole, whose modules are changed in place.

    Attributes:
        began_s: when the last pass came to what the stage computes, by `time.perf_counter`.
    """

    def __init__(
        self, model: nn.Module, plan: StagePlan, recording: Recording, device: torch.device
    ) -> None:
        self.plan, self.device = plan, device
        self.active, self.began_s = False, 0.0
        self.changes = False  # what it takes, in place
        self._received: Tensor | None = None
        self._sizes: Sizes | None = None
        self._counts: Counter[str] = Counter()  # passes through each module so far
        modules = dict(model.named_modules())
        skips: dict[str, dict[int, Skip]] = defaultdict(dict)
        if plan.first is not None:
            for skip in passes_before(recording, plan.first):
                skips[skip.visit.module][skip.number] = skip
            self.changes = _changes(recording, plan.first.value)
        ends = {each.module for each in (plan.first, plan.last) if each is not None}
        self._handles: list[Any] = []
        self._skipped: list[tuple[nn.Module, Any]] = []  # modules, with their own forward if any
        for name in {**skips, **dict.fromkeys(sorted(ends))}:
            handle = modules[name].register_forward_pre_hook(self._at(name), with_kwargs=True)
            self._handles.append(handle)
        for name, found in skips.items():
            module = modules[name]
            self._skipped.append((module, vars(module).get("forward")))
            module.forward = self._skipping(module, name, found)

    def close(self) -> None:
        """Leave the modules as they were. What was put on them since must be off again."""
        for handle in self._handles:
            handle.remove()
        for module, forward in reversed(self._skipped):
            if forward is None:
                del module.forward
            else:
                module.forward = forward

    def run(self, received: Tensor | None, sizes: Sizes, compute: Callable[[], Any]) -> Any:
        """One pass over a microbatch.

        Args:
            received: what the stage before has sent; None in the first.
            sizes: of what the pass computes.
            compute: the whole pass, as the job has it.

        Returns: what goes to the next stage, or what `compute` returns in the last.
        """
        if received is not None and self.changes:
            received = received.clone()  # autograd lets nobody change what it begins with
        self._received, self._sizes, self.active = received, sizes, True
        self._counts.clear()
        self.began_s = time.perf_counter()
        try:
            return compute()
        except _Passed as passed:
            return passed.value
        finally:
            self._received, self._sizes, self.active = None, None, False

    def _at(self, name: str) -> Callable[..., Any]:
        """What is done when a module begins a pass."""
        first, last = self.plan.first, self.plan.last

        def begin(_: nn.Module, args: Any, kwargs: Any) -> Any:
            if not self.active:
                return None
            number = self._counts[name]
            self._counts[name] += 1
            if last is not None and (name, number) == (last.module, last.visit):
                raise _Passed(list(tensors_in((args, kwargs)))[last.argument])
            if first is not None and (name, number) == (first.module, first.visit):
                return self._put_received(first, args, kwargs)
            return None

        return begin

    def _put_received(self, first: Boundary, args: Any, kwargs: Any) -> Any:
        """The arguments with what was received in its place."""
        self.began_s = time.perf_counter()
        place = itertools.count()

        def put(leaf: Any) -> Any:
            here = isinstance(leaf, Tensor) and next(place) == first.argument
            return self._received if here else leaf

        return map_nest(put, (args, kwargs))

    def _skipping(
        self, module: nn.Module, name: str, found: Mapping[int, Skip]
    ) -> Callable[..., Any]:
        inner = module.forward

        @functools.wraps(inner)
        def forward(*args: Any, **kwargs: Any) -> Any:
            skip = found.get(self._counts[name] - 1) if self.active else None
            if skip is None:
                return inner(*args, **kwargs)
            self._counts.update(skip.within)
            assert self._sizes is not None
            return self._sizes.hollow(name, skip.number, self.device)

        return forward


def _changes(recording: Recording, value: int) -> bool:
    """Whether a value is changed by a call that takes it."""
    firsts = (call.arguments[0][:1] for call in recording.calls if call.in_place)
    return (Ref(value),) in firsts
