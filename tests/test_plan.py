"""Plans: the product of axes, where its ranks stand, what it promises and says."""

from __future__ import annotations

import itertools
import pickle
import subprocess
import sys
from dataclasses import FrozenInstanceError, dataclass
from pathlib import Path
from typing import ClassVar

import pytest

from allfuse.base.errors import PlanError
from allfuse.codec import CODECS, Codec, Identity
from allfuse.codec.base import Error, Shapes
from allfuse.plan import (
    AXES,
    Axis,
    Data,
    Plan,
    Site,
    as_plan,
    check_workers,
    data,
    describe,
    layout,
    member,
    pipe,
    shard,
    site,
    tensor,
)
from allfuse.rule import RULES, SumRule
from allfuse.sync import SYNCS, Sync
from allfuse.topology import TOPOLOGIES, Native

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Lossy(Codec):
    name: ClassVar[str] = "lossy"

    @property
    def error(self) -> Error:
        return "bounded"

    def payload_bytes(self, shapes: Shapes, element_bytes: int) -> int:
        return 1


@dataclass(frozen=True)
class Mixing(Native):
    name: ClassVar[str] = "mixing"
    exact: ClassVar[bool] = False


@dataclass(frozen=True)
class Stale(Sync):
    name: ClassVar[str] = "stale"
    most: int

    @property
    def bound(self) -> int | None:
        return self.most if self.most >= 0 else None


@dataclass(frozen=True)
class Power(SumRule):
    name: ClassVar[str] = "power"

    def prepare(self, value, weight):
        return value

    def finish(self, total, weight):
        return total


@pytest.fixture
def more_choices(monkeypatch):
    """Names that this version need not have, so that plans can go beyond its tables."""
    for table, choice in (
        (CODECS, Lossy),
        (TOPOLOGIES, Mixing),
        (SYNCS, Stale),
        (RULES, Power),
    ):
        monkeypatch.setitem(table, choice.name, choice)


# the product


def test_product_keeps_axes_in_order_however_it_is_grouped():
    left = (site(2) * data(3)) * tensor(4)
    right = site(2) * (data(3) * tensor(4))
    assert left == right
    assert hash(left) == hash(right)
    assert [axis.name for axis in left.axes] == ["site", "data", "tensor"]


def test_product_takes_axes_as_well_as_plans():
    assert site(2) * Data(3) == Plan((Site(2), Data(3))) == Plan([Site(2), Data(3)])


def test_product_with_something_else_is_a_type_error():
    with pytest.raises(TypeError):
        data(2) * 3


def test_workers_are_the_product_of_the_sizes():
    assert (member(5) * site(3) * data(2) * pipe(2)).workers == 60
    assert data(1).workers == 1


def test_axis_is_found_by_name():
    plan = site(4, every=50) * data(2)
    assert plan.axis("site") == Site(4, every=50)
    assert plan.axis("tensor") is None
    with pytest.raises(ValueError, match="there is no axis 'dat'"):
        plan.axis("dat")


def test_plan_cannot_be_changed():
    plan = data(2)
    with pytest.raises(FrozenInstanceError):
        plan.axes = ()
    with pytest.raises(FrozenInstanceError):
        plan.axes[0].codec = Identity()


def test_plan_survives_pickle(more_choices):
    plan = site(4, every=50, codec="lossy") * data(2, topology="native")
    assert pickle.loads(pickle.dumps(plan)) == plan
    assert str(pickle.loads(pickle.dumps(plan))) == str(plan)


def test_every_axis_of_the_table_has_a_function_of_its_name():
    functions = {"data": data, "site": site, "member": member}
    functions |= {"tensor": tensor, "pipe": pipe, "shard": shard}
    assert list(AXES) == list(functions)
    for name, function in functions.items():
        assert function(3).axes == (AXES[name](3),)
        assert AXES[name].name == function.__name__ == name
        assert function.__doc__ == AXES[name].__doc__


# what a keyword holds


