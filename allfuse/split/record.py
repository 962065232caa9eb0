"""What a model does with tensors: its forward pass as a list of calls, by shapes alone."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from allfuse.base.errors import UserError
from allfuse.base.tensors import leaves, map_nest
from allfuse.base.torch_private import fake_tensors, is_fake

OF_MODULES = frozenset(vars(nn.Module()))
"""Attributes that every module has: what it holds, and its hooks."""

RANDOM = ("dropout", "bernoulli", "rand", "scaled_dot_product_attention", "multinomial", "normal")
"""How the names of functions begin that draw at random."""


LOOKS_AT_MASK = (nn.TransformerEncoder, nn.TransformerDecoder)
"""Modules of torch that ask whether their mask is a causal one, to compute the same faster."""


@dataclass(frozen=True)
class Ref:
    """A value of a recording, by its number, in the place of the tensor."""

    number: int


@dataclass(frozen=True)
class Call:
    """One call of a function of torch.

    Attributes:
        arguments: positional and by name, with a `Ref` for each tensor.
        module: name of the innermost module that made it; "" is the model itself.
        inputs, outputs: numbers of the values it takes, in order of their first use, and gives.
        in_place: whether what it gives is its first argument, changed.
    """

    index: int
    function: Callable[..., Any]
    arguments: tuple[tuple[Any, ...], dict[str, Any]]
    module: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    in_place: bool

    @property
    def name(self) -> str:
        return getattr(self.function, "__name__", str(self.function))

    def bound(self, *names: str) -> list[Any]:
        """The arguments of these names, given by place or by name; None where one is missing."""
        placed, named = self.arguments
        return [
            placed[at] if at < len(placed) else named.get(name) for at, name in enumerate(names)
        ]


@dataclass(frozen=True)
class Visit:
    """One pass through a module: the calls from `begin` to before `end`.

    Attributes:
        began: how many passes had begun before it.
        taken: numbers of the tensors among its arguments, in order.
        result: what it returned, with a `Ref` for each tensor.
    """

    module: str
    began: int
    begin: int
    end: int
    taken: tuple[int, ...]
    result: Any


@dataclass
class Recording:
    """The calls of a forward pass, in order.

    Attributes:
        visits: passes through modules, in the order of their ends.
        shapes, dtypes: of each value, by its number.
        parameters, buffers: names of the values that are these.
        strange: values that came from no call that could be followed.
        makers: the call that gave a value.
        outputs: numbers of the values that the forward pass returned.
    """

    calls: list[Call] = field(default_factory=list)
    visits: list[Visit] = field(default_factory=list)
    shapes: list[tuple[int, ...]] = field(default_factory=list)
    dtypes: list[torch.dtype] = field(default_factory=list)
    parameters: dict[int, str] = field(default_factory=dict)
    buffers: dict[int, str] = field(default_factory=dict)
    strange: set[int] = field(default_factory=set)
    makers: dict[int, Call] = field(default_factory=dict)
    outputs: list[int] = field(default_factory=list)

    def parameters_in(self, begin: int, end: int) -> set[str]:
        """Names of the parameters that the calls from `begin` to before `end` take."""
        taken = {number for call in self.calls[begin:end] for number in call.inputs}
        return {self.parameters[number] for number in taken if number in self.parameters}

    def needed(self) -> set[int]:
        """The values that what the forward pass returns depends on, itself included."""
        found = set(self.outputs)
        for call in reversed(self.calls):
            if found.intersection(call.outputs):
                found.update(call.inputs)
        return found

    def learned(self) -> set[int]:
        """The values that depend on a parameter, or may do; parameters included."""
        found = self.parameters.keys() | self.strange
        for call in self.calls:
            if found.intersection(call.inputs):
                found.update(call.outputs)
        return found


class Recorder(TorchFunctionMode):
    """Writes down every call of torch that gives or changes a tensor."""

    def __init__(self, parameters: Mapping[int, str], buffers: Mapping[int, str]) -> None:
        super().__init__()
        self.recording = Recording()
        self.stack: list[str] = []  # names of the modules that run, innermost last
        self._begun: list[tuple[int, int, tuple[int, ...]]] = []
        self._passes = 0
        self._looking: list[bool] = []  # of the modules that run: whether it looks at its mask
        self.failed = ""  # the module that made a call which failed
        self._parameters, self._buffers = parameters, buffers
        self._numbers: dict[int, int] = {}
        self._alive: list[Tensor] = []  # so that no `id` is given twice

    def number(self, tensor: Tensor, new: bool = False) -> int:
        key = id(tensor)
        if new or key not in self._numbers:
            recording = self.recording
            number = self._numbers[key] = len(recording.shapes)
            self._alive.append(tensor)
            recording.shapes.append(tuple(tensor.shape))
            recording.dtypes.append(tensor.dtype)
            if key in self._parameters:
                recording.parameters[number] = self._parameters[key]
            elif key in self._buffers:
                recording.buffers[number] = self._buffers[key]
            elif is_fake(tensor):
                recording.strange.add(number)
        return self._numbers[key]

    def enter(self, module: str, arguments: Any, looks: bool) -> None:
        """A module begins to run."""
        self._looking.append(looks)
        self.stack.append(module)
        taken = tuple(self.number(tensor) for tensor in tensors_in(arguments))
        self._begun.append((self._passes, len(self.recording.calls), taken))
        self._passes += 1

    def leave(self, result: Any) -> None:
        """The innermost module ends."""
        module, (began, begin, taken) = self.stack.pop(), self._begun.pop()
        self._looking.pop()
        end, result = len(self.recording.calls), map_nest(self._as_ref, result)
        self.recording.visits.append(Visit(module, began, begin, end, taken, result))

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        named = dict(kwargs or {})
        if function is Tensor.__bool__ and self._looking and self._looking[-1]:
            return False  # whether a mask is a causal one, which changes no shape
        if function is Tensor.__iter__:  # gives no tensors that could be seen, but a promise
            return iter(self.__torch_function__(Tensor.unbind, types, args, named))
        before = map_arguments(self._as_ref, (tuple(args), named))
        try:
            result = function(*args, **named)
        except Exception:
            self.failed = self.failed or (self.stack[-1] if self.stack else "")
            raise
        changes = changes_in_place(function) and args and isinstance(args[0], Tensor)
        given = [args[0]] if changes else [x for x in leaves(result) if isinstance(x, Tensor)]
        inputs = tuple(
            dict.fromkeys(x.number for x in argument_leaves(before) if isinstance(x, Ref))
        )
        known = {self._numbers.get(id(x)) for x in given}
        same = known & set(inputs)  # dropout gives what it took, here
        if given and (changes or not same or draws(function)):
            new = bool(changes or same)
            outputs = tuple(self.number(x, new=new) for x in given)
            call = Call(
                index=len(self.recording.calls),
                function=function,
                arguments=before,
                module=self.stack[-1] if self.stack else "",
                inputs=inputs,
                outputs=outputs,
                in_place=bool(changes),
            )
            self.recording.calls.append(call)
            self.recording.strange.difference_update(outputs)
            self.recording.makers |= dict.fromkeys(outputs, call)
        return result

    def _as_ref(self, leaf: Any) -> Any:
        return Ref(self.number(leaf)) if isinstance(leaf, Tensor) else leaf


def map_arguments(function: Callable[[Any], Any], nest: Any) -> Any:
    """The same nest of tuples, lists, dicts and slices, with `function` applied to every leaf."""
    if isinstance(nest, tuple):
        return tuple(map_arguments(function, each) for each in nest)
    if isinstance(nest, list):
        return [map_arguments(function, each) for each in nest]
    if isinstance(nest, dict):
        return {key: map_arguments(function, each) for key, each in nest.items()}
    if isinstance(nest, slice):
        return slice(*(map_arguments(function, x) for x in (nest.start, nest.stop, nest.step)))
    return function(nest)


def argument_leaves(nest: Any) -> list[Any]:
    """What `map_arguments` applies its function to, in order."""
    found: list[Any] = []
    map_arguments(found.append, nest)
    return found


def list_spans(nest: Any) -> list[tuple[int, int]]:
    """Where the leaves of each list, tuple or slice within arguments begin and end."""
    spans: list[tuple[int, int]] = []

    def walk(part: Any, begin: int) -> int:
        if isinstance(part, slice):
            part = [part.start, part.stop, part.step]
        elif isinstance(part, dict):
            part = list(part.values())
        if not isinstance(part, list | tuple):
            return begin + 1
        end = begin
        for each in part:
            end = walk(each, end)
        spans.append((begin, end))
        return end

    walk(nest, 0)
    return spans


def draws(function: Any) -> bool:
    """Whether a function of torch may draw at random, by its name."""
    return getattr(function, "__name__", "").startswith(RANDOM)


def changes_in_place(function: Any) -> bool:
    """Whether a function of torch changes its first argument, by the way it is named."""
    name = getattr(function, "__name__", "")
    if name.startswith("__"):
        return name == "__setitem__" or (name.startswith("__i") and name != "__invert__")
    return name.endswith("_") and name != "requires_grad_"


DEPENDS = {
    "DataDependentOutputException": "it asks for the numbers in a tensor",
    "DynamicOutputShapeException": "a shape depends on the numbers in a tensor",
}
"""What errors of torch mean that come where there are only shapes."""


def record(model: nn.Module, run: Callable[[nn.Module], Any], plan: str = "") -> Recording:
    """The calls of `run(model)`, in evaluation mode and without one number computed.

    Costs no memory for activations, and none for parameters of a model on the meta device.

    Args:
        plan: that asks for it, for errors.

    Raises:
        UserError: the forward pass asks for the numbers in a tensor.
    """
    recorder = Recorder(
        {id(p): name for name, p in model.named_parameters()},
        {id(b): name for name, b in model.named_buffers()},
    )
    with ExitStack() as closing:
        closing.enter_context(left_as_it_was(model))
        closing.enter_context(_listening(model, recorder))
        closing.enter_context(_evaluating(model))
        closing.enter_context(torch.no_grad())
        closing.enter_context(fake_tensors())
        closing.enter_context(recorder)
        closing.enter_context(_marked())
        try:
            result = run(model)
        except Exception as error:
            kind, told = type(error).__name__, str(error).splitlines()[0] if str(error) else ""
            why = f"{DEPENDS[kind]} ({told})" if kind in DEPENDS else f"{kind}: {told}"
            failed = model.get_submodule(recorder.failed)
            name = f"{recorder.failed} ({type(failed).__name__})" if recorder.failed else ""
            raise UserError(
                f"{plan and f'{plan}: '}the forward pass cannot be followed by shapes alone, in "
                f"{name or type(model).__name__}: {why}; "
                "allowed: a forward pass that depends on no tensor's numbers; next: a plan that "
                "leaves the model whole, such as data(n)"
            ) from error
        recorder.recording.outputs = [recorder.number(leaf) for leaf in tensors_in(result)]
    return recorder.recording


_local = threading.local()


def is_recording() -> bool:
    """Whether a pass of this thread is one that is only followed."""
    return bool(getattr(_local, "recordings", 0))


@contextmanager
def _marked() -> Iterator[None]:
    _local.recordings = getattr(_local, "recordings", 0) + 1
    try:
        yield
    finally:
        _local.recordings -= 1


def tensors_in(nest: Any) -> Iterator[Tensor]:
    return (leaf for leaf in leaves(nest) if isinstance(leaf, Tensor))


@contextmanager
def _listening(model: nn.Module, recorder: Recorder) -> Iterator[None]:
    """Tell a recorder which modules run."""

    def enter(name: str) -> Callable[..., None]:
        return lambda module, args, kwargs: recorder.enter(
            name, (args, kwargs), isinstance(module, LOOKS_AT_MASK)
        )

    def leave(_: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
        recorder.leave(result)

    handles: list[Any] = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(enter(name), with_kwargs=True))
        handles.append(module.register_forward_hook(leave, with_kwargs=True, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def left_as_it_was(model: nn.Module) -> Iterator[None]:
    """Afterwards modules have the buffers and the attributes of their own that they had, and what
    of these are lists, dicts and sets hold what they held: a pass that is only followed counts for
    no counter."""
    before = []
    for module in model.modules():
        own = {key: value for key, value in vars(module).items() if key not in OF_MODULES}
        held = [(v, copy.copy(v)) for v in own.values() if isinstance(v, list | dict | set)]
        before.append((module, own, held, dict(module._buffers)))
    try:
        yield
    finally:
        for module, own, held, buffers in before:
            attributes = vars(module)
            for key in [key for key in attributes if key not in OF_MODULES and key not in own]:
                del attributes[key]
            attributes.update(own)
            module._buffers.clear()
            module._buffers.update(buffers)
            for value, kept in held:
                value.clear()
                if isinstance(value, list):
                    value.extend(kept)
                else:
                    value.update(kept)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, in which nothing is drawn at random, and then what it was."""
    training: Sequence[nn.Module] = [m for m in model.modules() if m.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
