"""Runs microbatches through the stages of a rank, in the order of a schedule."""

from __future__ import annotations

import contextlib
import functools
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from allfuse.base.errors import AllfuseError, JobError, UserError
from allfuse.base.tensors import cut_rows, share
from allfuse.link import Link
from allfuse.plan import Pipe
from allfuse.plan.schedule import Action, Order, count_microbatches
from allfuse.split.elsewhere import ELSEWHERE
from allfuse.split.pipe.courier import Courier
from allfuse.split.pipe.deferred import Deferring, Later
from allfuse.split.pipe.finality import Finality, find_closing
from allfuse.split.pipe.itinerary import Parcel
from allfuse.split.pipe.sizes import Ended, Followed, Scaled, Seen, Sizes
from allfuse.split.pipe.stage import Stage
from allfuse.split.record import Recording, record, tensors_in

Part = tuple[Any, int]
"""A microbatch and its rows."""

Lose = Callable[[Any, int], Tensor]
"""What to differentiate, from what the last stage came to and the rows of the microbatch."""

NO_LOSS = (
    "the loss does not depend on any parameter that requires a gradient; allowed: a loss computed "
    "from the model's outputs; next: look for detach(), no_grad() or item() on the way, and for "
    "frozen parameters"
)


class Pipeline:
    """The stages of one rank, and its link to the ranks that have the others.

    Args:
        link: to the ranks of the pipeline, this one among them.
        stages: those of this rank, by their number. count: of all ranks.
        shared: names of parameters that stages of several ranks use, and which ranks.
        scaled: shapes of what the model computes, by the first samples.
        model: of which this rank has its stages.
        least: rows of a microbatch, where their number is derived.
    """

    def __init__(
        self,
        link: Link,
        axis: Pipe,
        stages: Mapping[int, Stage],
        count: int,
        shared: Mapping[str, tuple[int, ...]],
        scaled: Scaled,
        model: nn.Module,
        least: int = 1,
    ) -> None:
        self.link, self.axis, self.schedule = link, axis, axis.schedule
        self.stages, self.count, self.shared = dict(stages), count, dict(shared)
        self.scaled, self.model, self.least = scaled, model, least
        self._followed: dict[object, Sizes] = {}  # by the shapes that the model takes
        self._looking: Literal["at once", "through", None] = None
        self._orders: dict[int, list[Order]] = {}
        self._closing: dict[int, dict[Action, list[Parameter]]] = {}
        self.finality = Finality()
        self._before: deque[Courier] = deque()  # of passes before, whose parcels may be under way
        self.waited_s = 0.0

    def meet_mates(self, link: Link) -> None:
        """Go on over another link to the same ranks. What was under way is forgotten."""
        self.link = link
        self._before.clear()

    # Passes through the model.

    def enter(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        """The model is called. Raises UserError where no stage makes the pass."""
        if self._looking == "at once":
            raise Seen([tuple(tensor.shape) for tensor in tensors_in((args, kwargs))])
        if self._looking is None and not any(stage.active for stage in self.stages.values()):
            raise UserError(
                f"the model was called under {self.axis}, where this rank has some stages of it "
                "only; allowed: s.step(batch, loss) and s.evaluate(metrics, data), which run all "
                "stages; next: `allfuse predict` with the saved run, or the weights it holds"
            )

    def leave(self, *_: Any) -> None:
        """The model's own pass ends."""
        if self._looking is not None:
            raise Ended

    def sizes_of(self, rows: int, compute: Callable[[], Any]) -> Sizes:
        """Of a pass over a microbatch. Where its samples have other shapes than the first ones it
        is followed, once for each shape: 0.1 to 0.2 s.

        Raises:
            UserError: it asks for the numbers in a tensor.
        """
        usual, shapes = self.scaled.of(rows), self._look(compute)
        if shapes is None or shapes == usual.takes():
            return usual
        key = tuple(shapes)
        if key not in self._followed:
            self._followed[key] = Followed(self._follow(compute))
        return self._followed[key]

    def _look(self, compute: Callable[[], Any]) -> list[tuple[int, ...]] | None:
        """The shapes of the tensors that the model is called with; None where it is not."""
        self._looking = "at once"
        try:
            compute()
        except Seen as seen:
            return seen.shapes
        finally:
            self._looking = None
        return None

    def _follow(self, compute: Callable[[], Any]) -> Recording:
        def run(_: nn.Module) -> None:
            with contextlib.suppress(Ended):
                compute()

        self._looking = "through"
        try:
            return record(self.model, run)
        finally:
            self._looking = None

    def owner(self, stage: int) -> int:
        return self.schedule.owner(stage, self.link.size)

    def microbatches(self, rows: int) -> int:
        """Into how many so many rows are cut."""
        wanted = self.axis.microbatches
        return count_microbatches(rows, self.link.size, self.schedule, wanted, self.least)

    def cut(self, batch: Any, rows: int, fewest: int | None = None) -> list[Part]:
        """A batch in microbatches, as even as can be.

        Args:
            fewest: rows that others have who must come to as many microbatches; None is like here.
                Whoever has fewer stands in with the same rows for each.
        """
        count = self.microbatches(rows if fewest is None else fewest)
        if count == 1 or rows < count:
            return [(batch, rows)] * count
        bounds = [share(rows, count, number) for number in range(count)]
        return [(cut_rows(batch, start, stop), stop - start) for start, stop in bounds]

    # Training.

    def learn(
        self,
        parts: Sequence[Part],
        compute: Callable[[Any], Any],
        lose: Lose,
        before: Callable[[int, int], None],
        inputs: Sequence[Parameter] | None = None,
        last: bool = False,
    ) -> None:
        """Add the gradients of some microbatches to those of this rank's parameters.

        Args:
            compute: the model's pass over a microbatch and what follows it, as the job has it.
            lose: makes of what that gives what to differentiate; called for the last stage.
            before: called with stage and microbatch before each forward pass.
            inputs: parameters that get gradients; None is all that learn.
            last: nothing is added after these in this step: whoever watches a gradient hears when
                it is final.

        Raises:
            JobError: the model or the loss failed; names stage, rank and microbatch.
        """
        orders = self._order_of(len(parts))
        passing = _Pass(self, orders, parts, compute)
        closing = self._closing_of(len(parts)) if last else {}
        for action in orders[self.link.rank]:
            with self._named(action), self.finality.closing(closing.get(action, ())):
                match action.kind:
                    case "forward":
                        passing.forward(action, lose, before)
                    case "weight":
                        passing.weights(action, inputs)
                    case _:
                        passing.backward(action, inputs)
        passing.courier.settle()
        self.waited_s += passing.courier.waited_s

    def _order_of(self, count: int) -> list[Order]:
        if count not in self._orders:
            self._orders[count] = self.schedule.orders(self.link.size, count)
        return self._orders[count]

    def _closing_of(self, count: int) -> dict[Action, list[Parameter]]:
        """After which actions gradients of this rank are final; but those that others add to."""
        if count not in self._closing:
            named = [*self.model.named_parameters()][::-1]
            own = {
                number: [p for name, p in named if name in stage.plan.parameters]
                for number, stage in self.stages.items()
            }
            shared = {p for name, p in named if name in self.shared}
            order = self._order_of(count)[self.link.rank]
            found = find_closing(order, own, [p for _, p in named])
            self._closing[count] = {
                action: [p for p in several if p not in shared] for action, several in found.items()
            }
        return self._closing[count]

    @contextlib.contextmanager
    def _named(self, action: Action) -> Iterator[None]:
        """Around what a model does: says where it failed."""
        try:
            yield
        except AllfuseError:
            raise
        except Exception as error:
            what = "forward" if action.kind == "forward" else "backward"
            raise JobError(
                f"stage {action.stage} on rank {self.link.members[self.link.rank]} failed in the "
                f"{what} pass of microbatch {action.microbatch}: {type(error).__name__}: {error}; "
                "next: run the job under data(1), where the model is whole"
            ) from error

    # What the ranks of a pipeline tell each other besides.

    def tell(self, numbers: Sequence[float]) -> list[float]:
        """The numbers of the rank that has the last stage, on all."""
        operation = "tell what the last stage came to"
        told = torch.tensor(list(numbers), dtype=torch.float64)
        link, device = self.link, next(iter(self.stages.values())).device
        told = told.to(device)
        if link.rank == self.axis.teller:
            works = [link.send(told, peer, operation) for peer in range(link.size)
                     if peer != link.rank]  # fmt: skip
            for work in works:
                work.wait()
        else:
            link.receive(told, self.axis.teller, operation).wait()
        found: list[float] = told.tolist()
        return found

    def gather(self, parameters: Mapping[str, Parameter]) -> None:
        """Add up the gradients of parameters that several ranks use, on the first of these."""
        for name, ranks, parameter in self._shared_among(parameters):
            if self.link.rank != ranks[0]:
                self._send(_gradient(parameter), ranks[0], f"gather the gradient of {name}")
                continue
            total = _gradient(parameter)
            for peer in ranks[1:]:
                part = torch.empty_like(total, memory_format=torch.contiguous_format)
                self.link.receive(part, peer, f"gather the gradient of {name}").wait()
                total = total + part
            parameter.grad = total

    def spread(self, parameters: Mapping[str, Parameter]) -> None:
        """Give these the gradient that the first of them has, so that they end equal."""
        for name, ranks, parameter in self._shared_among(parameters):
            gradient = _gradient(parameter)
            self._give(gradient, ranks, f"spread the gradient of {name}")
            parameter.grad = gradient

    @torch.no_grad()
    def level(self, parameters: Mapping[str, Tensor]) -> None:
        """Give these the values that the first of them has."""
        for name, ranks in self.shared.items():
            if name in parameters and self.link.rank in ranks:
                value = parameters[name].detach().contiguous()
                self._give(value, ranks, f"spread the value of {name}")
                parameters[name].copy_(value)

    def _shared_among(
        self, parameters: Mapping[str, Parameter]
    ) -> Iterator[tuple[str, tuple[int, ...], Parameter]]:
        for name, ranks in self.shared.items():
            if name in parameters and self.link.rank in ranks:
                yield name, ranks, parameters[name]

    def _give(self, tensor: Tensor, ranks: tuple[int, ...], operation: str) -> None:
        """Copy the first rank's tensor to the others, in place."""
        if self.link.rank == ranks[0]:
            for peer in ranks[1:]:
                self._send(tensor, peer, operation)
        else:
            self.link.receive(tensor, ranks[0], operation).wait()

    def _send(self, tensor: Tensor, peer: int, operation: str) -> None:
        self.link.send(tensor.contiguous(), peer, operation).wait()

    # Prediction.

    @torch.no_grad()
    def predict(self, rows: int, compute: Callable[[], Any]) -> Any:
        """One forward pass without gradients; ELSEWHERE on ranks that have not the last stage.

        A rank goes on to the next batch without waiting for those after it.
        """
        own = [[Action("forward", stage, 0) for stage in range(self.count)
                if self.owner(stage) == rank] for rank in range(self.link.size)]  # fmt: skip
        passing = _Pass(self, own, [(None, rows)], lambda _: compute())
        result: Any = ELSEWHERE
        for action in own[self.link.rank]:
            found = passing.compute(action)
            if action.stage + 1 == self.count:
                result = found
            else:
                passing.courier.give(Parcel(False, action.stage, 0), found)
        self._before.append(passing.courier)
        if len(self._before) > 2:
            self._before.popleft().settle()
        return result


class _Pass:
    """One pass of some microbatches through the stages of a rank, forth and back."""

    def __init__(
        self,
        pipeline: Pipeline,
        orders: Sequence[Order],
        parts: Sequence[Part],
        compute: Callable[[Any], Any],
    ) -> None:
        self.pipeline, self.parts, self._compute = pipeline, parts, compute
        self._sizes: dict[int, Sizes] = {}
        self.held: dict[tuple[int, int], tuple[Tensor | None, Tensor]] = {}
        self.later: dict[tuple[int, int], Later] = {}
        count, owner = pipeline.count, pipeline.owner
        self.courier = Courier(pipeline.link, orders, count, owner, self._empty)

    def _empty(self, crossing: int, microbatch: int) -> Tensor:
        stages = self.pipeline.stages
        before, after = stages.get(crossing), stages.get(crossing + 1)
        stage = before or after
        assert stage is not None
        place = stage.plan.last if stage is before else stage.plan.first
        assert place is not None
        return self.sizes(microbatch).crossing(place, stage.device)

    def sizes(self, microbatch: int) -> Sizes:
        if microbatch not in self._sizes:
            batch, rows = self.parts[microbatch]
            run = functools.partial(self._compute, batch)
            self._sizes[microbatch] = self.pipeline.sizes_of(rows, run)
        return self._sizes[microbatch]

    def compute(self, action: Action, before: Callable[[], None] = lambda: None) -> Any:
        """A stage's forward pass, on what the stage before gave. `before` is called right then."""
        received = None
        if action.stage:
            received = self.courier.take(Parcel(False, action.stage - 1, action.microbatch))
            if torch.is_grad_enabled() and received.is_floating_point():
                received.requires_grad_()
        (batch, _), sizes = self.parts[action.microbatch], self.sizes(action.microbatch)
        before()
        run = functools.partial(self._compute, batch)
        found = self.pipeline.stages[action.stage].run(received, sizes, run)
        self.held[action.stage, action.microbatch] = (received, found)
        return found

    def forward(self, action: Action, lose: Lose, before: Callable[[int, int], None]) -> None:
        _, stage, microbatch = action
        rows = self.parts[microbatch][1]
        later = Later()
        deferring = self.pipeline.schedule.in_two
        with Deferring(later) if deferring else contextlib.nullcontext():
            found = self.compute(action, functools.partial(before, stage, microbatch))
            if stage + 1 == self.pipeline.count:
                found = lose(found, rows)
                if not found.requires_grad:
                    raise UserError(NO_LOSS)
        self.later[stage, microbatch] = later
        received, _ = self.held[stage, microbatch]
        self.held[stage, microbatch] = (received, found)
        if stage + 1 < self.pipeline.count:
            self.courier.give(Parcel(False, stage, microbatch), found)

    def backward(self, action: Action, inputs: Sequence[Parameter] | None) -> None:
        _, stage, microbatch = action
        received, found = self.held.pop((stage, microbatch))
        gradient = None
        if stage + 1 < self.pipeline.count:
            gradient = self.courier.take(Parcel(True, stage, microbatch))
        also = [] if received is None else [received]
        wanted = None if inputs is None else [*inputs, *also]
        if found.requires_grad and (wanted is None or wanted):
            torch.autograd.backward(found, gradient, inputs=wanted)
        if received is not None:
            back = torch.zeros_like(received) if received.grad is None else received.grad
            self.courier.give(Parcel(True, stage - 1, microbatch), back)

    def weights(self, action: Action, inputs: Sequence[Parameter] | None) -> None:
        later = self.later.pop((action.stage, action.microbatch))
        later.run(inputs, self.pipeline.finality.tell)


def _gradient(parameter: Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
