"""The text, Python and YAML forms of a plan: round trips, and what none of them may hold."""

from __future__ import annotations

import random
from dataclasses import MISSING, dataclass, fields
from math import prod
from typing import ClassVar

import pytest
import yaml

import allfuse.plan
from allfuse.base.errors import AllfuseError, PlanError
from allfuse.codec import CODECS, Codec
from allfuse.codec.base import Error, Shapes
from allfuse.plan import Plan, data, pipe, site
from allfuse.plan.axes import OUTERS
from allfuse.plan.parse import MAX_CHARACTERS, Call, read_call
from allfuse.rule import RULES
from allfuse.sync import SYNCS
from allfuse.topology import TOPOLOGIES, Native


@dataclass(frozen=True)
class Largest(Codec):
    """A codec with one required argument, as topk has."""

    name: ClassVar[str] = "largest"
    fraction: float
    rounded: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise ValueError(f"fraction must be in (0, 1], got {self.fraction}")

    @property
    def error(self) -> Error:
        return "bounded"

    def payload_bytes(self, shapes: Shapes, element_bytes: int) -> int:
        return int(sum(map(prod, shapes)) * element_bytes * self.fraction)


@dataclass(frozen=True)
class Star(Native):
    """A topology with keywords of every kind of value."""

    name: ClassVar[str] = "star"
    exact: ClassVar[bool] = True
    servers: int = 1
    graph: str = "plain"
    offset: float = 0.0


@pytest.fixture(autouse=True)
def more_choices(monkeypatch):
    monkeypatch.setitem(CODECS, "largest", Largest)
    monkeypatch.setitem(TOPOLOGIES, "star", Star)


def evaluate(python: str) -> Plan:
    """What the Python form is in a program that imports the names of allfuse.plan."""
    names = {name: getattr(allfuse.plan, name) for name in allfuse.plan.__all__}
    return eval(python, names)  # noqa: S307  text of our own making


def random_plan(source: random.Random) -> Plan:
    """Any plan: some axes in a legal order, sizes and keywords drawn at will."""

    def options() -> dict[str, object]:
        topologies = [None, "native", Star(), Star(source.randint(1, 9), offset=-source.random())]
        topologies.append(
            Star(graph=source.choice(["ring", "1f1b", "two words", "a\tb", "'", "if"]))
        )
        codecs = ["identity", Largest(source.random()), Largest(1e-05, rounded=True)]
        return {"topology": source.choice(topologies), "codec": source.choice(codecs)}

    def size() -> int:
        return source.choice([1, 2, 3, 7, 64, 10**6])

    axes = []
    if source.random() < 0.4:
        axes.append(allfuse.plan.Member(size()))
    if source.random() < 0.5:
        every = source.choice([1, 2, 500, "end"])
        axes.append(allfuse.plan.Site(size(), every=every, **options()))
    if source.random() < 0.7 or not axes:
        axes.append(allfuse.plan.Data(size(), **options()))
    splits = [allfuse.plan.Tensor, allfuse.plan.Pipe, allfuse.plan.Shard]
    axes += [split(size()) for split in source.sample(splits, source.randint(0, 3))]
    return Plan(tuple(axes))


@pytest.mark.parametrize("seed", range(5))
def test_every_form_gives_the_same_plan_back(seed):
    source = random.Random(seed)
    for _ in range(100):
        plan = random_plan(source)
        text, python, nest = str(plan), repr(plan), plan.to_nest()
        assert Plan.parse(text) == plan
        assert Plan.parse(python) == plan
        assert evaluate(python) == plan
        assert Plan.from_nest(nest) == plan
        assert Plan.from_nest(yaml.safe_load(yaml.safe_dump(nest))) == plan
        assert (str(Plan.parse(text)), repr(Plan.from_nest(nest))) == (text, python)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (kind, name)
        for kind, table in {
            "topology": TOPOLOGIES,
            "sync": SYNCS,
            "codec": CODECS,
            "rule": RULES,
            "outer": OUTERS,
        }.items()
        for name, choice in table.items()
        if all(s.default is not MISSING or s.default_factory is not MISSING for s in fields(choice))
    ],
)
def test_every_name_of_the_tables_can_stand_in_a_plan(kind, name):
    axis = "data" if name in RULES and not RULES[name].fuses_weights else "site"
    plan = Plan.parse(f"{axis}(4, {kind}={name})")
    assert Plan.parse(str(plan)) == evaluate(repr(plan)) == plan
    assert Plan.from_nest([{axis: {"n": 4, kind: name}}]) == plan


