"""Says in words how a model is cut into stages."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from allfuse.base.units import format_bytes, format_count
from allfuse.plan import Pipe
from allfuse.plan.schedule import derive_microbatches
from allfuse.split.pipe.boundary import cut_stages
from allfuse.split.pipe.cost import count_operations, weigh_calls
from allfuse.split.shapes import Shapes


def tell_pipe(
    axis: Pipe, shapes: Shapes, sizes: Mapping[str, int], rows: int, inside: Collection[int]
) -> tuple[list[str], dict[str, object]]:
    """Lines for people, and the same as facts.

    Args:
        sizes: of all parameters.
        rows: of the share of a batch that one replica has.
        inside: values that tensor(n) cuts.

    Raises:
        PlanError: there are too few places to cut; names them.
    """
    schedule, n = axis.schedule, axis.n
    count = derive_microbatches(rows, n, schedule)
    if axis.microbatches is not None:
        count = schedule.most(min(axis.microbatches, max(rows, 1)), n)
    bubble = schedule.bubble(n, count)
    costs = weigh_calls(shapes.one)
    stages = cut_stages(shapes.one, n, costs, each=schedule.each, inside=inside)
    derived = "" if axis.microbatches is not None else ", derived"
    lines = [
        f"  pipe        {len(stages)} stages, {count} microbatches{derived}: by the schedule "
        f"{schedule.name} ranks wait {bubble:.0%} of the time, where stages take as long"
    ]
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
        found.append({"begins": begins, "parameters": held, "share": share, "bytes": passed})
    facts = {"stages": found, "microbatches": count, "bubble": bubble}
    return lines, dict(facts)
