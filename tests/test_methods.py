"""Rules that fuse models on disk, against slow references in float64 and by what they promise."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from allfuse.base.errors import PlanError
from allfuse.rule import METHODS, GatherRule, JointRule, Rule, SpanRule, SumRule
from allfuse.rule.chance import Chance
from allfuse.rule.ranks import Ranks
from allfuse.rule.sift import Sift, Stretch

SHAPE = (6, 50)
WEIGHTS = (1.0, 2.0, 0.5)


def draw(count: int, seed: int = 0, shape: tuple[int, ...] = SHAPE) -> list[Tensor]:
    chance = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=chance) for _ in range(count)]


def sift_whole(sift: Sift, value: Tensor, key: int = 1, block: int = 100) -> Tensor:
    """What is left of a tensor, done in blocks."""
    flat = value.flatten()
    begins = range(0, flat.numel(), block)

    def at(begin: int) -> Stretch:
        return Stretch(flat[begin : begin + block].clone(), begin, tuple(value.shape), key)

    totals: list[Tensor] = []
    before: list[list[Tensor]] = [[] for _ in begins]
    for turn in range(sift.turns):
        parts = [
            sift.measure(turn, at(begin), known)
            for begin, known in zip(begins, before, strict=True)
        ]
        total = sum(parts[1:], parts[0])
        totals.append(total)
        for number, known in enumerate(before):
            earlier = sum(parts[:number], torch.zeros_like(total))
            known.append(earlier if turn in sift.running else total)
    kept = [sift.apply(at(begin), known) for begin, known in zip(begins, before, strict=True)]
    return torch.cat(kept).view(value.shape)


def fuse(rule: Rule, values: Sequence[Tensor], weights: Sequence[float] = WEIGHTS) -> Tensor:
    """What a rule makes of whole tensors."""
    sift = rule.sift(values[0].numel())
    own = [sift_whole(sift, v, key) if sift else v.clone() for key, v in enumerate(values)]
    flat = torch.stack([value.flatten() for value in own])
    own_weights = torch.tensor(weights)
    if isinstance(rule, SumRule):
        total = sum(rule.prepare(v.clone(), w) for v, w in zip(flat, weights, strict=True))
        return rule.finish(total, sum(weights)).view(values[0].shape)
    if isinstance(rule, SpanRule):
        gram = flat.double() @ flat.double().T
        return (rule.coefficients(gram, own_weights) @ flat.double()).float().view(values[0].shape)
    if isinstance(rule, JointRule):
        return fuse_together(rule, flat, own_weights, tuple(values[0].shape))
    assert isinstance(rule, GatherRule)
    return rule.fuse(flat, own_weights).view(values[0].shape)


def fuse_together(
    rule: JointRule, flat: Tensor, weights: Tensor, shape: tuple[int, ...], block: int = 100
) -> Tensor:
    """What a rule that measures all models together makes of them, done in blocks."""
    begins = range(0, flat.shape[1], block)
    stretches = [Stretch(flat[:, begin : begin + block].clone(), begin, shape) for begin in begins]
    known: list[list[Tensor]] = [[] for _ in begins]
    for turn in range(rule.turns(flat.shape[1])):
        pairs = zip(stretches, known, strict=True)
        parts = [rule.measure(turn, stretch, found) for stretch, found in pairs]
        for number, found in enumerate(known):
            told = parts[:number] if turn in rule.running else parts
            found.append(sum(told, torch.zeros_like(parts[0])))
    pairs = zip(stretches, known, strict=True)
    return torch.cat([rule.fuse(stretch, weights, found) for stretch, found in pairs]).view(shape)


def largest(value: Tensor, start: int, stop: int) -> Tensor:
    """What stands at these places by magnitude, the rest 0: by sorting."""
    flat = value.double().flatten()
    order = flat.abs().argsort(descending=True, stable=True)[start:stop]
    kept = torch.zeros_like(flat)
    kept[order] = flat[order]
    return kept.view(value.shape)


def elect(values: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """TIES' election and mean, number by number."""
    rows = [value.double().flatten().tolist() for value in values]
    made = []
    for column in zip(*rows, strict=True):
        sign = 1.0 if sum(w * x for w, x in zip(weights, column, strict=True)) >= 0 else -1.0
        agree = [(w, x) for w, x in zip(weights, column, strict=True) if x * w * sign > 0]
        made.append(sum(w * x for w, x in agree) / (sum(w for w, _ in agree) or 1.0))
    return torch.tensor(made, dtype=torch.float64).view(values[0].shape)


def arc(first: Tensor, second: Tensor, t: float) -> Tensor:
    one, two = first.double(), second.double()
    angle = math.acos(float((one * two).sum() / (one.norm() * two.norm())))
    return (math.sin((1 - t) * angle) * one + math.sin(t * angle) * two) / math.sin(angle)