@pytest.mark.parametrize(
    ("plan", "text", "python", "nest"),
    [
        (data(1), "data(1)", "data(1)", [{"data": 1}]),
        (
            data(4, topology="auto", sync="bsp", codec="identity", rule="mean"),
            "data(4)",
            "data(4)",
            [{"data": 4}],
        ),
        (
            site(4, every=50) * data(2, topology="native"),
            "site(4, every=50) * data(2, topology=native)",
            "site(4, every=50) * data(2, topology='native')",
            [
                {"site": {"n": 4, "every": 50}},
                {"data": {"n": 2, "topology": "native"}},
            ],
        ),
        (
            site(3, every="end") * pipe(2),
            "site(3, every=end) * pipe(2)",
            "site(3, every='end') * pipe(2)",
            [{"site": {"n": 3, "every": "end"}}, {"pipe": 2}],
        ),
    ],
    ids=str,
)
def test_forms_leave_defaults_out(plan, text, python, nest):
    assert (str(plan), repr(plan), plan.to_nest()) == (text, python, nest)


def test_choices_with_arguments_are_written_in_every_form():
    plan = Plan.parse("data(2, codec=largest(0.01), topology=star(servers=2))")
    assert str(plan) == "data(2, topology=star(servers=2), codec=largest(0.01))"
    assert repr(plan) == "data(2, topology='star(servers=2)', codec='largest(0.01)')"
    assert plan.to_nest() == [
        {
            "data": {
                "n": 2,
                "topology": {"star": {"servers": 2}},
                "codec": {"largest": {"fraction": 0.01}},
            }
        }
    ]


@pytest.mark.parametrize(
    "text",
    [
        " data( 4 ) ",
        "data(n=4)",
        "(data(4))",
        "data(4,)",
        "data(\n  4\n)\n",
        "data(4, topology=auto)",
        "data(4, topology='auto', codec=identity())",
        "data(4, codec='identity')",
    ],
)
def test_text_is_read_as_python_is(text):
    assert Plan.parse(text) == data(4)


@pytest.mark.parametrize("word", ["true", "false", "True", "False"])
def test_truth_is_written_as_in_python_or_in_yaml(word):
    codec = Plan.parse(f"data(4, codec=largest(0.5, rounded={word}))").axes[0].codec
    assert codec == Largest(0.5, rounded=word in ("true", "True"))


def test_what_is_derived_may_be_written_as_auto():
    assert Plan.parse("data(4, topology=central(servers=auto))") == data(4, topology="central")


def test_grouping_of_the_product_does_not_matter():
    expected = "site(2) * data(2) * tensor(2)"
    assert str(Plan.parse("site(2) * (data(2) * tensor(2))")) == expected
    assert str(Plan.parse("(site(2)\n* data(2)) * tensor(2)")) == expected


@pytest.mark.parametrize(
    "nest",
    [
        [{"data": {"n": 2, "codec": {"largest": 0.5}}}],
        [{"data": {"n": 2, "codec": "largest(0.5)"}}],
        ["data(2, codec=largest(0.5))"],
        {"data": {"n": 2, "topology": None, "codec": {"largest": {"fraction": 0.5}}}},
    ],
    ids=repr,
)
def test_nest_may_shorten_what_has_one_meaning(nest):
    assert Plan.from_nest(nest) == data(2, codec=Largest(0.5))


