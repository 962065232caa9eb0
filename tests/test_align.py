"""Hidden units of models from different seeds are brought into one order."""

from __future__ import annotations

import copy
import dataclasses
import doctest
import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from aligned_models import MODELS, build, numbers, perceptron
from commands import merge
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typer.testing import CliRunner

from allfuse.base.errors import MergeError, UserError
from allfuse.cli.app import app
from allfuse.job import default_forward
from allfuse.merge.align import assigning
from allfuse.merge.align.activations import match_activations
from allfuse.merge.align.aligning import Aligner, align
from allfuse.merge.align.checking import check_groups
from allfuse.merge.align.factors import Factors
from allfuse.merge.align.finding import find_groups
from allfuse.merge.align.groups import Groups, Part
from allfuse.merge.align.recording import state_of
from allfuse.merge.align.weights import Matching, match_weights

pytest.importorskip("scipy")


def batch(name: str) -> Any:
    return [MODELS[name][1]]


def groups_of(module: nn.Module, given: Any) -> Groups:
    return find_groups(module, given, default_forward)


def copied(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in state_of(module).items()}


def put(module: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    with torch.no_grad():
        for name, tensor in state_of(module).items():
            tensor.copy_(state[name])
    return module


# ----- which units there are -----


@pytest.mark.parametrize("name", MODELS)
def test_units_that_may_move_are_found_whatever_the_model(name: str) -> None:
    found = groups_of(build(name), batch(name))
    assert sorted(group.size for group in found.groups) == sorted(MODELS[name][2])
    assert len({group.name for group in found.groups}) == len(found.groups)


@pytest.mark.parametrize("name", MODELS)
def test_outputs_stay_the_same_when_all_units_move(name: str) -> None:
    module = build(name).double()
    given = [each.double() if each.is_floating_point() else each for each in batch(name)]
    found = groups_of(module, given)
    before = default_forward(module, given)
    state = copied(module)
    moved = found.permute(state, found.random(torch.Generator().manual_seed(1)))
    assert any(not torch.equal(moved[key], state[key]) for key in state)
    after = default_forward(put(module, moved), given)
    torch.testing.assert_close(after, before, rtol=1e-10, atol=1e-10)
    check_groups(module, given, default_forward, found)


@pytest.mark.parametrize("name", MODELS)
def test_planted_orders_are_found_by_weights(name: str) -> None:
    module = build(name)
    found, state = groups_of(module, batch(name)), copied(module)
    moved = found.permute(state, found.random(torch.Generator().manual_seed(2)))
    again = found.permute(moved, match_weights(found, state, moved))
    assert all(torch.equal(again[key], state[key]) for key in state)


@pytest.mark.parametrize("name", MODELS)
def test_planted_orders_are_found_by_activations(name: str) -> None:
    module = build(name)
    found, state = groups_of(module, batch(name)), copied(module)
    moved = found.permute(state, found.random(torch.Generator().manual_seed(3)))
    shape = MODELS[name][1].shape[1:]
    more = [[numbers(64, *shape)]] if MODELS[name][1].is_floating_point() else [
        [torch.randint(11, (64, *shape), generator=torch.Generator().manual_seed(4))]]  # fmt: skip
    orders = match_activations(found, module, state, moved, lambda: more, default_forward)
    again = found.permute(moved, orders)
    assert all(torch.equal(again[key], state[key]) for key in state)


def test_a_channel_is_a_block_of_features_once_it_is_flattened() -> None:
    module = nn.Sequential(nn.Conv2d(1, 4, 2), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 9, 2)).eval()
    found = groups_of(module, [numbers(3, 1, 4, 4)])
    (parts,) = found.cuts["3.weight"][1]
    assert parts[0] == Part(4, 0)
    order = torch.tensor([2, 0, 1, 3])
    moved = found.permute(copied(module), [order])["3.weight"]
    expected = module[3].weight.unflatten(1, (4, 9))[:, order].flatten(1)
    assert torch.equal(moved, expected)


def test_inputs_and_outputs_stay_with_the_reason() -> None:
    found = groups_of(perceptron().eval(), [numbers(4, 5)])
    assert found.fixed["0.weight[1]"] == "it is data or a constant"
    assert found.fixed["6.bias[0]"] == "it is of the output"


class Sorting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.three(self.two(self.one(x).cumsum(1)).relu())


def test_units_whose_order_matters_stay_with_the_reason() -> None:
    found = groups_of(Sorting(), [numbers(3, 4)])
    assert [group.size for group in found.groups] == [5]
    assert found.fixed["one.weight[0]"] == "its order matters (cumsum in the model)"