def stock(values: Sequence[Tensor]) -> Tensor:
    own = [value.double().flatten() for value in values]
    pairs = [(a, b) for i, a in enumerate(own) for b in own[:i]]
    mean = max(0.0, sum(float(a @ b / (a.norm() * b.norm())) for a, b in pairs) / len(pairs))
    share = len(own) * mean / (1 + (len(own) - 1) * mean)
    return (share * sum(own) / len(own)).view(values[0].shape)


def sphere(values: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The Karcher mean by gradient descent in the whole space, times the mean length."""
    own = [value.double().flatten() for value in values]
    units = [value / value.norm() for value in own]
    shares = [weight / sum(weights) for weight in weights]
    place = sum(s * u for s, u in zip(shares, units, strict=True))
    place = place / place.norm()
    for _ in range(200):
        step = torch.zeros_like(place)
        for share, unit in zip(shares, units, strict=True):
            angle = torch.acos((unit @ place).clamp(-1, 1))
            aside = unit - (unit @ place) * place
            step += share * angle * aside / aside.norm()
        size = step.norm()
        place = torch.cos(size) * place + torch.sin(size) * step / size.clamp(min=1e-300)
    length = sum(s * value.norm() for s, value in zip(shares, own, strict=True))
    return (place * length).view(values[0].shape)


def selected(values: Sequence[Tensor], kept: int) -> Tensor:
    """SCE (FuseChat, section 3.3), number by number, of as many selected ones."""
    own = torch.stack([value.double().flatten() for value in values])
    order = own.var(0).argsort(descending=True, stable=True)[:kept]
    chosen = torch.zeros_like(own)
    chosen[:, order] = own[:, order]
    sizes = chosen.square().mean(1).tolist()
    made = []
    for column in chosen.T.tolist():
        sign = 1.0 if sum(column) > 0 else -1.0
        agree = [(w, x) for w, x in zip(sizes, column, strict=True) if x * sign > 0]
        made.append(sum(w * x for w, x in agree) / (sum(w for w, _ in agree) or 1.0))
    return torch.tensor(made, dtype=torch.float64).view(values[0].shape)


def tangent(values: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """`multislerp` written out in the whole space."""
    own = [value.double().flatten() for value in values]
    shares = [weight / sum(weights) for weight in weights]
    units = [value / value.norm() for value in own]
    mean = sum(s * u for s, u in zip(shares, units, strict=True))
    mean = mean / mean.norm()
    step = sum(s * (u - (u @ mean) * mean) for s, u in zip(shares, units, strict=True))
    size = step.norm()
    place = torch.cos(size) * mean + torch.sin(size) * step / size
    return (place * sum(s * v.norm() for s, v in zip(shares, own, strict=True))).view(SHAPE)


def added(values: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    return sum(w * v.double() for w, v in zip(weights, values, strict=True))  # type: ignore[return-value]


N = 300  # of SHAPE
REFERENCES: dict[str, tuple[Rule, Callable[[list[Tensor]], Tensor]]] = {
    "linear": (METHODS["linear"](), lambda v: added(v, WEIGHTS) / 3.5),
    "sum": (METHODS["linear"](normalize=False), lambda v: added(v, WEIGHTS)),
    "task_arithmetic": (METHODS["task_arithmetic"](scale=0.3), lambda v: 0.3 * added(v, WEIGHTS)),
    "ties": (
        METHODS["ties"](density=0.31),
        lambda v: elect([largest(x, 0, 93) for x in v], WEIGHTS),
    ),
    "ties of little": (
        METHODS["ties"](density=0.001, scale=2.0),
        lambda v: 2 * elect([largest(x, 0, 1) for x in v], WEIGHTS),
    ),
    "breadcrumbs": (
        METHODS["breadcrumbs"](density=0.5, gamma=0.1),
        lambda v: added([largest(x, 30, 180) for x in v], WEIGHTS),
    ),
    "breadcrumbs_ties": (
        METHODS["breadcrumbs_ties"](density=0.95, gamma=0.1, normalize=True),
        lambda v: elect([largest(x, 15, 300) for x in v], WEIGHTS),
    ),
    "model_stock": (METHODS["model_stock"](), stock),
    "sce": (METHODS["sce"](), lambda v: selected(v, 300)),
    "sce of some": (METHODS["sce"](density=0.31), lambda v: selected(v, 93)),
    "karcher": (METHODS["karcher"](steps=100, tol=1e-12), lambda v: sphere(v, WEIGHTS)),
    "multislerp": (METHODS["multislerp"](), lambda v: tangent(v, WEIGHTS)),
}


@pytest.mark.parametrize("name", REFERENCES)
@pytest.mark.parametrize("seed", [0, 1])
def test_a_rule_gives_what_its_formula_says(name: str, seed: int) -> None:
    rule, reference = REFERENCES[name]
    values = draw(3, seed)
    found = fuse(rule, values).double()
    torch.testing.assert_close(found, reference(values), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_slerp_goes_along_the_arc(t: float) -> None:
    one, two = draw(2)
    found = fuse(METHODS["slerp"](t=t), [one, two], [1.0, 1.0])
    torch.testing.assert_close(found.double(), arc(one, two, t), rtol=1e-5, atol=1e-6)
    weighted = fuse(METHODS["nuslerp"](), [one, two], [1 - t, t])
    torch.testing.assert_close(weighted, found)


def test_slerp_of_nearly_parallel_models_is_a_straight_line() -> None:
    (one,) = draw(1)
    two = one + 1e-4 * draw(1, 5)[0]
    found = fuse(METHODS["slerp"](t=0.25), [one, two], [1.0, 1.0])
    torch.testing.assert_close(found, 0.75 * one + 0.25 * two)


def test_small_changes_weigh_by_their_size_under_sce_of_the_paper() -> None:
    values = [torch.tensor([1e-4, 3e-4]), torch.tensor([2e-4, 4e-4])]
    paper = fuse(METHODS["sce"](preset="paper"), values)
    torch.testing.assert_close(paper, (values[0] + 2 * values[1]) / 3)  # squares 1 and 2
    same = fuse(METHODS["sce"](), values)
    torch.testing.assert_close(same, (values[0] + values[1]) / 2)


@pytest.mark.parametrize("n", [2, 3])
def test_model_stock_of_changes_that_point_apart_is_the_base(n: int) -> None:
    apart = [torch.tensor([value]) for value in (1.0, -2.0, -0.5)[:n]]
    assert fuse(METHODS["model_stock"](), apart, [1.0] * n).tolist() == [0.0]


def test_nearswap_takes_over_what_is_near() -> None:
    one = torch.tensor([0.0, 1.0, 1.0, -2.0])
    two = torch.tensor([0.0, 1.0005, 2.0, -2.5])
    found = fuse(METHODS["nearswap"](t=0.001), [one, two], [1.0, 1.0])
    want = [0.0, 1.0005, 1.001, -2.001]  # moved by t at most
    torch.testing.assert_close(found, torch.tensor(want), rtol=0, atol=1e-6)


@pytest.mark.parametrize("preset", ["mergekit", "peft", "paper"])
def test_presets_of_ties_agree_where_all_weigh_one(preset: str) -> None:
    values = draw(3)
    found = fuse(METHODS["ties"](density=0.5, preset=preset), values, [1.0] * 3)
    torch.testing.assert_close(found, fuse(METHODS["ties"](density=0.5), values, [1.0] * 3))


def test_peft_elects_before_it_weighs_and_divides_by_the_count() -> None:
    values = [torch.tensor([3.0, 1.0]), torch.tensor([-2.0, 2.0])]
    found = fuse(METHODS["ties"](preset="peft"), values, [1.0, 4.0])
    torch.testing.assert_close(found, torch.tensor([3.0, (1.0 + 8.0) / 2]))
    found = fuse(METHODS["ties"](), values, [1.0, 4.0])
    torch.testing.assert_close(found, torch.tensor([-2.0, (1.0 + 8.0) / 5]))


SELF = [name for name in METHODS if METHODS[name].models is None]


@pytest.mark.parametrize("name", SELF)
def test_a_model_fused_with_itself_is_itself(name: str) -> None:
    fields = METHODS[name].__dataclass_fields__
    about = {"epsilon": 0.0, "gamma": 0.0}
    options = {key: value for key, value in about.items() if key in fields}
    if "density" in fields:
        options["density"] = 1.0
    if "normalize" in fields:
        options["normalize"] = True  # type: ignore[assignment]
    (value,) = draw(1)
    torch.testing.assert_close(fuse(METHODS[name](**options), [value] * 3), value)


@pytest.mark.parametrize(
    "name", ["linear", "ties", "dare_ties", "task_arithmetic", "karcher", "multislerp"]
)
def test_a_model_without_weight_does_not_count(name: str) -> None:
    one, two = draw(2)
    found = fuse(METHODS[name](), [one, two], [1.0, 0.0])
    torch.testing.assert_close(found, one, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "name",
    ["linear", "mean", "median", "trimmed", "ties", "model_stock", "sce", "karcher", "multislerp"],
)
def test_the_order_of_models_does_not_matter(name: str) -> None:
    values = draw(3)
    rule = METHODS[name]()
    found = fuse(rule, values, WEIGHTS)
    torch.testing.assert_close(fuse(rule, values[::-1], WEIGHTS[::-1]), found, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("block", [50, 100, 300])
@pytest.mark.parametrize("values", ["drawn", "alike", "of few kinds"])
def test_what_models_differ_on_does_not_depend_on_blocks(values: str, block: int) -> None:
    flat = torch.stack(draw(3)).flatten(1)
    if values == "alike":
        flat = flat[:1].expand(3, -1)
    elif values == "of few kinds":
        flat = flat.round()
    rule = METHODS["sce"](density=0.31)
    assert isinstance(rule, JointRule)
    weights = torch.ones(3)
    found = fuse_together(rule, flat, weights, SHAPE, block)
    whole = fuse_together(rule, flat, weights, SHAPE, 300)
    torch.testing.assert_close(found, whole)
    if values == "alike":
        torch.testing.assert_close(found.flatten()[:93], flat[0, :93])  # those of lower index
        assert not found.flatten()[93:].any()


@pytest.mark.parametrize("block", [50, 100, 300])
@pytest.mark.parametrize(
    "sift",
    [Ranks(0, 93), Ranks(30, 180), Ranks(0, 300), Ranks(5, 5), Chance(0.4), Chance(0.5, 0.2)],
)
def test_what_is_left_out_does_not_depend_on_blocks(sift: Sift, block: int) -> None:
    (value,) = draw(1)
    whole = sift_whole(sift, value, block=300)
    assert torch.equal(sift_whole(sift, value, block=block) == 0, whole == 0)
    torch.testing.assert_close(sift_whole(sift, value, block=block), whole)


@pytest.mark.parametrize("block", [7, 25, 299])
def test_what_is_drawn_for_a_number_follows_from_its_place_wherever_a_block_begins(
    block: int,
) -> None:
    (value,) = draw(1)
    kept = sift_whole(Chance(0.4), value, block=300) != 0
    assert torch.equal(sift_whole(Chance(0.4), value, block=block) != 0, kept)
    assert 0.25 < float(kept.float().mean()) < 0.55


@pytest.mark.parametrize("kept", [1, 7, 150, 299])
def test_of_equal_magnitudes_those_of_lower_index_are_kept(kept: int) -> None:
    value = torch.tensor([1.0, -1.0, 2.0]).repeat(100).view(SHAPE)
    found = sift_whole(Ranks(0, kept), value)
    assert torch.equal(found.double(), largest(value, 0, kept))
    assert int((found != 0).sum()) == kept


@pytest.mark.parametrize(("start", "stop"), [(0, 40), (17, 60), (0, 300), (299, 300)])
def test_exactly_as_many_are_kept_as_asked_among_bf16_numbers(start: int, stop: int) -> None:
    value = draw(1)[0].bfloat16().float()  # many are equal
    found = sift_whole(Ranks(start, stop), value)
    assert torch.equal(found.double(), largest(value, start, stop))


def test_numbers_kept_at_random_are_as_many_as_the_density_says() -> None:
    value = draw(1, shape=(200, 500))[0]
    found = sift_whole(Chance(0.3), value, block=10_000)
    part = float((found != 0).float().mean())
    assert abs(part - 0.3) < 5 * math.sqrt(0.3 * 0.7 / value.numel())
    torch.testing.assert_close(found.abs().sum(), value.abs().sum(), rtol=1e-5, atol=0.0)
    paper = sift_whole(Chance(0.3, scale="density"), value, block=10_000)
    assert torch.equal(paper != 0, found != 0)
    torch.testing.assert_close(paper[paper != 0], value[paper != 0] / 0.3)


def test_other_keys_and_places_draw_other_numbers() -> None:
    value = torch.ones(100, 100)
    masks = [sift_whole(Chance(0.5), value, key=key, block=1000) != 0 for key in (1, 2)]
    agree = float((masks[0] == masks[1]).float().mean())
    assert abs(agree - 0.5) < 0.03
    rows = masks[0].float()
    assert abs(float((rows[1:] * rows[:-1]).mean()) - 0.25) < 0.03


def test_large_changes_of_a_row_are_kept_more_often_than_small_ones() -> None:
    value = torch.arange(1.0, 101.0).repeat(400, 1)
    found = (sift_whole(Chance(0.5, 0.3), value, block=10_000) != 0).float().mean(0)
    assert abs(float(found[:10].mean()) - 0.23) < 0.04
    assert abs(float(found[-10:].mean()) - 0.77) < 0.04


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ties", {"density": 0.0}),
        ("ties", {"density": 1.5}),
        ("dare_ties", {"preset": "other"}),
        ("dare_linear", {"preset": "other"}),
        ("della", {"density": 0.95, "epsilon": 0.2}),
        ("breadcrumbs", {"gamma": 1.0}),
        ("slerp", {"t": -0.1}),
        ("sce", {"density": 0.0}),
        ("sce", {"preset": "peft"}),
    ],
)
def test_arguments_without_meaning_are_refused(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(PlanError):
        METHODS[name](**options)
