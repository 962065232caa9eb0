"""Says in words how a model is cut into stages."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import torch
from torch import nn

from allfuse.base.units import format_bytes, format_count
from allfuse.plan import Pipe
from allfuse.plan.schedule import count_microbatches
from allfuse.split.base import Run
from allfuse.split.pipe.choice import Trial, choose_stages, least_rows
from allfuse.split.pipe.cost import count_operations
from allfuse.split.shapes import Shapes


def tell_pipe(
    axis: Pipe,
    model: nn.Module,
    shapes: Shapes,
    sizes: Mapping[str, int],
    rows: int,
    inside: Collection[int],
    run_on: Callable[[int], Run] | None,
) -> tuple[list[str], dict[str, object]]:
    """Lines for people, and the same as facts.

    Args:
        sizes: of all parameters.
        rows: of the share of a batch that one replica has.
        inside: values that tensor(n) cuts.
        run_on: gives a forward pass over so many rows, by which parts are timed; None: they are
            not.

    Raises:
        PlanError: there are too few places to cut; names them.
    """
    schedule, n = axis.schedule, axis.n
    count = count_microbatches(rows, n, schedule, axis.microbatches, least_rows(model))
    bubble = schedule.bubble(n, count)
    trial = None if run_on is None else Trial(rows, run_on, torch.device("cpu"))
    choice = choose_stages(axis, model, shapes.one, inside=inside, trial=trial)
    stages = choice.stages
    derived = "" if axis.microbatches is not None else ", derived"
    lines = [
        f"  pipe        {len(stages)} stages, {count} microbatches{derived}: by the schedule "
        f"{schedule.name} ranks wait {bubble:.0%} of the time, where stages take as long"
    ]
    if not choice.seconds and choice.how:
        lines.append(f"    {len(stages)} stages{choice.how}")
    operations, found = count_operations(shapes.one), list[dict[str, object]]()
    for number, stage in enumerate(stages):
        first, last = stage.first, stage.last
        begin = 0 if first is None else first.call
        end = len(operations) if last is None else last.call
        share = sum(operations[begin:end]) / max(sum(operations), 1)
        held = sum(sizes[name] for name in stage.parameters)
        text = f"from {first.module}" if first else "from the batch"
        text += f" to before {last.module}" if last else " to the end"
        where = f" on rank {schedule.owner(number, n)}" if schedule.each > 1 else ""
        passed = 0 if last is None else shapes.bytes(last.value, rows)
        lines.append(
            f"    stage {number}{where}: {text}: {format_count(held)} parameters, {share:.0%} of "
            "the arithmetic"
            + (f", passes on {format_bytes(passed)} and gets as much back" if passed else "")
        )
        begins = first and first.module
        about: dict[str, object] = {
            "begins": begins,
            "parameters": held,
            "share": share,
            "bytes": passed,
        }
        if choice.seconds:
            about |= {"seconds": choice.seconds[number], "memory_bytes": choice.bytes[number]}
            lines.append(
                f"      timed here: {1e3 * choice.seconds[number]:.3g} ms for a microbatch; needs "
                f"{format_bytes(choice.bytes[number])} with gradients, two moments and the "
                "activations that it keeps"
            )
        found.append(about)
    facts = {"stages": found, "microbatches": count, "bubble": bubble}
    return lines, dict(facts)