def test_a_part_that_no_forward_uses_stays_and_is_no_group() -> None:
    module = perceptron()
    module.register_parameter("spare", nn.Parameter(torch.randn(7, 3)))
    found = groups_of(module.eval(), [numbers(4, 5)])
    assert sorted(group.size for group in found.groups) == [16, 18]


# ----- what cannot be aligned -----


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.ModuleDict({"gate": nn.Linear(4, 6), "out": nn.Linear(6, 2)})

    def forward(self, x: Tensor) -> Tensor:
        x = self.body["gate"](x)
        return self.body["out"](x if x.mean() > 0 else -x)


class Transformed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.inner, self.two = nn.Linear(4, 6), Fourier(), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.inner(self.one(x)))


class Fourier(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.fft(x, dim=1).abs()


class Failing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise ValueError("a shape of its own")


@pytest.mark.parametrize(
    ("module", "said"),
    [
        (Branching(), "in the model looks at numbers that the model computed"),
        (Transformed(), r"_fft_r2c in inner: it is not known what this operator does"),
        (nn.Linear(4, 2), "no hidden units"),
        (Failing(), "ValueError: a shape of its own"),
    ],
)
def test_what_cannot_be_followed_is_refused_with_the_reason(module: nn.Module, said: str) -> None:
    with pytest.raises(MergeError, match=said):
        groups_of(module, [numbers(3, 4)])


def test_a_group_that_changes_outputs_is_refused_by_its_name() -> None:
    module = perceptron().eval()
    found = groups_of(module, [numbers(4, 5)])
    cuts = dict(found.cuts) | {"2.weight": (found.cuts["2.weight"][0], ((Part(16, None),),))}
    wrong = dataclasses.replace(found, cuts=cuts)
    with pytest.raises(MergeError, match=r"the 16 units of 0.weight\[0\] in another order change"):
        check_groups(module, [numbers(4, 5)], default_forward, wrong)


def test_units_that_are_alike_hide_no_mistake() -> None:
    module = nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.Linear(8, 2)).eval()
    found = groups_of(module, [numbers(4, 5)])
    cuts = dict(found.cuts) | {"1.weight": (((Part(8, None),),),)}  # all of it is 1
    with pytest.raises(MergeError, match=r"the 8 units of 0.weight\[0\]"):
        check_groups(
            module, [numbers(4, 5)], default_forward, dataclasses.replace(found, cuts=cuts)
        )


