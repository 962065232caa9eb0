"""Rounds of a `site` axis: sites step on their own and fuse their weights every H steps."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import nn

from allfuse.base.torch_private import foreach_copy
from allfuse.fusion.weights import WeightFusion
from allfuse.plan import Site

if TYPE_CHECKING:
    from allfuse.base.events import Bus
    from allfuse.training.place import Place


class Rounds:
    """Fuses weights and floating-point buffers over the sites. Optimizer state stays local.

    A site weighs as much as the samples that it has learned from since the last round. `settle` is
    called before weights change.
    """

    def __init__(self, place: Place, bus: Bus, settle: Callable[[], None]) -> None:
        self.place, self.bus, self._settle = place, bus, settle
        axis = place.plan.axis("site")
        self.every = axis.every if isinstance(axis, Site) and place.site.size > 1 else None
        self.samples = 0.0
        self.steps_since = 0
        self._fusion: WeightFusion | None = None
        self._held: list[int] = []

    @property
    def active(self) -> bool:
        return self.place.site.size > 1

    def due(self, steps: int) -> bool:
        return isinstance(self.every, int) and steps % self.every == 0

    def after_step(self, samples: float, steps: int, models: Iterable[nn.Module]) -> None:
        """Count a step on so many samples; a round where one is due."""
        self.samples += samples
        self.steps_since += 1
        if self.due(steps):
            self.fuse(models)

    def fuse(self, models: Iterable[nn.Module]) -> None:
        """One round: exchange the samples of each site, then the weighted mean, in place."""
        begin = time.perf_counter()
        fusion = self._fuse_by(self.samples, models)
        self.samples, self.steps_since = 0.0, 0
        seconds = time.perf_counter() - begin
        self.bus.emit("round", axis="site", bytes=fusion.payload_bytes, seconds=seconds)

    def _fuse_by(self, samples: float, models: Iterable[nn.Module]) -> WeightFusion:
        self._settle()
        tensors = [t for m in models for t in (*m.parameters(), *m.buffers())]
        held = [id(tensor) for tensor in tensors]
        if self._fusion is None or held != self._held:  # a model was added
            self._fusion = WeightFusion(tensors, self.place.site_fusion, self.place.site)
            self._held = held
        site = self.place.site
        slots = torch.zeros(site.size, dtype=torch.float64, device=self.place.device)
        slots[site.rank] = samples
        site.all_reduce(slots, "exchange samples of sites").wait()
        total = float(slots.sum())
        weight = samples / total if total else 1.0 / site.size
        self._fusion.fuse(weight, 1.0)
        return self._fusion

    @contextlib.contextmanager
    def fused_for_a_moment(self, models: Iterable[nn.Module]) -> Iterator[None]:
        """The weights that a round would give now, to be measured or exported; then one's own."""
        if not self.active or self.steps_since == 0:
            yield
            return
        models = list(models)
        held = [t for m in models for t in (*m.parameters(), *m.buffers()) if t.is_floating_point()]
        own = [tensor.detach().clone() for tensor in held]
        self._fuse_by(self.samples, models)
        try:
            yield
        finally:
            with torch.no_grad():
                foreach_copy(held, own)

    def agree(self, wish: int) -> int:
        """The strongest wish to stop of any replica; called where all sites meet."""
        slots = torch.zeros(self.place.replicas.size, device=self.place.device)
        slots[self.place.replicas.rank] = wish
        self.place.replicas.all_reduce(slots, "agree whether to stop").wait()
        return int(slots.max())