# what is refused


@pytest.mark.parametrize(
    ("text", "why", "nearest"),
    [
        ("", "at least one axis", "data(1)"),
        ("  \n ", "at least one axis", "data(1)"),
        ("4", "is a number", "data(4)"),
        ("2 * data(4)", "is a number", "data(2)"),
        ("dat(4)", "did you mean 'data'", "data, site, member, tensor, pipe, shard"),
        ("data", "needs its argument 'n'", "data(n, "),
        ("data()", "needs its argument 'n'", "data(n, "),
        ("data(4, 2)", "at most 1 arguments without a name", "data(n, "),
        ("data(4, n=4)", "'n' twice", "data(n, "),
        ("data(n=4, n=5)", "'n' twice", "data(4)"),
        ("data(2) + tensor(2)", "joined by * only", "data(2) * tensor(2)"),
        ("data(2) ** tensor(2)", "joined by * only", "data(2) * tensor(2)"),
        ("data(2) + 3", "joined by * only", "data(4)"),
        ("data(4, codec=identiti)", "did you mean 'identity'", "identity"),
        ("data(4, topology=atuo)", "did you mean 'auto'", "auto, native"),
        ("data(4, topology=no_such(servers=2))", "no such topology", "auto, native"),
        ("data(4, codec=largest)", "needs its argument 'fraction'", "largest(fraction, "),
        ("data(4, codec=largest(2.0))", "fraction must be in (0, 1]", "largest(fraction, "),
        ("data(4, codec=largest(much))", "'fraction' is a number, got much", "largest(fraction, "),
        ("data(4, codec=largest(0.5, yes))", "'rounded' is true or false, got yes", "largest("),
        ("data(4, topology=star(1.5))", "'servers' is a whole number, got 1.5", "star(servers=1"),
        ("data(4, topology=star(true))", "'servers' is a whole number, got true", "star(servers=1"),
        ("data(4, topology=central(a))", "'servers' is a whole number, got a", "central(servers="),
        ("site(4, topology=gossip(3))", "'graph' is a name, got 3", "gossip(graph="),
        ("data(4, codec=largest(0.5, part=1))", "no argument 'part'", "largest(fraction, "),
        (
            "data(4, topology=star(graph=ring(2)))",
            "'graph' is a name, got ring(2)",
            "star(servers=1",
        ),
        ("data(4, codec=None)", "read, never evaluated", "auto"),
        ("data(ring(4))", "whole number", "data(1)"),
        ("site(4, outer=no_such)", "no such outer", "average"),
        ("pipe(2, schedule=2f2b)", "is not a plan", "data(4)"),
        ("data(4", "was never closed", "data(4)"),
        ("data(" + "9" * 30 + ")", "too large", "at most"),
        ("data(-1e999)", "not finite", "a finite number"),
    ],
)
def test_text_without_meaning_is_refused_with_the_reason_and_what_can_be(text, why, nearest):
    with pytest.raises(PlanError) as caught:
        Plan.parse(text)
    assert why in caught.value.why
    assert (caught.value.nearest or caught.value.allowed).startswith(nearest)


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')",
        "data(__import__('os').getpid())",
        "data(4).axes",
        "data[4]",
        "data(4)(4)",
        "data(*[4])",
        "data(**{'n': 4})",
        "data((4))[0]",
        "data([4])",
        "data({4})",
        "data({'n': 4})",
        "data(4 * 2)",
        "data(2 ** 9)",
        "data(--4)",
        "data(-True)",
        "data(not 4)",
        "data(+4)",
        "data(4 if 1 else 2)",
        "data(4) if 1 else data(2)",
        "data(4) or data(2)",
        "data(4), tensor(2)",
        "data(x := 4)",
        "lambda: data(4)",
        "data(4j)",
        "data(b'4')",
        "data(f'{4}')",
        "data(...)",
        "data(4) == data(4)",
        "[data(4) for _ in 'x']",
        "data(await 4)",
        "data(4); data(2)",
        "import os",
        "data = 4",
        "data(4)\x00",
        "data(\ud800)",
    ],
)
def test_text_is_never_evaluated(text):
    with pytest.raises(PlanError):
        Plan.parse(text)