class Rounding(nn.Module):
    """Computes its norm in float32 whatever it is given, as the models of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(5, 24), nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x)
        size = y.float().square().mean(-1, keepdim=True).rsqrt().to(y.dtype)
        out: Tensor = self.two(y * size)
        return out


def test_a_model_that_rounds_inside_is_checked_as_exactly_as_it_computes() -> None:
    module = Rounding().eval()
    found = groups_of(module, [numbers(4, 5)])
    check_groups(module, [numbers(4, 5)], default_forward, found)
    cuts = dict(found.cuts) | {"two.weight": (found.cuts["two.weight"][0], ((Part(24, None),),))}
    with pytest.raises(MergeError, match=r"the 24 units of one.weight\[0\]"):
        check_groups(
            module, [numbers(4, 5)], default_forward, dataclasses.replace(found, cuts=cuts)
        )


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x)) + torch.randn(2)


def test_a_model_that_draws_at_random_is_refused() -> None:
    with pytest.raises(MergeError, match="other outputs for the same input the second time"):
        Aligner(Noisy(), lambda: [[numbers(4, 4)]])


def test_without_scipy_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assigning, "find_spec", lambda name: None)
    with pytest.raises(MergeError, match=r"allfuse\[align\]"):
        Aligner(perceptron(), lambda: [[numbers(4, 5)]])


# ----- factors -----


def test_dims_that_are_joined_share_factors_however_they_were_cut() -> None:
    factors = Factors()
    whole, rows, columns = factors.new(24), factors.new(4), factors.new(6)
    factors.join(whole, factors.merge([rows, columns]))
    assert factors.read(whole) == factors.read(factors.merge([rows, columns]))
    head, tail = factors.part(rows, 0, 1), factors.part(rows, 1, 4)
    assert [factors.size_of(part) for part in (head, tail)] == [1, 3]
    rest = factors.merge([tail, columns])
    assert factors.read(whole) == (*factors.read(columns), *factors.read(rest))


def test_dims_that_fit_in_no_way_are_frozen() -> None:
    factors = Factors()
    one = factors.merge([factors.new(2), factors.new(9)])
    other = factors.merge([factors.new(6), factors.new(3)])
    factors.join(one, other)  # 2 divides 6, and then 9 meets 3
    assert factors.read(one) == factors.read(other)
    odd = [factors.merge([factors.new(a), factors.new(b)]) for a, b in ((2, 3), (3, 2))]
    factors.join(*odd)
    assert all(factors.why_all(dim) is not None for dim in odd)


def test_a_view_cuts_and_merges_dims() -> None:
    factors = Factors()
    dims = [factors.new(5), factors.new(12)]
    cut = factors.view(dims, [5, 3, 4, 1])
    assert factors.read(dims[1]) == factors.read(factors.merge(cut[1:]))
    (flat,) = factors.view(cut, [60])
    assert factors.read(flat) == factors.read(factors.merge(dims))


# ----- matching -----


def test_matching_never_ends_below_where_it_began() -> None:
    one, two = build("residual", 0), build("residual", 1)
    found = groups_of(one, batch("residual"))
    states = copied(one), copied(two)
    start = Matching(found, *states).total()
    orders = match_weights(found, *states)
    assert Matching(found, *states, orders).total() > start
    assert all(sorted(order.tolist()) == list(range(len(order))) for order in orders)


def test_no_single_group_can_gain_more() -> None:
    one, two = build("perceptron", 0), build("perceptron", 1)
    found = groups_of(one, batch("perceptron"))
    states = copied(one), copied(two)
    orders = match_weights(found, *states)
    best = Matching(found, *states, orders).total()
    for group, order in enumerate(orders):
        for i in range(len(order) - 1):
            swapped = [each.clone() for each in orders]
            swapped[group][[i, i + 1]] = swapped[group][[i + 1, i]]
            assert Matching(found, *states, swapped).total() <= best * (1 + 1e-5)


def test_align_works_on_modules_in_place() -> None:
    one = build("perceptron", 0)
    found = groups_of(one, batch("perceptron"))
    two = copy.deepcopy(one)
    put(two, found.permute(copied(one), found.random(torch.Generator().manual_seed(5))))
    done = align(one, two, lambda: [batch("perceptron")])
    assert (done.groups, done.units) == (2, 34)
    assert done.moved > 20
    for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_align_refuses_modules_of_two_kinds() -> None:
    with pytest.raises(MergeError, match=r"they differ in 0.bias"):
        align(perceptron(8), perceptron(9), lambda: [[numbers(4, 5)]])


def test_the_docstring_of_align_is_true() -> None:
    module = importlib.import_module("allfuse.merge.align.aligning")
    assert doctest.testmod(module, extraglobs={"torch": torch}).failed == 0


# ----- the command -----

JOB = """
import torch
from torch import nn
import allfuse as af

def job(width=16, norm=True):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(96, 5, generator=g)
    return af.Job(
        model=lambda: nn.Sequential(
            nn.Linear(5, width), nn.BatchNorm1d(width) if norm else nn.Identity(), nn.ReLU(),
            nn.Linear(width, 2)),
        train=(x, x[:, :2].clone()),
        loss=lambda outputs, batch: ((outputs - batch[1]) ** 2).mean(),
        optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
    )
