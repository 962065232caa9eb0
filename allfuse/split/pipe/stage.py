"""One stage of a model: the model's own forward pass, of which only a part is computed.

A stage runs the model's code as it is. Modules that an earlier stage has computed give tensors of
the right shapes and no contents; the first module of the stage takes what came from there; before
the first module of the next stage the pass ends. So no model is rewritten or traced.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from allfuse.base.tensors import map_nest
from allfuse.split.pipe.boundary import Boundary, StagePlan, passes_before
from allfuse.split.record import Ref, tensors_in
from allfuse.split.shapes import Shapes


class _Passed(BaseException):
    """The pass has come to the next stage. No `Exception`, so that a model's code lets it by."""

    def __init__(self, value: Tensor) -> None:
        self.value = value


class Stage:
    """Computes one stage of a model.

    Parameters of other stages are dropped from the model, whose names stay what they are.

    Args:
        model: the whole, changed in place.
    """

    def __init__(self, model: nn.Module, plan: StagePlan, shapes: Shapes) -> None:
        self.model, self.plan, self.shapes = model, plan, shapes
        self._received: Tensor | None = None
        self._rows = 0
        self._counts: dict[tuple[str, str], int] = defaultdict(int)
        modules = dict(model.named_modules())
        self.device = next((p.device for p in model.parameters()), torch.device("cpu"))
        if plan.first is not None:
            computed: dict[str, dict[int, Any]] = defaultdict(dict)
            for number, visit in passes_before(shapes.one, plan.first.call):
                computed[visit.module][number] = visit.result
            for name, results in computed.items():
                modules[name].forward = self._skipping(modules[name], name, results)
            modules[plan.first.module].register_forward_pre_hook(
                self._beginning(plan.first), with_kwargs=True
            )
        if plan.last is not None:
            modules[plan.last.module].register_forward_pre_hook(
                self._ending(plan.last), with_kwargs=True
            )
        self._drop_others()

    def run(self, received: Tensor | None, rows: int, run: Callable[[nn.Module], Any]) -> Any:
        """One pass over a microbatch.

        Args:
            received: what the stage before has sent; None in the first.
            rows: of the microbatch.
            run: the whole pass, as the job has it.

        Returns: what goes to the next stage, or what `run` returns in the last.
        """
        self._received, self._rows = received, rows
        self._counts.clear()
        try:
            return run(self.model)
        except _Passed as passed:
            return passed.value
        finally:
            self._received = None

    def _drop_others(self) -> None:
        """Leave something in the place of other stages' parameters that has their shape and type,
        for code that looks at these, and no contents."""
        names = {id(p): name for name, p in self.model.named_parameters()}
        for module in self.model.modules():
            for key, parameter in list(module._parameters.items()):
                if parameter is not None and names[id(parameter)] not in self.plan.parameters:
                    del module._parameters[key]
                    object.__setattr__(module, key, parameter.detach().to("meta"))

    def _visit(self, kind: str, module: str) -> int:
        """The number of this pass through a module."""
        self._counts[kind, module] += 1
        return self._counts[kind, module] - 1

    def _skipping(
        self, module: nn.Module, name: str, results: Mapping[int, Any]
    ) -> Callable[..., Any]:
        inner = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            number = self._visit("skip", name)
            if number not in results:
                return inner(*args, **kwargs)
            return map_nest(self._hollow, results[number])

        return forward

    def _hollow(self, leaf: Any) -> Any:
        if isinstance(leaf, Ref):
            return self.shapes.empty(leaf.number, self._rows, self.device)
        return leaf

    def _beginning(self, boundary: Boundary) -> Callable[..., Any]:
        def begin(_: nn.Module, args: Any, kwargs: Any) -> Any:
            if self._visit("begin", boundary.module) != boundary.visit:
                return None
            place = itertools.count()

            def put(leaf: Any) -> Any:
                here = isinstance(leaf, Tensor) and next(place) == boundary.argument
                return self._received if here else leaf

            return map_nest(put, (args, kwargs))

        return begin

    def _ending(self, boundary: Boundary) -> Callable[..., None]:
        def end(_: nn.Module, args: Any, kwargs: Any) -> None:
            if self._visit("end", boundary.module) == boundary.visit:
                raise _Passed(list(tensors_in((args, kwargs)))[boundary.argument])

        return end
