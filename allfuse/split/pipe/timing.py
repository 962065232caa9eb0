"""Times the parts of a model between the places where it can be cut.

Each part runs alone, forward and backward, as the model's own code: modules before it give tensors
without contents, and it has random weights of its own while it is timed, all others none. So memory
is needed for one part, a model may be timed before it has numbers, and nothing of it changes.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from allfuse.split.base import Run
from allfuse.split.data.generators import isolated
from allfuse.split.pipe.boundary import StagePlan
from allfuse.split.pipe.sizes import Followed
from allfuse.split.pipe.stage import Stage
from allfuse.split.record import Recording, left_as_it_was, tensors_in

BUDGET_S = 2.0
GROUP_BYTES = 8 << 20
MOST = 9
"""How often a part is timed, if the budget allows it; at least once."""

Autocast = Callable[[], AbstractContextManager[Any]]

Lose = Callable[[Any], Tensor]
"""The loss, of what the model came to."""


@dataclass(frozen=True)
class Cost:
    """What a part of a model costs its rank.

    Attributes:
        pass_s: of a microbatch, forward and backward. update_s: of an optimizer's step (AdamW).
        state_bytes: parameters, gradients and two moments. kept_bytes: activations of a microbatch
            between its two passes.
    """

    pass_s: float
    update_s: float
    state_bytes: int
    kept_bytes: int


def time_parts(
    model: nn.Module,
    run: Run,
    recording: Recording,
    parts: Sequence[StagePlan],
    *,
    device: torch.device,
    autocast: Autocast,
    recompute: bool = False,
    lose: Lose | None = None,
) -> list[Cost]:
    """What each part costs; of those that are alike one is timed, for all about `BUDGET_S`.

    The fastest of some passes counts: whatever else the machine does can only add.

    Args:
        recording: of this run, under the same autocast.
        recompute: blocks will run again in the backward pass.
        lose: the loss of this run's outputs, which is in the last part's cost; None: nobody knows.
    """
    keys = [_likeness(model, recording, part) for part in parts]
    budget_s = BUDGET_S / len(set(keys))
    found: dict[object, Cost] = {}
    with left_as_it_was(model), isolated(0), torch.enable_grad():
        for key, part in zip(keys, parts, strict=True):
            if key not in found:
                ends = lose if part.last is None else None
                timer = _Timer(model, run, recording, part, device, autocast, ends)
                found[key] = timer.measure(budget_s, recompute)
    return [found[key] for key in keys]


def _likeness(model: nn.Module, recording: Recording, part: StagePlan) -> object:
    """What parts have in common that cost the same."""
    learns = {name: p.requires_grad for name, p in model.named_parameters()}
    calls = []
    for call in recording.calls[_begin(part) : _end(part, recording)]:
        numbers = (*call.inputs, *call.outputs)
        values = tuple((recording.shapes[n], recording.dtypes[n]) for n in numbers)
        frozen = tuple(learns.get(recording.parameters.get(n, "")) for n in call.inputs)
        calls.append((call.name, values, frozen))
    return part.first is None, part.last is None, tuple(calls)


def _begin(part: StagePlan) -> int:
    return 0 if part.first is None else part.first.call


def _end(part: StagePlan, recording: Recording) -> int:
    return len(recording.calls) if part.last is None else part.last.call


class _Timer:
    """Times one part."""

    def __init__(
        self,
        model: nn.Module,
        run: Run,
        recording: Recording,
        part: StagePlan,
        device: torch.device,
        autocast: Autocast,
        lose: Lose | None,
    ) -> None:
        self.model, self.run, self.part, self.lose = model, run, part, lose
        self.device, self.autocast = device, autocast
        self.recording, self.sizes = recording, Followed(recording)
        inside = (_begin(part), _end(part, recording))
        self.modules = {
            visit.module
            for visit in recording.visits
            if inside[0] <= visit.begin and visit.end <= inside[1]
        }

    def measure(self, budget_s: float, recompute: bool) -> Cost:
        kept: dict[int, int] = {}
        with ExitStack() as closing:
            stage = Stage(self.model, self.part, self.recording, self.device)
            closing.callback(stage.close)
            own = closing.enter_context(
                _stand_ins(self.model, self.part.parameters, self.modules, self.device)
            )
            weights = {tensor.untyped_storage().data_ptr() for tensor in own}
            with _noting(kept, weights):
                self._pass(stage, own)
            begin = time.perf_counter()
            times = [self._pass(stage, own)]
            while len(times) < MOST and time.perf_counter() - begin < budget_s:
                times.append(self._pass(stage, own))
            update_s = sum(map(self._update, _some_at_a_time(own)))
        forward_s, backward_s = map(min, zip(*times, strict=True))
        first = self.part.first
        taken = 0 if first is None else self.sizes.crossing(first, torch.device("meta")).nbytes
        return Cost(
            pass_s=forward_s * (2 if recompute else 1) + backward_s,
            update_s=update_s,
            state_bytes=sum(t.nbytes * (4 if t.requires_grad else 1) for t in own),
            kept_bytes=taken if recompute else sum(kept.values()),
        )

    def _pass(self, stage: Stage, own: Iterable[Tensor]) -> tuple[float, float]:
        """Seconds of one pass forward, and one backward, which leaves gradients of its own."""
        for tensor in own:
            tensor.grad = None
        received = None
        if self.part.first is not None:
            received = _fill(self.sizes.crossing(self.part.first, self.device))
            received.requires_grad_(received.is_floating_point())
        with self.autocast():
            found = stage.run(received, self.sizes, functools.partial(self.run, self.model))
            if self.lose is not None:
                found = self.lose(found)
        times = [stage.began_s, self._now()]
        ends = [tensor for tensor in tensors_in(found) if tensor.requires_grad]
        gradients = [torch.ones_like(tensor) for tensor in ends]
        times.append(self._now())
        if ends:
            torch.autograd.backward(ends, gradients)
        times.append(self._now())
        return times[1] - times[0], times[3] - times[2]

    def _update(self, parameters: Sequence[Tensor]) -> float:
        """Seconds of an optimizer's step of parameters whose gradients are there, the faster of
        two."""
        optimizer = torch.optim.AdamW(parameters)
        optimizer.step()  # makes its state
        times = [self._now()]
        for _ in range(2):
            optimizer.step()
            times.append(self._now())
        return min(times[1] - times[0], times[2] - times[1])

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def _some_at_a_time(own: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Those that learn, in groups, so that there is little of an optimizer's state at a time."""
    group: list[Tensor] = []
    for tensor in own:
        if tensor.grad is not None:
            group.append(tensor)
        if sum(each.nbytes for each in group) >= GROUP_BYTES:
            yield group
            group = []
    if group:
        yield group


