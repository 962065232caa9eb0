"""Rounds of a `site` axis: sites step on their own and fuse their weights every H steps."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from allfuse.base.errors import PlanError
from allfuse.base.tensors import map_nest
from allfuse.base.torch_private import foreach_copy
from allfuse.codec import Identity
from allfuse.fusion import Fuser, choose
from allfuse.fusion.flight import Flight
from allfuse.fusion.weights import WeightFusion, add_unsent
from allfuse.link.runner import Runner
from allfuse.plan import Site
from allfuse.sync.outer import Average
from allfuse.training.wishes import NOTHING

if TYPE_CHECKING:
    from allfuse.base.events import Bus
    from allfuse.link import Link, Work
    from allfuse.training.place import Place
    from allfuse.training.recovery import Handed
    from allfuse.training.survival import Survive

OWN_SHARE = 0.5
"""What a site keeps of its own weights where a fusion that took some steps comes in: alpha of
Douillard et al. 2025 (arXiv:2501.18512, algorithm 2), with the value that they use. Without a delay
it keeps nothing, so that a fusion without one is the same as ever."""


@dataclass
class Departure:
    """A round that was started: of which fragment, to land after which step.

    wish: the strongest wish to stop that any site had heard of, known once it was carried.
    """

    flight: Flight
    fragment: int
    due: int
    wish: int = NOTHING
    seconds: float = 0.0
    work: Work | None = None  # of what is carried in the background

    def wait(self) -> None:
        if self.work is not None:
            self.work.wait()


class Rounds:
    """Fuses weights and floating-point buffers over the sites. Optimizer state stays local.

    A round is started after its step and lands `delay` steps later, carried in the background over
    a link of its own. Each fragment has its own rounds, every H steps; the last one at the steps
    that H divides, the others before it at even distances. What all sites agreed on at the last
    round, and the momentum of the outer optimizer, are the same on all, bit for bit.

    A site weighs as much as the samples that it has learned from since the last round. Over a
    topology that only mixes all sites weigh alike. Where one model is asked for (to measure, to
    export, at the end) the exact mean is taken, also under a codec that loses something and without
    an outer step: one belongs to a whole round. Only `every=end` has its round there. `settle` is
    called before weights change.
    """

    def __init__(self, place: Place, bus: Bus, settle: Callable[[], None]) -> None:
        self.place, self.bus, self._settle = place, bus, settle
        self.active = place.site.size > 1  # also when later only one is left
        self.survive: Survive | None = None
        self.elsewhere: frozenset[str] = frozenset()  # what another rank of the replica has
        self.level: Callable[[], None] = lambda: None  # called after weights were fused
        self._take_axis()
        self.steps_since = 0
        self.quiet_until = 0  # up to this step no rounds start
        self.wish = NOTHING  # heard with what landed after the last step
        self.samples = [0.0] * self.axis.fragments  # since the last round of each
        self._is_mean = False  # the weights here, since the last step
        self._held: list[int] = []
        self._fusion = WeightFusion([], place.site_fuser)
        self._exact = self._exact_fuser()
        self._runner = Runner(f"allfuse-rounds-{place.rank}")
        self._departed: list[Departure] = []
        self._last: tuple[Flight, int | None] | None = None  # that was carried: for `outcome`
        self._undone: dict[str, Any] | None = None  # what codecs kept before one under way

    def _take_axis(self) -> None:
        axis = self.place.plan.axis("site")
        self.axis = axis if isinstance(axis, Site) and self.place.site.size > 1 else Site(1)

    def _exact_fuser(self) -> Fuser:
        """Fuses as the plan says, but exactly and while the caller waits."""
        fuser, axis = self.place.site_fuser, self.axis
        if not self.mixes and fuser.fusion.codec.lossless and not axis.delay:
            return fuser
        fusion, _ = choose(axis.rule, None, axis.sync, Identity(), axis.n)
        return Fuser(fusion, self.place.site)

    def close(self) -> None:
        """Waits for nobody."""
        self._runner.close()
        self._exact.close()

    @property
    def mixes(self) -> bool:
        return self.place.site_fuser.mixes

    @property
    def equal(self) -> bool:
        """Whether all sites hold the same weights now."""
        return self._is_mean or (self.steps_since == 0 and not self.mixes)

    def due(self, steps: int) -> bool:
        """Whether all sites meet after this step, and wait for each other."""
        every = self.axis.every
        return isinstance(every, int) and steps % every == 0 and not self.axis.delay

    def starting(self, steps: int) -> list[tuple[int, int]]:
        """The fragments whose rounds start after this step, and the numbers of these rounds."""
        every, fragments = self.axis.every, self.axis.fragments
        if not isinstance(every, int):
            return []
        since = [steps - every * (number + 1) // fragments for number in range(fragments)]
        return [(n, own // every) for n, own in enumerate(since) if own >= 0 and own % every == 0]

    def after_step(
        self, samples: float, steps: int, models: Iterable[nn.Module], wish: int = NOTHING
    ) -> None:
        """Count a step on so many samples; start rounds, and land those that are due.

        `wish` is what this site has heard by now, and tells with a round in the background.
        """
        self.samples = [own + samples for own in self.samples]
        self.steps_since += 1
        self._is_mean, self.wish = False, NOTHING
        for fragment, number in self.starting(steps) if steps > self.quiet_until else ():
            self._start(fragment, number, steps, models, wish)
        while self._departed and self._departed[0].due <= steps:
            self._land()

    def _start(
        self, fragment: int, number: int, steps: int, models: Iterable[nn.Module], wish: int
    ) -> None:
        begin = time.perf_counter()
        self._settle()
        self._build(models)
        if self.axis.delay:
            departure = self._depart(fragment, number, steps, wish)
        else:
            carried = self._carry_or_survive(
                lambda: self._fusion.read(fragment, number), self.samples[fragment], wish, fragment
            )
            if carried is None:
                return
            departure = Departure(carried[0], fragment, steps, wish=carried[1])
        self.samples[fragment] = 0.0
        self._departed.append(departure)
        departure.seconds = time.perf_counter() - begin

    def _depart(self, fragment: int, number: int, steps: int, wish: int) -> Departure:
        """Start a round in the background."""
        flight = self._fusion.read(fragment, number, late=True)
        departure = Departure(flight, fragment, steps + self.axis.delay)
        samples = self.samples[fragment]

        def carry() -> None:
            weights, departure.wish = self._tell(self._way, samples, wish)
            flight.carry(weights)

        departure.work = self._runner.start(carry)
        return departure

    def _carry(
        self, read: Callable[[], Flight], samples: float, wish: int, fragment: int | None = None
    ) -> tuple[Flight, int]:
        """A round of all sites at once, carried, and the strongest wish of any."""
        survives = self.survive is not None
        lossy = not self.place.site_fuser.fusion.codec.lossless
        self._undone = map_nest(_copied, self._fusion.capture()) if survives and lossy else None
        flight = read()
        weights, heard = self._tell(self.place.site, samples, wish)
        flight.carry(weights)
        self._last = (flight, fragment) if survives else None
        return flight, heard

    def _carry_or_survive(
        self, read: Callable[[], Flight], samples: float, wish: int, fragment: int | None = None
    ) -> tuple[Flight, int] | None:
        """The same, by those that are left where some are lost; None where nothing was fused."""
        if self.survive is None:
            return self._carry(read, samples, wish, fragment)

        def hear(handed: Handed) -> tuple[Flight, int]:
            flight = self._fusion.revive(fragment, handed.state["values"], {})
            assert flight is not None
            return flight, int(handed.result)

        return self.survive(
            lambda: self._carry(read, samples, wish, fragment),
            finish=lambda _: self.keep_sent(),
            tell=lambda made: made[1],
            hear=hear,
            mixes=self.mixes and fragment is not None,
        )

    def keep_sent(self) -> None:
        """A round came to its end, here or elsewhere: what it did to what codecs keep, stays."""
        self._undone = None

    def _land(self) -> None:
        """Take in the oldest round under way."""
        begin = time.perf_counter()
        departure = self._departed.pop(0)
        departure.wait()
        self._settle()
        departure.flight.land(self.axis.outer, OWN_SHARE if self.axis.delay else 0.0)
        self.level()
        self.wish = max(self.wish, departure.wish)
        if self.axis.fragments == 1 and not self.axis.delay:
            self.steps_since = 0
        departure.seconds += time.perf_counter() - begin
        self._tell_round(departure.flight, departure.seconds)

    def _tell_round(self, flight: Flight, seconds: float) -> None:
        self.bus.emit("round", axis="site", bytes=flight.payload_bytes, seconds=seconds)

    def finish(self, models: Iterable[nn.Module]) -> None:
        """The last round, after which all sites are equal. What is under way lands at once."""
        if not self.active or self.equal:
            return
        begin = time.perf_counter()
        while self._departed:
            self._land()
        self._settle()
        self._build(models)
        carried = self._carry_or_survive(
            lambda: self._fusion.read(exact=self._exact), max(self.samples), NOTHING
        )
        if carried is None:  # one is left, and it holds what it holds
            return
        flight = carried[0]
        self._land_exactly(flight, keep=True)
        if self.axis.every != "end":
            self._fusion.agree()
        self.samples, self.steps_since, self._is_mean = [0.0] * self.axis.fragments, 0, True
        self._tell_round(flight, time.perf_counter() - begin)

    def _fuse_exactly(self, models: Iterable[nn.Module]) -> None:
        """The exact mean of what the sites hold by now, or what their rule makes of it."""
        self._settle()
        self._build(models)
        flight, _ = self._carry(
            lambda: self._fusion.read(exact=self._exact), max(self.samples), NOTHING
        )
        self.keep_sent()
        self._land_exactly(flight, keep=False)

    def _land_exactly(self, flight: Flight, keep: bool) -> None:
        steps = self.axis.every == "end"
        flight.land(self.axis.outer if steps else Average(), keep=keep and steps)
        self.level()

    # After a loss.

    def outcome(self) -> dict[str, Any]:
        """What the last round came to, for a site that has missed its end."""
        return {} if self._last is None else {"values": self._last[0].values()}

    def meet_peers(self, quiet_until: int) -> None:
        """Fuse with those that are left. A round that was not carried to its end begins again, or
        is left out: of what only mixes up to the step that the first of all sites has done."""
        self.quiet_until = quiet_until if self.mixes else 0
        kept = self._undone or self._fusion.capture()
        named, self._undone = self._fusion.named, None
        self._exact.close()
        axis = self.place.plan.axis("site")
        self.axis = axis if isinstance(axis, Site) else self.axis
        self._fusion = self._make(named, self.axis.fragments)
        if kept is not None:
            self._fusion.restore(kept)
        self._exact = self._exact_fuser()

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
        """Fusions of all weights that there are by now; what is kept of those before stays."""
        named = self._named(models)
        held = [id(tensor) for tensor in named.values()]
        if held == self._held:
            return
        while self._departed:
            self._land()
        kept = self._fusion.capture()
        self._held, self._fusion = held, self._make(named, self.axis.fragments)
        if kept is not None:
            self._fusion.restore(kept)

    def _named(self, models: Iterable[nn.Module]) -> dict[str, Tensor]:
        found = named_tensors(models)
        return {name: value for name, value in found.items() if name not in self.elsewhere}

    def _make(self, named: Mapping[str, Tensor], fragments: int) -> WeightFusion:
        fuser, outer, tensors = self.place.site_fuser, self.axis.outer, list(named.values())
        fusion = WeightFusion(tensors, fuser, names=[*named], outer=outer, fragments=fragments)
        if not all(fusion.fragments) and fusion.tensors:
            count = len(fusion.tensors)
            raise PlanError(
                str(self.axis),
                f"fragments are of whole tensors, and there are {count}",
                f"site({self.axis.n}, every={self.axis.every}, fragments={count})",
            )
        return fusion

    def capture(self) -> dict[str, Any]:
        """What to go on from. Waits until what is under way is carried: that is kept as it lands,
        and codecs have kept by then what they lost."""
        for departure in self._departed:
            departure.wait()
        return {
            "samples": list(self.samples),
            "steps_since": self.steps_since,
            "equal": self.equal,
            "fusion": self._fusion.capture(),
            "pace": [self.axis.every, self.axis.fragments, self.axis.delay],
            "departed": [
                {
                    "fragment": departure.fragment,
                    "due": departure.due,
                    "values": departure.flight.values(),
                    "unsent": departure.flight.unsent(),
                }
                for departure in self._departed
            ],
        }

    def restore(self, state: Mapping[str, Any], models: Iterable[nn.Module]) -> None:
        """Go on from a state; at another pace what was under way lands at once."""
        fragments, samples = self.axis.fragments, state["samples"]
        same = len(samples) == fragments
        self.samples = list(samples) if same else [max(samples)] * fragments
        self.steps_since = state["steps_since"]
        self._departed.clear()
        if state["fusion"] is not None and self.place.site_fuser.fusion.codec.lossless:
            add_unsent(self._named(models), state["fusion"], self.place.site.size)
        if not self.active:
            return
        self._build(models)
        own_pace = [self.axis.every, fragments, self.axis.delay]
        kept, departed = state["fusion"], state["departed"]
        if state["pace"] == own_pace:
            self._revive(self._fusion, kept, departed)
        elif departed:
            before = self._make(self._fusion.named, state["pace"][1])
            self._revive(before, kept, departed)
            while self._departed:
                self._departed.pop(0).flight.land(self.axis.outer, OWN_SHARE)
            kept = before.capture()
        if kept is not None:
            self._fusion.restore(kept)
        if state["equal"] and not self._fusion.has_agreed:
            self._fusion.agree()

    def _revive(
        self, fusion: WeightFusion, kept: Mapping[str, Any] | None, departed: list[dict[str, Any]]
    ) -> None:
        if kept is not None:
            fusion.restore(kept)
        for each in departed:
            flight = fusion.revive(each["fragment"], each["values"], each["unsent"])
            if flight is not None:
                self._departed.append(Departure(flight, each["fragment"], each["due"]))

    @property
    def _way(self) -> Link:
        """How sites tell each other what comes with a round."""
        return self.place.site_fuser.link if self.axis.delay else self.place.site

    def _tell(self, way: Link, samples: float, wish: int = NOTHING) -> tuple[list[float], int]:
        """Each site's share of all samples, and the strongest wish of any."""
        site = self.place.site
        alike = [1.0 / site.size] * site.size
        if self.mixes:
            return alike, NOTHING
        slots = torch.zeros(2, site.size, dtype=torch.float64, device=self.place.device)
        slots[0, site.rank], slots[1, site.rank] = samples, wish
        way.all_reduce(slots, "exchange samples of sites").wait()
        told, wishes = slots.tolist()
        total = sum(told)
        return [own / total for own in told] if total else alike, int(max(wishes))

    @contextlib.contextmanager
    def fused_for_a_moment(self, models: Iterable[nn.Module]) -> Iterator[None]:
        """What the sites would end with now, to be measured or exported; then one's own weights."""
        if not self.active or self.equal:
            yield
            return
        models = list(models)
        held = [t for t in self._named(models).values() if t.is_floating_point()]
        own = [tensor.detach().clone() for tensor in held]
        try:
            for departure in self._departed:
                departure.wait()
                departure.flight.land(self.axis.outer, OWN_SHARE, keep=False)
            self._fuse_exactly(models)
            yield
        finally:
            with torch.no_grad():
                foreach_copy(held, own)

    def agree(self, wish: int) -> int:
        """The strongest wish to stop of any replica; called where all sites meet."""
        link = self.place.everyone
        slots = torch.zeros(link.size, device=self.place.device)
        slots[link.rank] = wish
        link.all_reduce(slots, "agree whether to stop").wait()
        return int(slots.max())


def named_tensors(models: Iterable[nn.Module]) -> dict[str, Tensor]:
    """Parameters and buffers of some models, those of the second one and on with its number."""
    named: dict[str, Tensor] = {}
    for number, model in enumerate(models):
        prefix = f"{number}." if number else ""
        held = (*model.named_parameters(), *model.named_buffers())
        named |= {prefix + name: tensor for name, tensor in held}
    return named


def _copied(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) else leaf