@pytest.mark.parametrize("given", ["native", "native()", Native, Native()])
def test_option_holds_the_choice_however_it_is_given(given):
    assert data(2, topology=given).axis("data").topology == Native()


@pytest.mark.parametrize("given", [None, "auto"])
def test_auto_topology_is_none_and_not_written(given):
    plan = data(2, topology=given)
    assert plan.axis("data").topology is None
    assert str(plan) == "data(2)"


@pytest.mark.parametrize("given", [3, Native, Native(), None, Codec, "native", 0.5, ["identity"]])
def test_option_refuses_what_is_not_in_its_table(given):
    with pytest.raises(PlanError, match="there is no such codec") as caught:
        data(2, codec=given)
    assert caught.value.allowed == ", ".join(CODECS)


def test_option_refuses_a_choice_that_no_table_lists():
    with pytest.raises(PlanError, match="there is no such codec"):
        data(2, codec=Lossy())


def test_unknown_argument_in_python_gets_the_same_advice_as_in_text():
    with pytest.raises(PlanError) as python:
        data(2, topolgy="native")
    with pytest.raises(PlanError) as text:
        Plan.parse("data(2, topolgy=native)")
    assert str(python.value) == str(text.value)
    assert "did you mean 'topology'?" in str(text.value)


# sizes, orders


@pytest.mark.parametrize(
    ("n", "nearest"),
    [
        (0, "data(1)"),
        (-3, "data(1)"),
        (True, "data(1)"),
        (4.0, "data(4)"),
        ("4", "data(4)"),
        ("x", "data(1)"),
        (None, "data(1)"),
        (float("nan"), "data(1)"),
        (10**6 + 1, "data(1000000)"),
        (10**400, "data(1000000)"),
    ],
)
def test_size_that_is_no_count_is_refused_with_the_nearest_that_is(n, nearest):
    with pytest.raises(PlanError, match="whole number from 1") as caught:
        data(n)
    assert caught.value.nearest == nearest
    assert Plan.parse(nearest)


@pytest.mark.parametrize("every", [0, -1, True, 2.0, "10", "never", None])
def test_every_is_a_count_of_steps_or_end(every):
    with pytest.raises(PlanError, match="every must be") as caught:
        site(4, every=every)
    assert Plan.parse(caught.value.nearest)


@pytest.mark.parametrize(
    ("given", "nearest"),
    [
        ("data(2) * site(2)", "site(2) * data(2)"),
        ("tensor(2) * data(2)", "data(2) * tensor(2)"),
        ("data(4) * pipe(2) * member(3)", "member(3) * data(4) * pipe(2)"),
        ("site(2) * member(3)", "member(3) * site(2)"),
        ("data(2) * data(3)", "data(6)"),
        ("tensor(2) * data(2) * tensor(2)", "data(2) * tensor(4)"),
        ("data(1000000) * data(2)", "data(1000000)"),
    ],
)
def test_axes_out_of_order_or_twice_are_refused_with_the_nearest_plan(given, nearest):
    with pytest.raises(PlanError) as caught:
        Plan.parse(given)
    assert (caught.value.given, caught.value.nearest) == (given, nearest)
    assert str(Plan.parse(nearest)) == nearest


def test_split_axes_stand_in_any_order():
    for names in itertools.permutations(["tensor", "pipe", "shard"]):
        plan = Plan.parse(" * ".join(f"{name}(2)" for name in names))
        assert tuple(axis.name for axis in plan.axes) == names


def test_plan_without_axes_or_of_other_things_is_refused():
    with pytest.raises(PlanError, match="without axes"):
        Plan(())
    with pytest.raises(PlanError, match="is not an axis"):
        Plan((data(2),))


# where ranks stand

PLANS = [
    data(1),
    data(5),
    site(3) * data(2),
    member(2) * site(2) * data(3),
    member(2) * data(2) * pipe(2) * tensor(3),
    tensor(2) * pipe(2) * shard(2),
]


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_coordinates_count_row_by_row(plan):
    names = [axis.name for axis in plan.axes]
    expected = itertools.product(*(range(axis.n) for axis in plan.axes))
    for rank, where in enumerate(expected):
        assert list(plan.coordinates(rank).items()) == list(zip(names, where, strict=True))


