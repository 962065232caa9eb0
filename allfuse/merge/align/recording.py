"""Records the calls of operators of one pass through a model, below autograd."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from allfuse.base.errors import MergeError
from allfuse.base.tensors import leaves
from allfuse.base.torch_private import DispatchMode, arguments_of, memory_key
from allfuse.merge.align.operators import name_of

Forward = Callable[[nn.Module, Any], Any]


class Recorded:
    """One call of an operator.

    Attributes:
        function: the operator. arguments: by name. taken, results: the tensors of both, which are
            held, so that no other gets the id of one.
        given, shapes: the shapes that those taken had before, and the results after it.
        place: its name and the module's.
        in_place: those that it writes to, of which others may share the memory.
    """

    def __init__(self, function: Any, arguments: dict[str, Any], module: str) -> None:
        self.function, self.arguments = function, arguments
        self.name, self.is_view = name_of(function), bool(function.is_view)
        self.place = f"{self.name} in {module or 'the model'}"
        self.taken = _tensors(list(arguments.values()))
        self.given = [tuple(tensor.shape) for tensor in self.taken]
        self.results: list[Tensor] = []
        self.shapes: list[tuple[int, ...]] = []
        self.in_place: list[Tensor] = []

    def end(self, result: Any) -> None:
        """What it gave is there."""
        self.results = _tensors(result)
        self.shapes = [tuple(tensor.shape) for tensor in self.results]
        held = {id(tensor) for tensor in self.taken}
        self.in_place = [tensor for tensor in self.results if id(tensor) in held]

    @property
    def looked_at(self) -> list[Tensor]:
        """Those on whose numbers it depends what it gives to Python, or its shape."""
        if self.name == "index":
            chosen = _tensors(self.arguments["indices"])
            return [each for each in chosen if each.dtype in (torch.bool, torch.uint8)]
        depending = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
        return self.taken if any(tag in self.function.tags for tag in depending) else []


def _tensors(nest: Any) -> list[Tensor]:
    return [each for each in leaves(nest) if isinstance(each, Tensor)]


def memory_of(tensor: Tensor) -> int:
    """A number that no tensor with other memory has."""
    return memory_key(tensor.untyped_storage())


class Recorder(DispatchMode):
    """Attributes: calls, in order; modules: those that are at work, the innermost last."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[Recorded] = []
        self.modules: list[str] = [""]

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        call = Recorded(function, arguments_of(function, args, kwargs or {}), self.modules[-1])
        result = function(*args, **(kwargs or {}))
        call.end(result)
        self.calls.append(call)
        return result


@contextmanager
def plain_kernels() -> Iterator[None]:
    """Within it modules call the operators that they are made of, and no kernel that does all at
    once: attention, recurrent layers and transformer layers have such."""
    mkldnn: Any = torch.backends.mkldnn
    before = torch.backends.mha.get_fastpath_enabled(), mkldnn.enabled
    torch.backends.mha.set_fastpath_enabled(False)
    mkldnn.enabled = False
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before[0])
        mkldnn.enabled = before[1]


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Within it a module is in evaluation mode, without gradients, with plain kernels."""
    modes = {each: each.training for each in module.modules()}
    try:
        with torch.no_grad(), plain_kernels():
            module.eval()
            yield
    finally:
        for each, mode in modes.items():
            each.training = mode


def state_of(module: nn.Module) -> dict[str, Tensor]:
    """The tensors of a module that its file holds, by name; tied ones under each name."""
    kept = module.state_dict().keys()
    own: dict[str, Tensor] = {}
    own.update(module.named_parameters(remove_duplicate=False))
    own.update(module.named_buffers(remove_duplicate=False))
    return {name: own[name] for name in kept if name in own}


def record(module: nn.Module, batch: Any, forward: Forward) -> tuple[list[Recorded], list[Tensor]]:
    """The calls of one pass through a module, and its outputs.

    Raises:
        MergeError: the pass failed.
    """
    recorder = Recorder()
    with ExitStack() as stack:
        for name, each in module.named_modules():
            before = each.register_forward_pre_hook(
                lambda owner, given, name=name: recorder.modules.append(name)
            )
            after = each.register_forward_hook(
                lambda owner, given, made: _drop(recorder.modules), always_call=True
            )
            stack.callback(before.remove)
            stack.callback(after.remove)
        stack.enter_context(evaluating(module))
        try:
            with recorder:
                outputs = forward(module, batch)
        except Exception as error:
            raise MergeError(
                f"the pass through the model, which shows its units, failed: "
                f"{type(error).__name__}: {error}"
            ) from error
    return recorder.calls, _tensors(outputs)


def _drop(names: list[str]) -> None:
    names.pop()
