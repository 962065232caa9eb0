"""Whether what was written is what should be there."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from allfuse.base.tensors import tensor_bytes
from allfuse.merge.blocks import Files
from allfuse.merge.outline import Task


def check_blocks(
    tasks: Sequence[Task],
    target: Files,
    written: Mapping[tuple[int, int], int],
    threads: int,
    told: Callable[[int], None] = lambda nbytes: None,
) -> list[tuple[int, int]]:
    """The blocks, by tensor and number, whose bytes in the files have not the crc they should.

    told: is called with 0 for each block that was looked at.
    """
    blocks = [(task, number, *cut) for task in tasks for number, cut in enumerate(task.blocks())]

    def is_right(task: Task, number: int, begin: int, count: int) -> bool:
        crc = zlib.crc32(tensor_bytes(target.read(task.target, begin, count)))
        told(0)
        return crc == written[task.number, number]

    with ThreadPoolExecutor(threads, "allfuse-check") as pool:
        right = list(pool.map(is_right, *zip(*blocks, strict=True))) if blocks else []
    return [
        (task.number, number)
        for (task, number, *_), good in zip(blocks, right, strict=True)
        if not good
    ]