@pytest.mark.parametrize(
    "text",
    [
        "data(4)" + " " * MAX_CHARACTERS,
        "(" * 200 + "data(4)" + ")" * 200,
        "data(" * 2000,
        "-" * 9000 + "1",
        "data(" + "-" * 9000 + "1)",
        "not " * 2400 + "1",
        "data(1)*" * 1200 + "data(1)",
        "data(1)+" * 1200 + "data(1)",
        "a" + ".a" * 4000,
        "1" + "**1" * 3000,
        "lambda:" * 1400 + "1",
        "data(0x" + "f" * 9000 + ")",
        "data(" + "9" * 9000 + ")",
    ],
    ids=lambda text: text[:12].strip(),
)
def test_text_of_any_size_is_refused_in_short(text):
    with pytest.raises(PlanError) as caught:
        Plan.parse(text)
    assert len(str(caught.value)) < 400


def test_random_text_gives_a_plan_or_a_plan_error():
    source = random.Random(0)
    pieces = ["data", "site", "(", ")", "4", ",", "=", "*", " ", "every", "end", "-", "codec", "'"]
    pieces += ["largest", "0.5", "star", "servers", "[", "]", "None", "True", ".", "\n", "é", "\\"]
    plans = 0
    for _ in range(3000):
        text = "".join(source.choices(pieces, k=source.randint(1, 12)))
        try:
            plan = Plan.parse(text)
        except AllfuseError:
            continue
        plans += 1
        assert Plan.parse(str(plan)) == plan
    for _ in range(300):  # one character of a plan changed
        text = list(str(random_plan(source)))
        text[source.randrange(len(text))] = source.choice("()*=,. 'x4-#\\")
        try:
            plan = Plan.parse("".join(text))
        except AllfuseError:
            continue
        plans += 1
        assert Plan.parse(str(plan)) == plan
    assert plans > 10


@pytest.mark.parametrize(
    "nest",
    [
        [],
        {},
        [4],
        [None],
        [["data"]],
        [{"data": 4, "tensor": 2}],
        [{1: 2}],
        [{"data": None}],
        [{"data": [4]}],
        [{"data": "4"}],
        [{"data": True}],
        [{"data": {"n": 4, 1: 2}}],
        [{"data": {"n": 4, "codec": ["identity"]}}],
        [{"data": {"n": 4, "codec": None}}],
        [{"data": {"n": 4, "codec": {"identity": {"x": 1}}}}],
        [{"data": {"n": 4, "codec": {"identity": {}, "largest": 0.5}}}],
        [{"data": {"n": {"n": 4}}}],
        [{"data": float("inf")}],
        [{"data": 2**70_000}],
        [{"data": object()}],
        [data(4)],
        [{"data": {"n": 4}}, {"data": 2}],
    ],
    ids=lambda nest: str(type(nest)),
)
def test_nest_without_meaning_is_refused(nest):
    with pytest.raises(PlanError) as caught:
        Plan.from_nest(nest)
    assert len(str(caught.value)) < 400


def test_nest_that_contains_itself_is_refused():
    loop = yaml.safe_load("&a {data: *a}")
    with pytest.raises(PlanError, match="levels deep"):
        Plan.from_nest(loop)


def test_reading_a_call_looks_nothing_up():
    assert read_call("anything(1, -2.5, flag=True, inner=other(x))") == Call(
        "anything", [1, -2.5], {"flag": True, "inner": Call("other", ["x"])}
    )