@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("name", AXES)
def test_peers_differ_on_one_axis_only(plan, name):
    for rank in range(plan.workers):
        here = plan.coordinates(rank)
        others = {key: value for key, value in here.items() if key != name}
        expected = tuple(
            peer for peer in range(plan.workers) if others.items() <= plan.coordinates(peer).items()
        )
        assert plan.peers(rank, name) == expected


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_replica_is_the_ranks_of_one_copy_of_the_model(plan):
    def copy(rank):
        replicating = [axis.name for axis in plan.axes if axis.replicates]
        return [plan.coordinates(rank)[name] for name in replicating]

    for rank in range(plan.workers):
        expected = tuple(peer for peer in range(plan.workers) if copy(peer) == copy(rank))
        assert plan.replica(rank) == expected


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_every_share_of_the_batch_is_worked_on_once_by_each_member(plan):
    member_axis = plan.axis("member")
    seen = {}
    for rank in range(plan.workers):
        who = plan.coordinates(rank).get("member", 0)
        seen.setdefault((who, plan.replica_index(rank)), []).append(rank)
    members = range(member_axis.n if member_axis else 1)
    assert list(seen) == list(itertools.product(members, range(plan.replicas)))
    for ranks in seen.values():
        here = plan.coordinates(ranks[0]).get("shard", 0)
        mates = plan.replica(ranks[0])
        assert ranks == [m for m in mates if plan.coordinates(m).get("shard", 0) == here]


@pytest.mark.parametrize("rank", [-1, 6])
def test_rank_outside_the_plan_is_an_error(rank):
    plan = site(3) * data(2)
    for ask in (plan.coordinates, plan.replica, plan.replica_index):
        with pytest.raises(ValueError, match="is not one of the 6 ranks"):
            ask(rank)
    with pytest.raises(ValueError, match="is not one of the 6 ranks"):
        plan.peers(rank, "data")


# what it promises


@pytest.mark.parametrize(
    ("text", "promise"),
    [
        ("data(4)", "exact"),
        ("data(4, topology=native)", "exact"),
        ("data(2) * pipe(2) * tensor(2)", "exact"),
        ("shard(4)", "exact"),
        ("member(5) * data(2)", "exact"),
        ("site(4)", "replayed"),
        ("member(2) * site(4, every=50) * data(2)", "replayed"),
        ("data(4, codec=lossy)", "replayed"),
        ("site(4, topology=mixing)", "replayed"),
        ("data(4, sync=stale(0))", "exact"),
        ("data(4, sync=stale(3))", "replayed"),
        ("data(4, sync=stale(-1))", "replayed"),
        ("data(4, rule=vote)", "replayed"),
    ],
)
def test_promise_is_the_weakest_of_the_axes(more_choices, text, promise):
    assert Plan.parse(text).promise == promise


# what can be run


@pytest.mark.parametrize("plan", [data(4), site(4, every=50) * data(2), site(2)], ids=str)
def test_plan_of_executable_axes_can_be_run(plan):
    plan.validate_executable()


def test_plan_with_another_axis_is_refused_with_the_nearest_that_runs(monkeypatch):
    for axis in AXES.values():
        monkeypatch.setattr(axis, "executable", axis in (Data, Site))
    for given, nearest in [
        ("tensor(4)", "data(4)"),
        ("data(2, topology=native) * tensor(2)", "data(4, topology=native)"),
        ("member(5) * site(2, every=9) * pipe(3)", "site(2, every=9) * data(15)"),
        ("tensor(1000000) * pipe(2)", "data(1000000)"),
    ]:
        plan = Plan.parse(given)
        with pytest.raises(PlanError, match="this version cannot run") as caught:
            plan.validate_executable()
        assert (caught.value.given, caught.value.nearest) == (given, nearest)
        Plan.parse(nearest).validate_executable()


