"""How long a merge will take, before any of it is done: an estimate, which reads no data."""

from __future__ import annotations

import time

from allfuse.merge.outline import Outline, Task
from allfuse.rule.base import JointRule, SumRule

START_S = 1.5  # Python and torch, until the first block is read
READ_NS, TURN_NS, SUM_NS, GATHER_NS, WRITE_NS = 0.6, 1.5, 0.4, 2.5, 2.0
"""Of one thread, for each number: to read it from one model; to measure it in a turn; to add it to
a sum, or to fuse it otherwise; to round, write and check what came out. Seen on a machine whose
memory is copied at COPY_BYTES_PER_S."""
COPY_BYTES_PER_S = 10e9
PROBE_BYTES, PROBES = 1 << 24, 5


def estimate_seconds(plan: Outline, threads: int) -> float:
    """About how many seconds so many threads, of all ranks, will take where models are in memory:
    the work that a rule is known to be, at the speed at which this machine copies memory."""
    work_s = sum(_cost_ns(task) for task in plan.tasks) * 1e-9
    return START_S + work_s * COPY_BYTES_PER_S / _copy_speed() / threads


def _cost_ns(task: Task) -> float:
    models, count = len(task.inputs), task.target.count
    if not task.target.is_float:
        return count * (READ_NS + WRITE_NS)
    sifts = [sift for rule in task.rules if (sift := rule.sift(count)) is not None]
    turns = max((sift.turns for sift in sifts), default=0)
    turns += task.rule.turns(count) if isinstance(task.rule, JointRule) else 0
    fuse_ns = SUM_NS if isinstance(task.rule, SumRule) else GATHER_NS
    each = (1 + turns) * len(task.sources) * READ_NS + turns * models * TURN_NS
    return count * (each + models * fuse_ns + WRITE_NS)


def _copy_speed() -> float:
    """Bytes that one thread copies in a second, the best of a few."""
    source, target, best = bytearray(PROBE_BYTES), bytearray(PROBE_BYTES), float("inf")
    for _ in range(PROBES):
        begin = time.perf_counter()
        target[:] = source
        best = min(best, time.perf_counter() - begin)
    return PROBE_BYTES / best
