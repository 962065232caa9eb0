"""Tells when a gradient of a stage is final: once its last microbatch has gone backward.

In a pipeline autograd's hooks fire once for each microbatch, or not at all where gradients of
weights are computed later. Ranks come to their ends at different times, so what is told at once
travels to other replicas while other stages still work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

from torch import Tensor
from torch.nn import Parameter

from allfuse.plan.schedule import Action, Order

Tell = Callable[[], None]


class Finality:
    """Who waits for which gradients, and which of them are about to become final."""

    def __init__(self) -> None:
        self._told: dict[Parameter, list[Tell]] = {}
        self._open: set[Parameter] = set()

    def watch(self, parameters: Sequence[Parameter], final: Callable[[int], None]) -> None:
        """Call `final(i)` when parameter i's gradient is final."""
        for index, parameter in enumerate(parameters):
            if parameter not in self._told:
                self._told[parameter] = []
                parameter.register_post_accumulate_grad_hook(self.tell)
            self._told[parameter].append(partial(final, index))

    def tell(self, parameter: Tensor) -> None:
        """A gradient has got what comes last; a no-op where that is not known yet."""
        if isinstance(parameter, Parameter) and parameter in self._open:
            self._open.discard(parameter)
            for told in self._told.get(parameter, ()):
                told()

    @contextmanager
    def closing(self, parameters: Sequence[Parameter]) -> Iterator[None]:
        """Around what adds the last to the gradients of parameters. Those that nobody has told of
        by its end got nothing more."""
        self._open.update(parameters)
        try:
            yield
            for parameter in parameters:
                self.tell(parameter)
        finally:
            self._open.difference_update(parameters)


def find_closing(
    order: Order, uses: Mapping[int, Sequence[Parameter]], rest: Sequence[Parameter]
) -> dict[Action, list[Parameter]]:
    """The actions of a rank after which nothing is added to gradients, and of which parameters.

    Args:
        uses: what each of its stages uses. rest: what none does.
    """
    ends = {action.stage: action for action in order if action.kind in ("backward", "weight")}
    places = {action: place for place, action in enumerate(order)}
    last: dict[Parameter, Action] = dict.fromkeys(rest, min(ends.values(), key=places.__getitem__))
    for stage, action in sorted(ends.items(), key=lambda each: places[each[1]]):
        last.update(dict.fromkeys(uses[stage], action))
    found: dict[Action, list[Parameter]] = {}
    for parameter, action in last.items():
        found.setdefault(action, []).append(parameter)
    return found
