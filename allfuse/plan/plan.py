"""A plan: the product of axes that says how a job is spread over workers."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ParamSpec

from allfuse.base.choice import Choice, build
from allfuse.base.errors import PlanError
from allfuse.plan.axes import (
    AXES,
    MAX_SIZE,
    Axis,
    Data,
    Member,
    Pipe,
    Promise,
    Shard,
    Site,
    Tensor,
)
from allfuse.plan.nest import read_nest, write_nest
from allfuse.plan.option import make
from allfuse.plan.parse import Call, clip, read_product
from allfuse.rule import Mean
from allfuse.sync import Bsp

WEAKEST_FIRST: tuple[Promise, ...] = ("statistical", "replayed", "exact")


@dataclass(frozen=True, repr=False)
class Plan:
    """Axes, outermost first. Ranks count row by row: the last axis varies fastest.

    Three forms say the same: text, Python and YAML. `str` gives the text and `repr` the Python
    form, which differ by the quotes around names only.

    >>> plan = Plan.parse("site(2, every=50) * data(3)")
    >>> plan == site(2, every=50) * data(3) == Plan.from_nest(plan.to_nest())
    True
    >>> plan.workers, plan.coordinates(4), plan.peers(4, "data"), plan.promise
    (6, {'site': 1, 'data': 1}, (3, 4, 5), 'replayed')

    Raises:
        PlanError: an axis stands twice, or not in its order.
    """

    axes: tuple[Axis, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "axes", tuple(self.axes))
        for axis in self.axes:
            if not isinstance(axis, Axis):
                raise PlanError(clip(repr(axis)), "is not an axis", allowed=", ".join(AXES))
        if not self.axes:
            raise PlanError("a plan without axes", "a plan names at least one", "data(1)")
        names = [axis.name for axis in self.axes]
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            why = f"the axis {twice[0]} stands twice"
            raise PlanError(clip(_join(self.axes)), why, _join(_in_order(_merge(self.axes))))
        ordered = _in_order(self.axes)
        if ordered != self.axes:
            why = "axes stand in the order member, site, data, then those that split one model"
            raise PlanError(_join(self.axes), why, _join(ordered))
        self._refuse_nesting()

    def _refuse_nesting(self) -> None:
        """Groups are in step inside, and may be out of step between each other."""
        shared = [axis for axis in self.axes if isinstance(axis, Data | Site)]
        for inner in shared[1:]:
            if isinstance(inner, Data) and inner.balance != "even" and shared[0].has_roles:
                even: dict[Axis, Axis] = {inner: replace(inner, balance="even")}
                why = (
                    "a scheduler hands out the work in equal parts, and what is handed out is cut "
                    "evenly; balance=speed is for replicas in step, without servers"
                )
                nearest = [even.get(axis, axis) for axis in self.axes]
                raise PlanError(_join(self.axes), why, _join(nearest))
            if inner.has_roles:
                calm: Axis = replace(inner, sync=Bsp(), topology=None, min=None, max=None)
                first: Axis = replace(shared[0], sync=inner.sync, topology=inner.topology)
                swapped: dict[Axis, Axis] = {inner: calm, shared[0]: first}
                nearest = [swapped.get(axis, axis) for axis in self.axes]
                why = (
                    f"{inner.name} stands inside {shared[0].name}, and only the outermost axis can "
                    "have servers and be out of step"
                )
                raise PlanError(_join(self.axes), why, _join(nearest))

    @classmethod
    def parse(cls, text: str) -> Plan:
        """The plan that a text says. The text is read, never evaluated.

        Raises:
            PlanError: it says none.
        """
        return cls(_make_axes(read_product(text)))

    @classmethod
    def from_nest(cls, nest: object) -> Plan:
        """The plan that plain lists and dicts say, as YAML gives them.

        Raises:
            PlanError: they say none.
        """
        return cls(_make_axes(read_nest(nest)))

    def to_nest(self) -> list[object]:
        """Plain lists, dicts, text and numbers: the YAML form."""
        plain = [not axis.arguments()[1] for axis in self.axes]  # nothing to say but the size
        return [
            {axis.name: axis.n} if short else write_nest(axis)
            for axis, short in zip(self.axes, plain, strict=True)
        ]

    def __mul__(self, other: Plan | Axis) -> Plan:
        if isinstance(other, Axis):
            other = Plan((other,))
        if not isinstance(other, Plan):
            return NotImplemented
        return Plan(self.axes + other.axes)

    def __str__(self) -> str:
        return _join(self.axes)

    def __repr__(self) -> str:
        return " * ".join(_python_form(axis) for axis in self.axes)

    @property
    def workers(self) -> int:
        """Ranks of the plan: the product of its sizes."""
        return math.prod(axis.n for axis in self.axes)

    @property
    def replicas(self) -> int:
        """Shares that each batch is cut into: the product of the sizes of `data`, `site` and
        `shard`."""
        return math.prod(axis.n for axis in self.axes if axis.divides_batch)

    @property
    def promise(self) -> Promise:
        """What the numbers equal: the weakest promise of the axes.

        "exact": one process, to rounding. "replayed": the same plan executed serially in one
        process. "statistical": a stated loss at equal samples.
        """
        return min((axis.promise for axis in self.axes), key=WEAKEST_FIRST.index)

    @property
    def outer(self) -> Data | Site | None:
        """The axis that a scheduler and servers run, if any: its replicas may come and go."""
        shared = (axis for axis in self.axes if isinstance(axis, Data | Site))
        return next((axis for axis in shared if axis.has_roles), None)

    @property
    def servers(self) -> int:
        """Server processes beside the workers: those that are named, else one for each replica of
        `outer`; 0 without one, and where its replicas gossip: they hold the weights themselves."""
        if self.outer is None or self.gossips:
            return 0
        return getattr(self.outer.topology, "servers", None) or self.outer.n

    @property
    def gossips(self) -> bool:
        """Whether the replicas of `outer` mix their weights in pairs, each when it is ready."""
        topology = None if self.outer is None else self.outer.topology
        return topology is not None and not topology.exact

    @property
    def inner(self) -> Plan:
        """The plan of one replica of `outer`: what is in step. The plan itself without one."""
        inner = tuple(axis for axis in self.axes if axis is not self.outer)
        return Plan(inner or (Data(1),))

    def axis(self, name: str) -> Axis | None:
        """The axis of that name, None where the plan has none."""
        if name not in AXES:
            raise ValueError(f"there is no axis {name!r}; there are {', '.join(AXES)}")
        return next((axis for axis in self.axes if axis.name == name), None)

    def coordinates(self, rank: int) -> dict[str, int]:
        """Where a rank stands on each axis, outermost first."""
        if not 0 <= rank < self.workers:
            raise ValueError(f"rank {rank} is not one of the {self.workers} ranks of {self}")
        found = {}
        for axis in reversed(self.axes):
            rank, found[axis.name] = divmod(rank, axis.n)
        return {axis.name: found[axis.name] for axis in self.axes}

    def peers(self, rank: int, name: str) -> tuple[int, ...]:
        """Ranks that stand where this one stands on all axes but one, itself included, in order.

        On an axis that the plan has not, a rank is its own only peer.
        """
        axis = self.axis(name)
        here = self.coordinates(rank)
        if axis is None:
            return (rank,)
        stride = math.prod(inner.n for inner in self.axes[self.axes.index(axis) + 1 :])
        first = rank - here[name] * stride
        return tuple(first + index * stride for index in range(axis.n))

    @property
    def replica_size(self) -> int:
        """Ranks that hold one copy of the model together."""
        return math.prod(axis.n for axis in self.axes if not axis.replicates)

    def replica(self, rank: int) -> tuple[int, ...]:
        """Ranks that hold one copy of the model together, this one included, in order."""
        self.coordinates(rank)  # checks the rank
        ranks = self.replica_size
        first = rank - rank % ranks  # replica axes stand outside, so a replica's ranks are a run
        return tuple(range(first, first + ranks))

    def replica_index(self, rank: int) -> int:
        """Which share of each batch a rank works on, from 0 to `replicas` - 1."""
        here, index = self.coordinates(rank), 0
        for axis in self.axes:
            if axis.divides_batch:
                index = index * axis.n + here[axis.name]
        return index

    def validate_executable(self) -> None:
        """Refuse what the language can say and this version cannot run yet.

        Raises:
            PlanError: an axis has no execution yet.
        """
        missing = [axis for axis in self.axes if not axis.executable]
        if not missing:
            self._refuse_beside_splits()
            return
        names = ", ".join(axis.name for axis in missing)
        kept = [axis for axis in self.axes if axis.executable]
        size = math.prod(axis.n for axis in missing)
        nearest = _in_order(_merge([*kept, Data(min(size, MAX_SIZE))]))
        raise PlanError(str(self), f"this version cannot run {names} yet", _join(nearest))

    def _refuse_beside_splits(self) -> None:
        """What holds or measures whole models does not run yet where ranks share one."""
        if self.replica_size == 1:
            return
        data = self.axis("data")
        if isinstance(data, Data) and data.balance != "even":
            even = replace(data, balance="even")
            nearest = [even if axis is data else axis for axis in self.axes]
            why = "balance=speed measures single ranks in this version, and several share a model"
            raise PlanError(str(self), why, _join(nearest))
        site = self.axis("site")
        cut = [axis.name for axis in self.axes if isinstance(axis, Tensor | Shard) and axis.n > 1]
        if isinstance(site, Site) and site.rule.of_tensors and cut:
            plain = replace(site, rule=Mean(), topology=None)
            nearest = [plain if axis is site else axis for axis in self.axes]
            why = f"{site.rule} measures whole tensors, and under {cut[0]} ranks have parts of them"
            raise PlanError(str(self), why, _join(nearest))


PlanLike = Plan | Axis | str | Sequence[object] | Mapping[str, object]


def as_plan(value: PlanLike) -> Plan:
    """The plan in any of its forms: a plan, an axis, text, or the lists and dicts of YAML.

    Raises:
        PlanError: it is none.
    """
    if isinstance(value, Plan):
        return value
    if isinstance(value, Axis):
        return Plan((value,))
    if isinstance(value, str):
        return Plan.parse(value)
    if isinstance(value, list | tuple | Mapping):
        return Plan.from_nest(value)
    raise PlanError(clip(repr(value)), "is not a plan in any of its forms", "data(1)")


def check_workers(plan: Plan, workers: int) -> None:
    """Refuse to start a plan with another number of workers than it is for.

    Raises:
        PlanError: the numbers differ; the nearest plan has another `data` axis, or only that.
    """
    if plan.workers == workers:
        return
    others = tuple(axis for axis in plan.axes if not isinstance(axis, Data))
    size, rest = divmod(workers, math.prod(axis.n for axis in others))
    nearest = f"data({min(max(workers, 1), MAX_SIZE)})"
    if rest == 0 and 1 <= size <= MAX_SIZE:
        data_axis = plan.axis("data") or Data(1)
        kept = (*others, replace(data_axis, n=size)) if size > 1 or not others else others
        nearest = _join(_in_order(kept))
    raise PlanError(str(plan), f"needs {plan.workers} workers, got {workers}", nearest)


P = ParamSpec("P")


def _function(name: str, axis: Callable[P, Axis]) -> Callable[P, Plan]:
    """The Python form of an axis: a function of its arguments that gives the plan of it alone."""

    @functools.wraps(axis, assigned=("__doc__",), updated=())
    def plan_of(*args: P.args, **kwargs: P.kwargs) -> Plan:
        # through the table, for the same messages as the text form
        return Plan((build("axis", AXES, name, list(args), dict(kwargs)),))

    plan_of.__name__ = plan_of.__qualname__ = name
    return plan_of


data = _function("data", Data)
site = _function("site", Site)
member = _function("member", Member)
tensor = _function("tensor", Tensor)
pipe = _function("pipe", Pipe)
shard = _function("shard", Shard)


def _make_axes(calls: Iterable[Call]) -> tuple[Axis, ...]:
    return tuple(make("axis", AXES, call) for call in calls)


def _join(axes: Iterable[Axis]) -> str:
    return " * ".join(str(axis) for axis in axes)


def _in_order(axes: Iterable[Axis]) -> tuple[Axis, ...]:
    return tuple(sorted(axes, key=lambda axis: axis.place))  # stable: equal places keep their order


def _merge(axes: Iterable[Axis]) -> tuple[Axis, ...]:
    """Each axis once, with the product of the sizes that its name had."""
    merged: dict[str, Axis] = {}
    for axis in axes:
        first = merged.get(axis.name)
        size = min(first.n * axis.n, MAX_SIZE) if first else axis.n
        merged[axis.name] = replace(first or axis, n=size)
    return tuple(merged.values())


def _python_form(axis: Axis) -> str:
    """As the text form, with quotes around what is not a number or a truth value."""
    positional, keyword = axis.arguments()
    parts = [repr(value) for value in positional]
    for key, value in keyword.items():
        parts.append(f"{key}={(str(value) if isinstance(value, Choice) else value)!r}")
    return f"{axis.name}({', '.join(parts)})"
