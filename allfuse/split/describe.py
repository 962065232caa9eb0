"""Says in words how a model is cut, module by module."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from torch import nn

from allfuse.base.units import format_bytes, format_count
from allfuse.plan import Pipe, Plan, Tensor
from allfuse.split.base import Run
from allfuse.split.naming import Line, alike, merged
from allfuse.split.pipe.describe import tell_pipe
from allfuse.split.record import record
from allfuse.split.request import NO_WISHES, Request
from allfuse.split.shapes import Shapes
from allfuse.split.tensor.attention import unfold_attention
from allfuse.split.tensor.search import TensorPlan, Use, find_cuts

HOW = {
    "vocabulary": "by its rows",
    "gathered": "by columns, gathered",
    "late": "by columns, loss by parts if it is a cross entropy, else gathered",
}
"""How maps that stand alone are cut."""


def describe_splits(
    plan: Plan,
    model: nn.Module,
    runs: Sequence[tuple[int, Run]],
    rows: int,
    request: Request = NO_WISHES,
    run_on: Callable[[int], Run] | None = None,
) -> tuple[list[str], dict[str, object]]:
    """Lines for people, and the same as facts, for the axes of a plan that cut a model.

    Args:
        runs: two forward passes over batches of different numbers of rows.
        rows: of the share of a batch that one replica has.
        request: what the job wants of it.
        run_on: gives a forward pass over so many rows, by which stages are timed.

    Raises:
        UserError, PlanError: the model cannot be followed, or not be cut so.
    """
    lines: list[str] = []
    facts: dict[str, object] = {}
    if not any(isinstance(axis, Tensor | Pipe) for axis in plan.axes):
        return lines, facts
    if any(isinstance(axis, Tensor) for axis in plan.axes):
        unfold_attention(model)
    (few, run), (more, run_more) = runs
    shapes = Shapes(record(model, run), few, record(model, run_more), more)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    cuts = TensorPlan(1)
    for axis in plan.axes:
        if isinstance(axis, Tensor) and axis.n > 1:
            cuts = find_cuts(shapes.one, axis.n, request.kept(model), request.also(model))
            lines += _tell_tensor(cuts, shapes, sizes, rows)
            cut = sum(sizes[name] for name in cuts.cuts if name in sizes)
            facts["tensor"] = {
                "cut_share": cut / max(sum(sizes.values()), 1),
                "bytes_per_step": _sent(cuts, shapes, rows),
                "modules": {use.map.weight: use.way for use in cuts.uses.values()},
                "whole": cuts.whole,
            }
    for axis in plan.axes:
        if isinstance(axis, Pipe) and axis.n > 1:
            told, facts["pipe"] = tell_pipe(axis, model, shapes, sizes, rows, cuts.values, run_on)
            lines += told
    return lines, facts


def _tell_tensor(plan: TensorPlan, shapes: Shapes, sizes: dict[str, int], rows: int) -> list[str]:
    total = sum(sizes.values())
    cut = sum(sizes[name] for name in plan.cuts if name in sizes)
    lines = [
        f"  tensor      {plan.n} slices: {cut / max(total, 1):.1%} of {format_count(total)} "
        f"parameters are cut; each rank sends {format_bytes(_sent(plan, shapes, rows))} a step"
    ]
    said = [*_tell_regions(plan), *_tell_alone(plan)]
    said += [
        Line("{} whole: " + _braced(reason), ((_plain(module),),))
        for module, reason in plan.whole.items()
    ]
    return lines + [f"    {text}" for text in merged(said)]


def _tell_regions(plan: TensorPlan) -> Iterator[Line]:
    uses = {use.map.weight: use for use in plan.uses.values()}
    for region in plan.regions:
        texts, names = [], []
        for weights, how in zip(region, ("columns", "rows"), strict=True):
            parts: dict[str, list[str]] = {}
            for weight in weights:
                count = len(uses[weight].cut.parts)
                suffix = f" ({count} parts)" if count > 1 else ""
                parts.setdefault(suffix, []).append(_plain(weight))
            found = [(suffix, each) for suffix, them in parts.items() for each in alike(them)]
            texts.append(", ".join("{}" + suffix for suffix, _ in found) + f" by {how}")
            names += [each for _, each in found]
        yield Line(", ".join(texts), tuple(names))


def _tell_alone(plan: TensorPlan) -> Iterator[Line]:
    """Maps in no region, each weight once: several maps may have one."""
    by_weight: dict[str, list[Use]] = {}
    for use in plan.uses.values():
        if use.way in HOW:
            by_weight.setdefault(use.map.weight, []).append(use)
    for weight, uses in by_weight.items():
        first = uses[0]
        ways = {use.way: use.map.call.module or "the model" for use in reversed(uses)}
        others = [(way, module) for way, module in ways.items() if way != first.way]
        text = "{} " + HOW[first.way]
        text += "".join(f", and in {module} {HOW[way]}" for way, module in others)
        reason = plan.reasons.get(weight.rpartition(".")[0])
        if reason is not None and set(ways) != {"vocabulary"}:
            text += f"; alone since {_braced(reason)}"
        yield Line(text, ((_plain(weight),),))


def _plain(weight: str) -> str:
    return weight.removesuffix(".weight")


def _braced(text: str) -> str:
    """Text in which braces stand for themselves."""
    return text.replace("{", "{{").replace("}", "}}")


def _sent(plan: TensorPlan, shapes: Shapes, rows: int) -> int:
    """Bytes that each rank sends in a step: 2 (n - 1) / n of what is summed, half of that of what
    is gathered. A cross entropy by parts gathers one number of each rank for each row."""
    summed, gathered = 0, 0
    entered: set[int] = set()
    learned = shapes.one.learned()
    for use in plan.uses.values():
        if use.way == "gathered":  # backward takes a piece, and sends nothing
            gathered += shapes.bytes(use.map.output, rows)
        elif use.way == "late":
            gathered += plan.n * shapes.bytes(use.map.output, rows) // use.cut.size
        elif use.way != "columns":
            summed += shapes.bytes(use.map.output, rows)
        if use.way in ("columns", "gathered", "late") and use.map.x in learned - entered:
            entered.add(use.map.x)
            summed += shapes.bytes(use.map.x, rows)
    for number, name in shapes.one.parameters.items():
        if name in plan.partial:
            summed += shapes.bytes(number, rows)
    return round((plan.n - 1) / plan.n * (2 * summed + gathered))