@contextmanager
def _noting(kept: dict[int, int], others: Collection[int]) -> Iterator[None]:
    """Note the bytes of memory that the backward pass needs, by where they are; but some."""

    def pack(tensor: Tensor) -> Tensor:
        memory = tensor.untyped_storage()
        if memory.data_ptr() not in others:
            kept[memory.data_ptr()] = memory.nbytes()
        return tensor.detach()  # itself, if the call gave it, would hold itself alive

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        yield


@contextmanager
def _stand_ins(
    model: nn.Module, names: Collection[str], modules: Collection[str], device: torch.device
) -> Iterator[list[nn.Parameter]]:
    """Within it these parameters are random ones, which it gives, all others have no memory, and
    buffers of these modules are copies."""
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    made: dict[int, nn.Parameter] = {}
    before: list[tuple[nn.Module, str, Tensor]] = []
    try:
        for name, module in model.named_modules():
            for key, parameter in [*module._parameters.items()]:
                if parameter is None:
                    continue
                if id(parameter) not in made:
                    here = first[id(parameter)] in names
                    made[id(parameter)] = _stand_in(parameter, device, here=here)
                before.append((module, key, parameter))
                setattr(module, key, made[id(parameter)])
            for key, buffer in [*module._buffers.items()] if name in modules else ():
                if buffer is not None:
                    before.append((module, key, buffer))
                    setattr(module, key, _copy(buffer, device))
        yield [new for old, new in made.items() if first[old] in names]
    finally:
        for module, key, tensor in before:
            setattr(module, key, tensor)


def _stand_in(parameter: nn.Parameter, device: torch.device, *, here: bool) -> nn.Parameter:
    shape, dtype = parameter.shape, parameter.dtype
    if not here:
        nothing = torch.zeros((), dtype=dtype, device=device).expand(shape)
        return nn.Parameter(nothing, requires_grad=False)
    data = _fill(torch.empty(shape, dtype=dtype, device=device), 0.02)
    return nn.Parameter(data, requires_grad=parameter.requires_grad)


def _copy(buffer: Tensor, device: torch.device) -> Tensor:
    if buffer.is_meta:
        return torch.zeros(buffer.shape, dtype=buffer.dtype, device=device)
    return buffer.detach().clone()


@torch.no_grad()
def _fill(tensor: Tensor, scale: float = 1.0) -> Tensor:
    return tensor.normal_(0, scale) if tensor.is_floating_point() else tensor.zero_()