def test_axis_becomes_executable_by_its_own_declaration(monkeypatch):
    monkeypatch.setattr(AXES["tensor"], "executable", True)
    tensor(2).validate_executable()


@pytest.mark.parametrize(
    ("given", "workers", "nearest"),
    [
        ("data(4)", 8, "data(8)"),
        ("data(4, topology=native)", 2, "data(2, topology=native)"),
        ("site(4)", 8, "site(4) * data(2)"),
        ("site(2) * data(2)", 2, "site(2)"),
        ("data(3) * tensor(2)", 8, "data(4) * tensor(2)"),
        ("data(3) * tensor(2)", 7, "data(7)"),
        ("tensor(4)", 2, "data(2)"),
    ],
)
def test_other_number_of_workers_is_refused_with_a_plan_for_that_many(given, workers, nearest):
    plan = Plan.parse(given)
    with pytest.raises(PlanError, match=f"needs {plan.workers} workers, got {workers}") as caught:
        check_workers(plan, workers)
    assert caught.value.nearest == nearest
    check_workers(Plan.parse(nearest), workers)


def test_no_workers_at_all_are_refused():
    with pytest.raises(PlanError, match="needs 2 workers, got 0"):
        check_workers(data(2), 0)


# what it says


def test_description_has_a_line_for_each_axis_and_names_workers_batch_and_promise():
    plan = site(4, every=50) * data(2)
    lines = describe(plan)
    assert lines[0] == "site(4, every=50) * data(2): 8 workers, ranks 0 to 7."
    assert "after every 50 steps their weights are averaged" in lines[1]
    assert "every step their gradients are averaged" in lines[2]
    assert "cut into 8 even shares" in lines[3]
    assert lines[4].startswith("Promise: replayed;")
    assert "allfuse verify" in lines[4]
    assert len(lines) == 5


def test_description_names_the_choices_by_what_they_declare(more_choices):
    text = describe(site(4, codec="lossy", sync="stale(3)"))[1]
    assert "fused by power" in describe(site(4, rule="power"))[1]
    assert "over mixing" in describe(site(4, topology="mixing"))[1]
    for part in ("at most 3 steps apart", "lossy (with loss)"):
        assert part in text
    assert "each as it is ready" in describe(data(4, sync="stale(-1)"))[1]


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_description_is_plain_sentences(plan):
    for line in describe(plan):
        assert line.endswith(".")
        assert "None" not in line
        assert "Data(" not in line


def test_description_says_what_cannot_run_yet(monkeypatch):
    monkeypatch.setattr(AXES["member"], "executable", False)
    assert describe(member(5) * data(2))[-1] == (
        "Not yet: this version cannot run member yet; the nearest plan that it can is data(10)."
    )


def test_layout_shows_the_coordinates_of_each_rank():
    assert layout(site(2) * data(2)) == [
        "rank  site  data",
        "   0     0     0",
        "   1     0     1",
        "   2     1     0",
        "   3     1     1",
    ]


def test_layout_of_many_ranks_is_cut_and_says_so():
    lines = layout(data(1000) * tensor(1000))
    assert len(lines) == 1 + 16 + 1
    assert "999,984 more ranks" in lines[-1]


# any form


def test_as_plan_takes_every_form():
    plan = site(2, every=50) * data(3)
    for form in (plan, str(plan), repr(plan), plan.to_nest(), tuple(plan.to_nest())):
        assert as_plan(form) == plan
    assert as_plan(Data(3)) == as_plan({"data": 3}) == data(3)


@pytest.mark.parametrize("value", [None, 4, b"data(4)", 0.5, object(), {4}])
def test_as_plan_refuses_anything_else(value):
    with pytest.raises(PlanError, match="is not a plan"):
        as_plan(value)


def test_plan_module_loads_no_torch():
    code = "import sys, allfuse.plan; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_axis_is_a_choice_that_writes_itself():
    axis: Axis = Site(4, every="end", topology=Native())
    assert str(axis) == "site(4, every=end, topology=native)"
