"""Weights averaged along the steps of a run, each rank what it has of them.

Nothing is sent, and no rank has more than twice what it trains: where ranks share a model each
averages its pieces. The average belongs to no plan: checkpoints hold it as they hold weights, so it
is cut anew where they are.

Under `site` an average is of the weights that all sites hold after a round, so that it is the same
on all, bit for bit: a moment that falls between two rounds counts at the next one. Where sites are
never equal, or a scheduler hands out the work, there are no such weights, and it is refused.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from allfuse.base.errors import CheckpointError, PlanError, UserError
from allfuse.base.torch_private import foreach_copy, foreach_lerp
from allfuse.plan import Plan, Site
from allfuse.sync.averaging import Averaging
from allfuse.training.calibrate import estimate_statistics, norms_of
from allfuse.training.measure import to_device
from allfuse.training.start import seed_all

if TYPE_CHECKING:
    from allfuse.training.session import Session
    from allfuse.training.state import State


class Averages:
    """The average of all models of a session: parameters, and buffers that a state dict names.

    In float32 or wider. Buffers of whole numbers are those of the last time.

    Attributes:
        updates: how often weights have counted. is_shown: the models hold the average now.
        figures: of its last validation, which was after `measured_step`; -1 where it has changed.
    """

    def __init__(self, rule: Averaging, state: State) -> None:
        self.rule, self.state = rule, state
        self.updates = 0
        self.is_shown = False
        self.figures: dict[str, float] = {}
        self.measured_step = -1
        self._is_due = self._is_complete = False
        self._names: list[tuple[str, str, int]] = []  # model, name, place below
        self._live: list[Tensor] = []
        self._values: list[Tensor] = []

    def __bool__(self) -> bool:
        """Whether there is something to show."""
        return self.updates > 0

    def after_step(self, steps: int, ends_epoch: bool, agreed: bool) -> bool:
        """Whether weights are to count now. `agreed` says that all sites hold the same."""
        self._is_due = self._is_due or self.rule.is_due(steps, ends_epoch)
        return self._is_due and agreed

    @torch.no_grad()
    def update(self) -> None:
        """The weights count."""
        if not self._live:
            self._take()
        pairs = [(v, t.detach()) for v, t in zip(self._values, self._live, strict=True)]
        moved = [(v, t.to(v.dtype)) for v, t in pairs if self.updates and _is_averaged(v)]
        if moved:
            values, ends = zip(*moved, strict=True)
            foreach_lerp(values, ends, self.rule.share(self.updates))
        for value, tensor in pairs:
            if not (self.updates and _is_averaged(value)):
                value.copy_(tensor)
        self.updates += 1
        self._is_due = self._is_complete = False

    def _take(self) -> None:
        """Find what this rank has of the models; the average has memory of its own."""
        places: dict[int, int] = {}
        for model, module in self.state.models.items():
            for name, tensor in module.state_dict(keep_vars=True).items():
                if not isinstance(tensor, Tensor) or name in self.state.elsewhere:
                    continue
                place = places.setdefault(id(tensor), len(self._live))
                if place == len(self._live):
                    self._live.append(tensor)
                self._names.append((model, name, place))
        for tensor in self._live:
            own = torch.promote_types(tensor.dtype, torch.float32)
            kind = own if _is_averaged(tensor) else tensor.dtype
            self._values.append(torch.empty_like(tensor, dtype=kind, requires_grad=False))

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        """For a moment the models hold the average.

        Raises:
            UserError: there is none yet.
        """
        if not self:
            raise UserError(
                f"{self.rule}: no step has counted yet; next: ask later, or an earlier start"
            )
        own = [tensor.detach().clone() for tensor in self._live]
        self._write(self._values)
        self.is_shown = True
        try:
            yield
        finally:
            self._write(own)
            self.is_shown = False

    @torch.no_grad()
    def _write(self, values: list[Tensor]) -> None:
        if values:
            foreach_copy([tensor.detach() for tensor in self._live], values)

    # Statistics of batches.

    @property
    def waits_for_statistics(self) -> bool:
        """Whether BatchNorm's statistics are to be taken anew, and were not since it changed."""
        if not self or self._is_complete or not self.rule.renews_statistics:
            return False
        return any(norms_of(module) for module in self.state.models.values())

    @torch.no_grad()
    def keep_statistics(self) -> None:
        """Take over the buffers of the models that are shown."""
        buffers = {id(b) for module in self.state.models.values() for b in module.buffers()}
        for value, tensor in zip(self._values, self._live, strict=True):
            if id(tensor) in buffers:
                value.copy_(tensor)
        self._is_complete, self.measured_step = True, -1

    # State.

    def capture(self) -> dict[str, Any]:
        models: dict[str, dict[str, Tensor]] = {}
        for model, name, place in self._names:
            models.setdefault(model, {})[name] = self._values[place]
        about = {"updates": self.updates, "due": self._is_due, "complete": self._is_complete}
        return {"kind": self.rule.name, **about, "models": models}

    @torch.no_grad()
    def restore(self, kept: Mapping[str, Any] | None) -> None:
        """Go on from a captured average; of another kind it begins anew.

        Raises:
            CheckpointError: something of it is missing.
        """
        if kept is None or kept["kind"] != self.rule.name:
            return
        self.updates, self._is_due = kept["updates"], kept["due"]
        self._is_complete = kept["complete"]
        if not self.updates:
            return
        if not self._live:
            self._take()
        for model, name, place in self._names:
            value = kept["models"].get(model, {}).get(name)
            if not isinstance(value, Tensor) or value.shape != self._values[place].shape:
                raise CheckpointError(
                    f"the checkpoint does not fit the job: it holds no average of {name}; allowed: "
                    "the model that the run was started with"
                )
            self._values[place].copy_(value)


