"""Forward passes of one module side by side, which stop before each layer until all are there.

So a layer's weight can be chosen by what comes into it in all passes, before any of them goes on.
Each pass has a thread, for a module's forward cannot be left and entered again; they compute one at
a time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from allfuse.base.errors import MergeError
from allfuse.merge.learned.layers import Layer

WAIT_S = 3600.0
"""How long a pass waits at a layer for the others. That one failed is known at once."""


class March:
    """Takes passes from layer to layer, until their end.

    Args:
        count: of the passes.
        choose: is called with what comes into a layer, in the order of the passes, when all are
            there; none computes meanwhile.

    At a layer that comes again passes go on at once.
    """

    def __init__(self, count: int, choose: Callable[[Layer, list[Tensor]], None]) -> None:
        self._choose = choose
        self._turn = threading.Lock()  # held by the pass that computes
        self._here = threading.local()
        self._at: list[tuple[Layer, Tensor] | None] = [None] * count
        self._done: set[str] = set()
        self._all = threading.Barrier(count, self._decide, WAIT_S)

    def run(self, passes: Sequence[Callable[[], object]]) -> None:
        """Take all passes to their end.

        Raises:
            MergeError: they do not come to the same layers in the same order.
        """
        with ThreadPoolExecutor(len(passes), "allfuse-march") as pool:
            ends = [pool.submit(self._walk, place, work) for place, work in enumerate(passes)]
            try:
                errors = [error for end in ends if (error := end.exception()) is not None]
            except BaseException:  # Ctrl-C
                self._all.abort()
                raise
        told = [each for each in errors if not isinstance(each, threading.BrokenBarrierError)]
        if told:
            raise told[0]
        if errors:
            raise MergeError(f"a batch waited {WAIT_S:.0f} s at a layer for the others")

    @torch.no_grad()
    def _walk(self, place: int, work: Callable[[], object]) -> None:
        self._here.place = place
        try:
            with self._turn:
                work()
            self._wait(None)
        except BaseException:
            self._all.abort()
            raise

    def meet(self, layer: Layer, given: Tensor) -> None:
        """A pass has come to a layer."""
        if layer.name in self._done:
            return
        self._turn.release()
        try:
            self._wait((layer, given))
        finally:
            self._turn.acquire()

    def _wait(self, at: tuple[Layer, Tensor] | None) -> None:
        self._at[self._here.place] = at
        self._all.wait()

    def _decide(self) -> None:
        """All are there."""
        places = {at[0].name if at else "its end" for at in self._at}
        if len(places) > 1:
            raise MergeError(
                "batches do not come to the layers of the model in one order: some are at "
                f"{' and others at '.join(sorted(places))}; next: regmean, which looks at each "
                "model by itself"
            )
        met = [at for at in self._at if at is not None]
        if met:
            layer = met[0][0]
            self._done.add(layer.name)
            self._choose(layer, [given for _, given in met])