"""


@pytest.fixture
def planted(tmp_path: Path) -> dict[str, str]:
    """A job, and two models of it that differ in the order of their units."""
    (tmp_path / "job.py").write_text(JOB)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(5, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 2))
    found = groups_of(module.eval(), [numbers(4, 5)])
    state = dict(module.state_dict())
    moved = found.permute(state, found.random(torch.Generator().manual_seed(6)))
    save_file(state, tmp_path / "a.safetensors")
    save_file({name: each.contiguous() for name, each in moved.items()}, tmp_path / "b.safetensors")
    return {name: str(tmp_path / name) for name in ("job.py", "a.safetensors", "b.safetensors")}


def left(folder: Path) -> list[str]:
    """The files of a folder."""
    return sorted(path.name for path in folder.iterdir() if path.name != "__pycache__")


@pytest.mark.parametrize("how", ["weights", "activations"])
def test_the_mean_of_a_model_and_its_permutation_is_the_model(
    how: str, planted: dict[str, str], tmp_path: Path
) -> None:
    said = merge(planted["a.safetensors"], planted["b.safetensors"], "--job", planted["job.py"],
                 "--align", how, "--no-calibrate", "--out", str(tmp_path / "out"))  # fmt: skip
    assert f"aligned by {how}" in said
    assert "of 16 units in 1 groups have another place" in said
    first = load_file(planted["a.safetensors"])
    found = load_file(tmp_path / "out/model.safetensors")
    assert all(torch.equal(first[name], found[name]) for name in first)
    assert not list(tmp_path.glob(".partial*"))


def test_all_models_come_into_the_order_of_the_base(
    planted: dict[str, str], tmp_path: Path
) -> None:
    left_over = tmp_path / ".partial-aligned-out" / "0"
    left_over.mkdir(parents=True)  # by one that was killed
    (left_over / "model.safetensors").write_bytes(b"half")
    merge(planted["b.safetensors"], planted["b.safetensors"], "--base", planted["a.safetensors"],
          "--rule", "task_arithmetic", "--job", planted["job.py"], "--align", "weights",
          "--no-calibrate", "--out", str(tmp_path / "out"))  # fmt: skip
    first = load_file(planted["a.safetensors"])
    found = load_file(tmp_path / "out/model.safetensors")
    assert all(torch.equal(first[name], found[name]) for name in first)
    assert not list(tmp_path.glob(".partial*"))


def test_the_result_of_runs_knows_the_job_and_what_it_is_made_of(tmp_path: Path) -> None:
    (tmp_path / "job.py").write_text(JOB)
    runs = [str(tmp_path / name) for name in "ab"]
    for run in runs:
        arguments = ["train", str(tmp_path / "job.py"), "--out", run, "--quiet"]
        assert CliRunner().invoke(app, arguments).exit_code == 0
    merge(*runs, "--align", "weights", "--out", str(tmp_path / "out"))
    record = json.loads((tmp_path / "out/run.json").read_text())
    assert record["merged"]["models"] == runs
    assert record["merged"]["align"] == "weights"
    assert (tmp_path / "out/job.py").read_text() == JOB


def test_statistics_are_those_of_the_data_after_it(planted: dict[str, str], tmp_path: Path) -> None:
    said = merge(planted["a.safetensors"], planted["b.safetensors"], "--job", planted["job.py"],
                 "--align", "weights", "--examples", "96",
                 "--out", str(tmp_path / "out"))  # fmt: skip
    assert "statistics of 1 BatchNorm modules were estimated anew" in said
    found = load_file(tmp_path / "out/model.safetensors")
    x = torch.randn(96, 5, generator=torch.Generator().manual_seed(0))
    mean = (x @ found["0.weight"].T + found["0.bias"]).mean(0)
    torch.testing.assert_close(found["1.running_mean"], mean)


def test_a_dry_run_says_which_units_and_writes_nothing(
    planted: dict[str, str], tmp_path: Path
) -> None:
    said = merge(planted["a.safetensors"], planted["b.safetensors"], "--job", planted["job.py"],
                 "--align", "weights", "--dry-run", "--json",
                 "--out", str(tmp_path / "out"))  # fmt: skip
    told = json.loads(said.splitlines()[-1])
    assert told["groups"] == {"0.weight[0]": 16}
    assert told["in_place"]["0.weight[1]"] == "it is data or a constant"
    assert len(left(tmp_path)) == 3


BAD: list[tuple[list[str], type[Exception], str]] = [
    (["--align", "wieghts"], MergeError, "did you mean 'weights'"),
    (["--align", "weights", "--search", "greedy"], UserError, "--search"),
    (["--align", "weights", "--rule", "fisher"], UserError, "--align beside --rule fisher"),
    (["--align", "weights", "--workers", "2"], UserError, "--workers 2"),
    (["--align", "weights", "--examples", "1"], UserError, "2 or more"),
    (["--align", "weights", "--memory", "10MB"], MergeError, "--memory 10 MB is not enough"),
    (["--align", "weights", "--set", "width=17"], MergeError, "does not fit the model"),
]


@pytest.mark.parametrize(("arguments", "error", "said"), BAD)
def test_bad_options_end_before_anything_is_written(
    arguments: list[str],
    error: type[Exception],
    said: str,
    planted: dict[str, str],
    tmp_path: Path,
) -> None:
    with pytest.raises(error, match=said):
        merge(planted["a.safetensors"], planted["b.safetensors"], "--job", planted["job.py"],
              "--out", str(tmp_path / "out"), *arguments)  # fmt: skip
    assert len(left(tmp_path)) == 3


def test_models_without_a_job_cannot_be_aligned(planted: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(MergeError, match=r"--job job\.py"):
        merge(planted["a.safetensors"], planted["b.safetensors"], "--align", "weights",
              "--out", str(tmp_path / "out"))  # fmt: skip


def test_numbers_that_are_not_finite_are_refused(planted: dict[str, str], tmp_path: Path) -> None:
    state = load_file(planted["b.safetensors"])
    state["0.bias"][3] = torch.nan
    save_file(state, planted["b.safetensors"])
    with pytest.raises(MergeError, match=r"0\.bias has numbers that are not finite"):
        merge(planted["a.safetensors"], planted["b.safetensors"], "--job", planted["job.py"],
              "--align", "weights", "--out", str(tmp_path / "out"))  # fmt: skip
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".partial*"))
