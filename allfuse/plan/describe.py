"""A plan in plain words."""

from __future__ import annotations

from allfuse.base.errors import PlanError
from allfuse.plan.plan import Plan

PROMISES = {
    "exact": (
        "the numbers equal those of one process, to rounding",
        "trains on the same batches in one process and compares loss, gradient norm and every "
        "weight, step by step",
    ),
    "replayed": (
        "the numbers equal those of the same plan executed serially in one process, the recorded "
        "order of events included",
        "executes that and compares loss, gradient norm and every weight, step by step",
    ),
    "statistical": (
        "the loss at equal samples lies within a stated distance of plain training",
        "trains both over several seeds and compares the losses with their spread",
    ),
}
"""What each promise says, and how it is checked."""


def describe(plan: Plan) -> list[str]:
    """What a plan would do and promise, one sentence or two to a line.

    >>> for line in describe(Plan.parse("member(2) * data(1)")): print(line[:60])
    member(2) * data(1): 2 workers, ranks 0 to 1.
    member(2): 2 models of the same kind, each trained on all th
    data(1): one replica takes each batch; there are no other gr
    Batches: each batch is worked on whole; every member sees al
    Promise, once it runs: exact; the numbers equal those of one
    Not yet: this version cannot run member yet; the nearest pla
    """
    lines = [f"{plan}: {_ranks(plan)}."]
    lines += [f"{axis}: {axis.explain()}." for axis in plan.axes]
    if plan.outer is not None:
        lines.append(f"Beside them: {_roles(plan)}.")
    lines.append(f"Batches: {_batches(plan)}.")
    meaning, check = PROMISES[plan.promise]
    try:
        plan.validate_executable()
    except PlanError as error:
        lines.append(f"Promise, once it runs: {plan.promise}; {meaning}.")
        lines.append(f"Not yet: {error.why}; the nearest plan that it can is {error.nearest}.")
    else:
        lines.append(f"Promise: {plan.promise}; {meaning}. `allfuse verify` {check}.")
    return lines


def layout(plan: Plan, most: int = 16) -> list[str]:
    """Which rank has which coordinates: a head line and a line for each of the first ranks.

    >>> print("\\n".join(layout(Plan.parse("site(2) * data(2)"))))
    rank  site  data
       0     0     0
       1     0     1
       2     1     0
       3     1     1
    """
    names = ["rank", *(axis.name for axis in plan.axes)]
    widths = [max(len(name), len(str(min(plan.workers, most)))) for name in names]
    rows: list[list[object]] = [list(names)]
    rows += [[rank, *plan.coordinates(rank).values()] for rank in range(min(plan.workers, most))]
    lines = [
        "  ".join(f"{value!s:>{width}}" for value, width in zip(row, widths, strict=True))
        for row in rows
    ]
    if plan.workers > most:
        lines.append(f"and {plan.workers - most:,} more ranks, the last axis fastest")
    return lines


def _roles(plan: Plan) -> str:
    """What is started besides workers, and what passes between them."""
    outer = plan.outer
    assert outer is not None
    least, most = outer.min or outer.n, outer.max or outer.n
    come_and_go = f"; {least} to {most} replicas may come and go" if least < most else ""
    if plan.gossips:
        return (
            "a scheduler that hands out the work; each replica holds its own weights, asks another "
            "one for the mean of both, and trains on until the answer comes" + come_and_go
        )
    servers = "1 server" if plan.servers == 1 else f"{plan.servers} servers"
    what = "its gradient" if outer.name == "data" else "what its steps changed"
    step = (
        "and all of one batch make one step"
        if outer.sync.bound == 0
        else "and each push is a step of its own"
    )
    replicas = getattr(outer.topology, "replicas", 0)
    if replicas:
        servers += f" (each shard with {replicas} cop{'y' if replicas == 1 else 'ies'} on the next)"
    text = (
        f"{servers} that hold the weights and run the optimizer, and a scheduler that hands out "
        f"the work; each replica pushes {what} to all servers, {step}, then it pulls the weights"
    )
    return text + come_and_go


def _ranks(plan: Plan) -> str:
    if plan.workers == 1:
        return "1 worker, rank 0"
    return f"{plan.workers:,} workers, ranks 0 to {plan.workers - 1}"


def _batches(plan: Plan) -> str:
    """How a batch is divided, and by whom a share of it is worked on."""
    parts = ["each batch is worked on whole"]
    if plan.replicas > 1:
        of = "replica" if plan.axis("shard") is None else "shard of each replica"
        parts = [f"each batch is cut into {plan.replicas:,} even shares, one for each {of}"]
    if plan.axis("member") is not None:
        parts.append("every member sees all batches")
    shard = plan.axis("shard")
    ranks = plan.replica_size // (1 if shard is None else shard.n)
    if ranks > 1:
        of = "model" if shard is None else "shard"
        parts.append(f"the {ranks} ranks that hold one {of} together work on the same samples")
    return "; ".join(parts)
