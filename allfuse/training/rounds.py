"""Rounds of a `site` axis: sites step on their own and fuse their weights every H steps."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from allfuse.base.torch_private import foreach_copy
from allfuse.fusion import Fuser, Fusion
from allfuse.fusion.weights import WeightFusion
from allfuse.plan import Site

if TYPE_CHECKING:
    from allfuse.base.events import Bus
    from allfuse.training.place import Place


class Rounds:
    """Fuses weights and floating-point buffers over the sites. Optimizer state stays local.

    A site weighs as much as the samples that it has learned from since the last round. Over a
    topology that only mixes all sites weigh alike. Where one model is asked for (to measure, to
    export, at the end) the exact mean is taken, also under a codec that loses something. `settle`
    is called before weights change.
    """

    def __init__(self, place: Place, bus: Bus, settle: Callable[[], None]) -> None:
        self.place, self.bus, self._settle = place, bus, settle
        axis = place.plan.axis("site")
        self.every = axis.every if isinstance(axis, Site) and place.site.size > 1 else None
        self.samples = 0.0
        self.steps_since = 0
        self._is_mean = False  # the weights here, since the last step
        self._held: list[int] = []
        self._fusion = WeightFusion([], place.site_fuser)
        self._exact = self._fusion

    @property
    def active(self) -> bool:
        return self.place.site.size > 1

    @property
    def mixes(self) -> bool:
        return self.place.site_fuser.mixes

    @property
    def equal(self) -> bool:
        """Whether all sites hold the same weights now."""
        return self._is_mean or (self.steps_since == 0 and not self.mixes)

    def due(self, steps: int) -> bool:
        return isinstance(self.every, int) and steps % self.every == 0

    def after_step(self, samples: float, steps: int, models: Iterable[nn.Module]) -> None:
        """Count a step on so many samples; a round where one is due."""
        self.samples += samples
        self.steps_since += 1
        self._is_mean = False
        if isinstance(self.every, int) and self.due(steps):
            self._round(models, exact=False, number=steps // self.every - 1)

    def finish(self, models: Iterable[nn.Module]) -> None:
        """The last round, after which all sites are equal."""
        if self.active and not self.equal:
            self._round(models, exact=True)
            self._fusion.agree()

    def _round(self, models: Iterable[nn.Module], exact: bool, number: int = 0) -> None:
        begin = time.perf_counter()
        fusion = self._fuse(models, exact, number)
        self.samples, self.steps_since = 0.0, 0
        self._is_mean = exact or not self.mixes
        seconds = time.perf_counter() - begin
        self.bus.emit("round", axis="site", bytes=fusion.payload_bytes(number), seconds=seconds)

    def begin(self, models: Iterable[nn.Module]) -> None:
        """Before the first step: all sites hold the same weights."""
        if self.active:
            self._build(models)
            self._fusion.agree()

    def blocks(self, models: Iterable[nn.Module]) -> list[Tensor]:
        """What travels as one in a round."""
        if not self.active:
            return []
        self._build(models)
        return [bundle.read() for bundle in self._fusion.bundles]

    def _build(self, models: Iterable[nn.Module]) -> None:
        """Fusions of all weights that there are by now."""
        tensors = [t for m in models for t in (*m.parameters(), *m.buffers())]
        held = [id(tensor) for tensor in tensors]
        if held == self._held:
            return
        self._held = held
        fuser = self.place.site_fuser
        self._fusion = self._exact = WeightFusion(tensors, fuser)
        if self.mixes or not fuser.fusion.codec.lossless:
            self._exact = WeightFusion(tensors, Fuser(Fusion(), self.place.site))

    def _fuse(self, models: Iterable[nn.Module], exact: bool, number: int = 0) -> WeightFusion:
        """The exact fusion of the sites, or what the plan says of its round `number`."""
        self._settle()
        self._build(models)
        fusion = self._exact if exact else self._fusion
        fusion.fuse(self._weights(), number)
        return fusion

    def capture(self) -> dict[str, Any]:
        return {
            "samples": self.samples,
            "steps_since": self.steps_since,
            "fusion": self._fusion.capture(),
        }

    def restore(self, state: Mapping[str, Any], models: Iterable[nn.Module]) -> None:
        self.samples, self.steps_since = state["samples"], state["steps_since"]
        if self.active:
            self._build(models)
            if (kept := state.get("fusion")) is not None:
                self._fusion.restore(kept)

    def _weights(self) -> list[float]:
        """Each site's share of the samples since the last round: the sites tell each other."""
        site = self.place.site
        alike = [1.0 / site.size] * site.size
        if self.mixes:
            return alike
        slots = torch.zeros(site.size, dtype=torch.float64, device=self.place.device)
        slots[site.rank] = self.samples
        site.all_reduce(slots, "exchange samples of sites").wait()
        total = float(slots.sum())
        return [samples / total for samples in slots.tolist()] if total else alike

    @contextlib.contextmanager
    def fused_for_a_moment(self, models: Iterable[nn.Module]) -> Iterator[None]:
        """The exact mean of the sites' weights, to be measured or exported; then one's own."""
        if not self.active or self.equal:
            yield
            return
        models = list(models)
        held = [t for m in models for t in (*m.parameters(), *m.buffers()) if t.is_floating_point()]
        own = [tensor.detach().clone() for tensor in held]
        self._fuse(models, exact=True)
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
