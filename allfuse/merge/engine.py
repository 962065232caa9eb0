"""Does all blocks of all tensors on all cores, holding few of them at a time."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from allfuse.base.heap import give_back, keep_freed
from allfuse.merge.blocks import Files
from allfuse.merge.course import Course
from allfuse.merge.journal import Journal
from allfuse.merge.outline import Task
from allfuse.merge.recipe import Recipe

Told = Callable[[int], None]
"""Is told the bytes of a block that was written; from any thread, one at a time."""


class Engine:
    """Threads that take the next block that can be done, earlier tensors first.

    A stage of a tensor begins when the one before has ended; meanwhile threads begin with the next
    tensor. So each holds one block of each model, whatever the size of the models.
    """

    def __init__(
        self,
        recipe: Recipe,
        tasks: Iterable[Task],
        sources: Files,
        target: Files,
        journal: Journal,
        told: Told,
    ) -> None:
        self.recipe, self.sources, self.target = recipe, sources, target
        self.journal, self.told = journal, told
        self._tasks: Iterator[Task] = iter(tasks)
        self._ready: deque[tuple[Course, int]] = deque()
        self._left: dict[int, int] = {}  # blocks of a tensor's present stage, by its number
        self._under_way = 0
        self._turn = threading.Condition()
        self._error: BaseException | None = None

    def run(self, threads: int) -> None:
        """Do all that the journal does not have.

        Raises:
            MergeError: a source cannot be read, or has numbers that are not finite. OSError: the
                result cannot be written.
        """
        before = torch.get_num_threads()
        torch.set_num_threads(1)  # each block in one thread, so that its bits do not depend on them
        keep_freed()
        try:
            with ThreadPoolExecutor(threads, "allfuse-merge") as pool:
                ends = [pool.submit(self._work) for _ in range(threads)]
                try:
                    for end in ends:
                        end.result()
                except BaseException as error:
                    self._fail(error)
                    raise
        finally:
            torch.set_num_threads(before)
            give_back()
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        while (found := self._next()) is not None:
            course, block = found
            try:
                result = course.do(block)
            except BaseException as error:
                self._fail(error)
                return
            self._end(course, block, result)

    def _fail(self, error: BaseException) -> None:
        with self._turn:
            self._error = self._error or error
            self._turn.notify_all()

    def _next(self) -> tuple[Course, int] | None:
        """A block that can be done; None at the end, or after an error."""
        with self._turn:
            while self._error is None:
                if not self._ready:
                    self._open()
                if self._ready:
                    self._under_way += 1
                    return self._ready.popleft()
                if not self._under_way:
                    return None
                self._turn.wait()
            return None

    def _open(self) -> None:
        """Begin with the next tensor that is not written whole."""
        for task in self._tasks:
            if self._queue(Course(task, self.recipe, self.sources, self.target)):
                return

    def _queue(self, course: Course) -> bool:
        """Make the blocks of the present stage ready; whether there are any. Turns need all blocks
        of a tensor of which any is missing, the last stage only those."""
        blocks, done = range(len(course.blocks)), self.journal.done
        missing = [block for block in blocks if (course.task.number, block) not in done]
        if not missing:
            return False
        chosen = missing if course.is_last else blocks
        self._left[course.task.number] = len(chosen)
        self._ready.extendleft((course, block) for block in reversed(chosen))
        return True

    def _end(self, course: Course, block: int, result: Any) -> None:
        task = course.task
        with self._turn:
            self._under_way -= 1
            self._left[task.number] -= 1
            course.take(block, result)
            if course.is_last:
                self.journal.add(task.number, block, result)
                item = task.target.bytes // max(task.target.count, 1)
                self.told(course.blocks[block][1] * item)
            elif not self._left[task.number]:
                course.close_stage()
                self._queue(course)
            self._turn.notify_all()
