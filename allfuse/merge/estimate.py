"""How long a merge will take, before any of it is done: an estimate, which reads no data."""

from __future__ import annotations

import math
import time

from allfuse.merge.outline import Outline, Task
from allfuse.rule.base import JointRule, SumRule

START_S = 2.1  # Python and torch, until the first block is read
READ_NS, WRITE_NS = 0.6, 3.0
TURN_NS, JOINT_NS = 4.5, 2.0
SUM_NS, JOIN_NS, GATHER_NS = 0.5, 2.5, 5.0
"""Of one thread, for each number: to read it from one model, and to round, write and check what
came out; to measure it in a turn of a sift, and of a rule of all models; to fuse it by a sum, by a
rule that measures all models, and by another. All where memory is copied at COPY_BYTES_PER_S."""
COPY_BYTES_PER_S = 10e9
SCALING = 0.75  # 2 threads do 1.7 times the work of one: 1.5 to 1.9 when measured
PROBE_BYTES, PROBES = 1 << 24, 5


def estimate_seconds(plan: Outline, threads: int) -> float:
    """About how many seconds so many threads, of all ranks, will take where models are in memory:
    the work that a rule is known to be, at the speed at which this machine copies memory."""
    work_s = sum(_cost_ns(task) for task in plan.tasks) * 1e-9
    return START_S + work_s * COPY_BYTES_PER_S / _copy_speed() / math.pow(threads, SCALING)


def _cost_ns(task: Task) -> float:
    count = task.target.count
    if not task.target.is_float:
        return count * (READ_NS + WRITE_NS)
    sifts = [sift for rule in task.rules if (sift := rule.sift(count)) is not None]
    turns = max((sift.turns for sift in sifts), default=0)
    joint, fuse_ns = 0, GATHER_NS
    if isinstance(task.rule, JointRule):
        joint, fuse_ns = task.rule.turns(count), JOIN_NS
    elif isinstance(task.rule, SumRule):
        fuse_ns = SUM_NS
    read_ns = (1 + turns + joint) * len(task.sources) * READ_NS
    each_ns = turns * TURN_NS + joint * JOINT_NS + fuse_ns
    return count * (read_ns + len(task.inputs) * each_ns + WRITE_NS)


def _copy_speed() -> float:
    """Bytes that one thread copies in a second, the best of a few."""
    source, target, best = bytearray(PROBE_BYTES), bytearray(PROBE_BYTES), float("inf")
    for _ in range(PROBES):
        begin = time.perf_counter()
        target[:] = source
        best = min(best, time.perf_counter() - begin)
    return PROBE_BYTES / best