def _is_averaged(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def make_averages(s: Session, rule: Averaging) -> Averages:
    """What `Session.average` does; see there."""
    if not isinstance(rule, Averaging):
        raise UserError(
            f"average({rule!r}): allowed: af.EMA(decay=0.999), or af.SWA(start=1000), for two"
        )
    if s.averages is not None:
        raise UserError(f"average({rule}): there is one already, {s.averages.rule}")
    if s.teller.began is not None:
        raise UserError(f"average({rule}): training has begun; next: ask for it before the loop")
    refuse_plan(s.plan, rule)
    return Averages(rule, s.state)


def refuse_plan(plan: Plan, rule: Averaging) -> None:
    """Refuse to average where no rank has weights that all agree on.

    Raises:
        PlanError: says with which plan it can be.
    """
    given, outer, site = f"average={rule} under {plan}", plan.outer, plan.axis("site")
    if outer is not None:
        why = "replicas are out of step, and none has the weights of every step"
        raise PlanError(given, why, f"data({plan.workers})")
    if not isinstance(site, Site) or site.n == 1:
        return
    mixes = site.topology is not None and not site.topology.exact
    if mixes or site.every == "end" or site.delay or site.fragments > 1:
        why = "an average is of weights that all sites hold after a round, and these never do"
        every = 20 if site.every == "end" else site.every
        plain = Site(site.n, every=every)
        raise PlanError(given, why, str(Plan(tuple(plain if a is site else a for a in plan.axes))))


def after_step(s: Session, ends_epoch: bool) -> None:
    """Have the weights count after a step that is over, where they are to."""
    averages, rounds = s.averages, s.rounds
    assert averages is not None
    if averages.after_step(s.steps, ends_epoch, not rounds.active or rounds.equal):
        s.keeper.settle()  # an average that is being saved
        averages.update()


@contextlib.contextmanager
def show(s: Session) -> Iterator[None]:
    """What `Session.averaged` does; see there."""
    s.course.close_learned_step()
    if s.averages is None:
        raise UserError(
            "averaged(): there is no average; next: s.average(af.EMA()) before the loop"
        )
    s.keeper.settle()  # weights that are being saved
    try:
        with s.averages.shown():
            s._note_weights()
            yield
    finally:
        s._note_weights()


def complete(s: Session) -> None:
    """Take BatchNorm's statistics anew where an average waits for them: one pass over the training
    data of the last loop, each rank its share. All ranks call it, after the last step."""
    averages, again = s.averages, s.loader_again
    if averages is None or again is None or not averages.waits_for_statistics:
        return
    if s.split.pipeline is not None:
        text = (
            "the average keeps the mean of BatchNorm's statistics: under pipe no rank runs the "
            "whole model, as taking them anew would need"
        )
        s.bus.emit("warning", text=text)
        return

    def work() -> None:
        with s.averaged():
            for model, forward in zip(s.models.values(), s.forwards, strict=True):
                loader = again()
                with contextlib.closing(loader), s.precision.autocast():
                    _estimate(s, model, loader, forward)
            averages.keep_statistics()

    s.survival.together("all", work)


def _estimate(s: Session, model: nn.Module, loader: Any, forward: Any) -> None:
    if s.place.world.has_process_groups:  # what dropout draws
        seed_all(s.device, s.settings.seed, s.steps, s.place.replica_index)

    def batches() -> Iterator[Any]:
        for portion in loader.epoch(0):
            for norm in s.stepper.norms:
                norm.weight_of_rows = float(portion.rows > 0)
            yield to_device(portion.batch, s.device)

    estimate_statistics(model, batches(), forward)
    site = s.place.site
    if site.size > 1:  # each has seen its part of the batches
        kept = [b for n in norms_of(model) for b in n.buffers() if b.is_floating_point()]
        for buffer in kept:
            site.all_reduce(buffer, "average statistics").wait()
            buffer /= site.size
