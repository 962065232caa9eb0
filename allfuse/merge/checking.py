"""Whether what was written is what should be there."""

from __future__ import annotations

import os
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

from allfuse.base.tensors import tensor_bytes
from allfuse.merge.blocks import Files
from allfuse.merge.outline import Outline, Task


def check_blocks(
    plan: Outline, target: Files, written: Mapping[tuple[int, int], int]
) -> list[tuple[int, int]]:
    """The blocks, by tensor and number, whose bytes in the files have not the crc they should."""
    blocks = [(task, number) for task in plan.tasks for number in range(len(task.blocks()))]

    def is_right(task: Task, number: int) -> bool:
        values = target.read(task.target, *task.blocks()[number])
        return zlib.crc32(tensor_bytes(values)) == written[task.number, number]

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        right = list(pool.map(is_right, *zip(*blocks, strict=True))) if blocks else []
    return [
        (task.number, number)
        for (task, number), good in zip(blocks, right, strict=True)
        if not good
    ]
