"""Gradients that leave for the servers while the backward pass still runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

from torch import Tensor

from allfuse.base.errors import UserError
from allfuse.link.base import Work
from allfuse.link.runner import Runner
from allfuse.training.learner import Learner

CHUNK_BYTES = 1_000_000

Push: TypeAlias = Callable[[Mapping[str, Tensor], float], None]
"""Takes gradients by name, and what they are to be multiplied by."""


class Outflow:
    """Hands gradients on in the order in which they become final, about a megabyte at a time.

    A thread of its own copies, encodes and sends them, beside the backward pass. That is for steps
    whose gradients nobody changes after backward: not where a worker clips (it needs the whole norm
    first), nor in a script's own loop between backward and step. There `rest` hands on all.

    Args:
        learner: of the only optimizer; its parameters stay what they are.
        push: is called from the thread.
    """

    def __init__(self, learner: Learner, push: Push) -> None:
        self._learner, self._push = learner, push
        self._parameters, self._names = list(learner.parameters), list(learner.names)
        self._runner = Runner("allfuse-outflow")
        self._works: list[Work] = []
        self._scale: float | None = None  # while open
        self._left: set[int] = set()  # indices that have left in this step
        self._chunk: list[int] = []
        self._bytes = 0
        learner.split.watch(self._parameters, self._final)

    def open(self, scale: float) -> None:
        """Before the last backward pass of a step: gradients that become final leave at once,
        multiplied by `scale`."""
        self._scale = scale

    def close(self) -> None:
        """The backward pass is over. Gradients may be multiplied in place from now on."""
        if self._scale is None:
            return
        self._send_chunk()
        scale, self._scale = self._scale, None
        if scale != 1.0:
            self._wait()

    def rest(self) -> None:
        """Hand on what has not left, as it is; afterwards nothing reads gradients any more."""
        self._scale = 1.0
        for index in reversed(range(len(self._parameters))):
            if index not in self._left:
                self._take(index)
        self._send_chunk()
        self.forget()

    def forget(self) -> None:
        """The step is done, or given up."""
        self._scale, self._chunk, self._bytes = None, [], 0
        self._wait()
        self._left.clear()

    def shut(self) -> None:
        """No more steps. Waits for nobody."""
        self._runner.close()

    def _final(self, index: int) -> None:
        if self._scale is None or self._learner.keeps_others:
            return
        if index in self._left:
            raise UserError(
                f"the gradient of {self._names[index]} became final twice in one step; allowed: "
                "one backward pass for each step; next: use torch.utils.checkpoint with "
                "use_reentrant=False"
            )
        self._left.add(index)
        self._take(index)

    def _take(self, index: int) -> None:
        self._chunk.append(index)
        self._bytes += self._parameters[index].nbytes
        if self._bytes >= CHUNK_BYTES:
            self._send_chunk()

    def _send_chunk(self) -> None:
        chunk, scale = self._chunk, self._scale
        self._chunk, self._bytes = [], 0
        assert scale is not None
        gradients = {self._names[index]: self._parameters[index].grad for index in chunk}
        found = {name: gradient for name, gradient in gradients.items() if gradient is not None}
        if found:
            self._works.append(self._runner.start(lambda: self._push(found, scale)))

    def _wait(self) -> None:
        works, self._works = self._works, []
        for work in works:
            work.wait()
