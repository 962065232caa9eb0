"""Fusing by what models do with data: each method equals a slow reference of its own."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from merging_cases import (
    classes,
    make_job,
    make_modules,
    mix_of,
    save,
    save_all,
    small,
)
from safetensors.torch import load_file
from torch import Tensor, nn

import allfuse as af
from allfuse.base.errors import MergeError, PlanError
from allfuse.merge.learned import LEARNED, Learned
from allfuse.merge.learned import fisher as fishing
from allfuse.merge.learned import learn as learning
from allfuse.merge.learned.adamerging import AdaMerging, Blend
from allfuse.merge.learned.fisher import Fisher
from allfuse.merge.learned.learn import LearnedMerge, merge_learned
from allfuse.merge.learned.regmean import RegMean
from allfuse.merge.learned.regmean_plus import RegMeanPlus
from allfuse.merge.learned.scores import entropy
from allfuse.merge.source import open_source


def near(found: Tensor, right: Tensor, bound: float = 1e-5) -> bool:
    return bool((found.double() - right.double()).abs().max() <= bound * right.abs().max())


def fuse(
    method: Learned, models: list[Path], jobs: list[af.Job], out: Path, **about: Any
) -> dict[str, Tensor]:
    """The tensors of the result on disk."""
    base = models[0] if method.of_changes else None
    about.setdefault("weights", [1.0] * len(models))
    given = LearnedMerge(method=method, models=models, jobs=jobs, base=base, **about)
    merge_learned(given, out, overwrite=True)
    return load_file(out / "model.safetensors")


# -- Fisher


def test_fisher_of_a_softmax_layer_is_its_closed_form(tmp_path: Path) -> None:
    (module,) = make_modules(lambda: nn.Linear(5, 3), 1)
    inputs, labels = classes(1)
    job = make_job(lambda: nn.Linear(5, 3), (inputs, labels))
    mix = mix_of(tmp_path, [module], [job])
    found = Fisher().information(mix, 0, mix.model(0))
    odds = module.double()(inputs.double()).softmax(1)
    spread = odds * (1 - odds)  # E over y of (1[y = c] - p_c)^2
    assert near(found["weight"], spread.T @ inputs.double().square() / len(inputs))
    assert near(found["bias"], spread.mean(0))


def test_a_drawn_label_gives_the_same_fisher_in_the_mean(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fishing, "EXACT", 0)
    (module,) = make_modules(lambda: nn.Linear(2, 3), 1)
    inputs = torch.tensor([[1.0, -0.5]]).repeat(1000, 1)
    job = make_job(lambda: nn.Linear(2, 3), (inputs, torch.zeros(1000, dtype=torch.int64)))
    mix = mix_of(tmp_path, [module], [job], examples=1000)
    found = Fisher().information(mix, 0, mix.model(0))["bias"]
    odds = module(inputs[:1]).softmax(1)[0].detach()
    assert near(found, odds * (1 - odds), 0.1)


def test_fisher_by_the_data_is_the_square_of_the_gradient_of_the_loss(tmp_path: Path) -> None:
    (module,) = make_modules(lambda: nn.Linear(5, 1), 1)
    inputs, target = classes(1)[0], torch.randn(24, 1, generator=torch.Generator().manual_seed(3))
    loss = lambda outputs, batch: F.mse_loss(outputs, batch[1])  # noqa: E731
    mix = mix_of(
        tmp_path, [module], [make_job(lambda: nn.Linear(5, 1), (inputs, target), loss=loss)]
    )
    found = Fisher().information(mix, 0, mix.model(0))
    error = (module(inputs) - target).detach()
    assert near(found["weight"], (2 * error * inputs).square().mean(0, keepdim=True))


@pytest.mark.parametrize("normalize", [True, False])
def test_fisher_weighs_each_number_by_its_information(tmp_path: Path, normalize: bool) -> None:
    modules = make_modules(small, 2)
    jobs = [make_job(train=classes(seed)) for seed in (1, 2)]
    mix = mix_of(tmp_path, modules, jobs, weights=(1.0, 3.0))
    method = Fisher(normalize=normalize, floor=1e-3)
    found = method.fuse(mix)
    information = [method.information(mix, place, mix.model(place)) for place in (0, 1)]
    above, below = 0.0, 0.0
    for module, given, weight in zip(modules, information, (1.0, 3.0), strict=True):
        flat = torch.cat([each.reshape(-1) for each in given.values()]).double()
        value = torch.cat([each.reshape(-1) for each in module.parameters()]).double()
        size = flat.norm() if normalize else 1.0
        share = weight * (flat / size).clamp(min=1e-3)
        above, below = above + share * value, below + share
    assert near(torch.cat([each.reshape(-1) for each in found.values()]), above / below)


# -- RegMean


def solve_slowly(inputs: list[Tensor], outputs: list[Tensor]) -> Tensor:
    """The least-squares solution of all models' rows, (size, outputs)."""
    rows, right = torch.cat(inputs).double(), torch.cat(outputs).double()
    return torch.linalg.lstsq(rows, right).solution


def test_regmean_is_the_least_squares_solution(tmp_path: Path) -> None:
    build = lambda: nn.Linear(5, 4, bias=False)  # noqa: E731
    modules = make_modules(build, 3)
    data = [classes(seed) for seed in (1, 2, 3)]
    mix = mix_of(tmp_path, modules, [make_job(build, each) for each in data])
    found = RegMean(alpha=1.0, ridge=0.0).fuse(mix)["weight"]
    inputs = [each[0] for each in data]
    outputs = [module(x).detach() for module, x in zip(modules, inputs, strict=True)]
    assert near(found, solve_slowly(inputs, outputs).T)


@pytest.mark.parametrize(
    ("conv", "shape"),
    [
        (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2, bias=False), (4, 7, 6)),
        (lambda: nn.Conv2d(2, 3, (2, 3), padding="same", dilation=2, bias=False), (2, 6, 5)),
        (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular", bias=False), (2, 5, 5)),
        (lambda: nn.Conv1d(3, 4, 3, stride=2, padding=2, bias=False), (3, 9)),
    ],
)
def test_a_convolution_is_the_least_squares_solution_over_what_it_gives(
    tmp_path: Path, conv: Any, shape: tuple[int, ...]
) -> None:
    modules = make_modules(conv, 2)
    chance = torch.Generator().manual_seed(5)
    data = [torch.randn(30, *shape, generator=chance) for _ in modules]
    labels = torch.zeros(30, dtype=torch.int64)
    mix = mix_of(tmp_path, modules, [make_job(conv, (each, labels)) for each in data])
    found = RegMean(alpha=1.0, ridge=0.0).fuse(mix)["weight"]
    probe = conv().double()
    columns = []
    for place in range(found.numel()):  # what each number of the weight adds to the outputs
        one = torch.zeros(found.numel(), dtype=torch.float64)
        one[place] = 1
        probe.weight.data.copy_(one.view(found.shape))
        columns.append(torch.cat([probe(each.double()).reshape(-1) for each in data]).detach())
    right = [m(x).detach().double().reshape(-1) for m, x in zip(modules, data, strict=True)]
    slow = torch.linalg.lstsq(torch.stack(columns, 1), torch.cat(right)[:, None]).solution
    assert near(found.reshape(-1), slow[:, 0], 1e-4)


def test_alpha_scales_what_is_off_the_diagonal(tmp_path: Path) -> None:
    build = lambda: nn.Linear(5, 4, bias=False)  # noqa: E731
    modules = make_modules(build, 2)
    data = [classes(seed) for seed in (1, 2)]
    mix = mix_of(tmp_path, modules, [make_job(build, each) for each in data])
    found = RegMean(alpha=0.7, ridge=0.0).fuse(mix)["weight"]
    total, right = torch.zeros(5, 5).double(), torch.zeros(5, 4).double()
    for module, (inputs, _) in zip(modules, data, strict=True):
        gram = inputs.double().T @ inputs.double()
        gram = 0.7 * gram + 0.3 * gram.diag().diag()
        total, right = total + gram, right + gram @ module.weight.detach().double().T
    assert near(found, torch.linalg.solve(total, right).T)


def test_inputs_that_leave_weights_open_are_refused_without_a_ridge(tmp_path: Path) -> None:
    modules = make_modules(small, 2)
    inputs, labels = classes(1)
    inputs[:, 2] = 0
    mix = mix_of(tmp_path, modules, [make_job(train=(inputs, labels))] * 2)
    with pytest.raises(
        MergeError, match=r"into 0\.weight leaves it open: the Gram matrix of 5 x 5.*ridge"
    ):
        RegMean(ridge=0.0).fuse(mix)
    found = RegMean().fuse(mix)["0.weight"]
    mean = (modules[0][0].weight + modules[1][0].weight)[:, 2] / 2
    assert near(found[:, 2], mean.detach())  # of an input that is always 0


def test_what_no_sample_comes_to_is_averaged_and_named(tmp_path: Path) -> None:
    class Spare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.spare = nn.Linear(5, 3), nn.Linear(5, 3)

        def forward(self, inputs: Tensor) -> Any:
            return self.used(inputs)

    told: list[str] = []
    mix = mix_of(
        tmp_path,
        make_modules(Spare, 2),
        [make_job(Spare)] * 2,
        tell=lambda name, **data: told.append(data["text"]) if name == "note" else None,
    )
    assert list(RegMean().fuse(mix)) == ["used.weight"]
    assert told == ["averaged: spare.weight"]


def test_layers_within_a_transformer_are_met(tmp_path: Path) -> None:
    build = lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)  # noqa: E731
    inputs = torch.randn(12, 4, 8, generator=torch.Generator().manual_seed(0))
    job = make_job(build, (inputs, torch.zeros(12, dtype=torch.int64)))
    found = RegMean().fuse(mix_of(tmp_path, make_modules(build, 2), [job] * 2))
    assert {"linear1.weight", "linear2.weight"} <= found.keys()


def test_tied_weights_stay_one_tensor(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.out = nn.Embedding(6, 5), nn.Linear(5, 6, bias=False)
            self.middle = nn.Linear(5, 5)
            self.out.weight = self.words.weight

        def forward(self, inputs: Tensor) -> Any:
            return self.out(self.middle(self.words(inputs)))

    from allfuse.store.tensorfile import read_model, write_model

    modules = make_modules(Tied, 2)
    paths = [tmp_path / f"{place}.safetensors" for place in (0, 1)]
    for module, path in zip(modules, paths, strict=True):
        write_model(path, module.state_dict())
    inputs = torch.arange(24) % 6
    loss = lambda outputs, batch: F.cross_entropy(outputs, batch[1])  # noqa: E731
    job = make_job(Tied, (inputs, inputs.flip(0)), loss=loss)
    for method in (RegMean(), Fisher()):
        out = tmp_path / method.name
        fuse(method, paths, [job] * 2, out)
        found = read_model(out / "model.safetensors")
        assert found["out.weight"].data_ptr() == found["words.weight"].data_ptr()
    mean = (modules[0].words.weight + modules[1].words.weight).detach() / 2
    assert near(read_model(tmp_path / "regmean" / "model.safetensors")["out.weight"], mean)


# -- RegMean++


def test_regmean_plus_goes_on_from_what_merged_layers_give(tmp_path: Path) -> None:
    modules = make_modules(small, 2)
    data = [classes(seed)[0] for seed in (1, 2)]
    jobs = [make_job(train=classes(seed)) for seed in (1, 2)]
    found = RegMeanPlus(alpha=1.0, ridge=0.0).fuse(mix_of(tmp_path, modules, jobs))
    plain = RegMean(alpha=1.0, ridge=0.0).fuse(mix_of(tmp_path, modules, jobs))
    assert near(found["0.weight"], plain["0.weight"])  # nothing was merged before it
    bias = (modules[0][0].bias + modules[1][0].bias).double() / 2
    met = [torch.tanh(x.double() @ found["0.weight"].double().T + bias).detach() for x in data]
    right = [x @ m[2].weight.double().T.detach() for x, m in zip(met, modules, strict=True)]
    assert near(found["2.weight"], solve_slowly(met, right).T)
    assert not near(found["2.weight"], plain["2.weight"], 1e-3)


def test_regmean_plus_does_not_depend_on_batches(tmp_path: Path) -> None:
    modules = make_modules(small, 2)
    found = []
    for size in (5, 24):
        jobs = [make_job(train=classes(seed), batch_size=size) for seed in (1, 2)]
        found.append(RegMeanPlus().fuse(mix_of(tmp_path, modules, jobs)))
    assert all(near(found[0][name], found[1][name]) for name in found[0])


def test_regmean_plus_meets_a_layer_that_runs_twice_once(tmp_path: Path) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.last = nn.Linear(5, 5), nn.Linear(5, 3)

        def forward(self, inputs: Tensor) -> Any:
            return self.last(self.layer(torch.tanh(self.layer(inputs))))

    found = RegMeanPlus().fuse(mix_of(tmp_path, make_modules(Twice, 2), [make_job(Twice)] * 2))
    assert set(found) == {"layer.weight", "last.weight"}


def test_batches_that_go_other_ways_are_refused(tmp_path: Path) -> None:
    class Forked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(5, 3), nn.Linear(5, 3)

        def forward(self, inputs: Tensor) -> Any:
            return self.left(inputs) if inputs[0, 0] > 0 else self.right(inputs)

    mix = mix_of(tmp_path, make_modules(Forked, 2), [make_job(Forked, batch_size=1)] * 2)
    with pytest.raises(MergeError, match="at left and others at right; next: regmean"):
        RegMeanPlus().fuse(mix)


def test_an_error_in_a_forward_ends_all_passes_with_it(tmp_path: Path) -> None:
    def forward(module: nn.Module, batch: Any) -> Any:
        if len(batch[0]) < 8:
            raise ValueError("a short batch")
        return module(batch[0])

    job = make_job(train=classes(0, samples=20), forward=forward)
    with pytest.raises(ValueError, match="a short batch"):
        RegMeanPlus().fuse(mix_of(tmp_path, make_modules(small, 2), [job] * 2))


# -- AdaMerging


@pytest.mark.parametrize("columns", [1, 4])
def test_the_gradient_by_coefficients_is_that_of_finite_differences(
    tmp_path: Path, columns: int
) -> None:
    build = lambda: small().double()  # noqa: E731
    base, *models = make_modules(build, 3)
    inputs, labels = classes(1)
    job = make_job(build, (inputs.double(), labels))
    mix = mix_of(
        tmp_path, models, [job] * 2, base=open_source(save(base, tmp_path / "b.safetensors"))
    )
    module, method = mix.start(), AdaMerging()
    blend = Blend(module, [mix.model(0), mix.model(1)])
    batches = [(inputs[:8].double(), labels[:8]), (inputs[8:].double(), labels[8:])]
    chosen = torch.rand(2, columns, generator=torch.Generator().manual_seed(0)).double()
    _, found = method.differentiate(mix, module, blend, chosen, batches)
    for place in range(chosen.numel()):
        ends = []
        for step in (1e-5, -1e-5):
            moved = chosen.clone().reshape(-1)
            moved[place] += step
            ends.append(method.differentiate(mix, module, blend, moved.view(2, -1), batches)[0])
        slope = (ends[0] - ends[1]) / 2e-5
        assert abs(float(found.reshape(-1)[place]) - slope) < 1e-7 + 1e-5 * abs(slope)


def test_adamerging_lowers_the_entropy_within_the_bounds(tmp_path: Path) -> None:
    base, *models = make_modules(small, 3)
    jobs = [make_job(train=classes(seed)) for seed in (1, 2)]
    mix = mix_of(tmp_path, models, jobs, base=open_source(save(base, tmp_path / "b.safetensors")))
    inputs = torch.cat([classes(seed)[0] for seed in (1, 2)])

    def measure(method: AdaMerging) -> float:
        module = small()
        module.load_state_dict(method.fuse(mix))
        return float(entropy(module(inputs)).detach())

    before = measure(AdaMerging(steps=1, lr=1e-9))
    assert measure(AdaMerging(steps=30, lr=0.04)) < before - 0.01
    module = mix.start()
    blend = Blend(module, [mix.model(0), mix.model(1)])
    chosen = AdaMerging(steps=30, lr=0.1)._learn(mix, module, blend)
    assert chosen.min() >= 0
    assert chosen.max() <= 1
    assert len(set(chosen[0].tolist())) > 1  # each parameter has its own


def test_adamerging_looks_at_no_labels(tmp_path: Path) -> None:
    paths = save_all(make_modules(small, 3), tmp_path)
    inputs, labels = classes(1)
    found = [
        fuse(AdaMerging(steps=5), paths, [make_job(train=(inputs, each))] * 3, tmp_path / "out")
        for each in (labels, 2 - labels)
    ]
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_adamerging_takes_validation_data_where_there_is_some(tmp_path: Path) -> None:
    paths = save_all(make_modules(small, 2), tmp_path)
    job = make_job(validation=classes(7))
    own = fuse(AdaMerging(steps=3, lr=0.1), paths, [job] * 2, tmp_path / "out")
    told = fuse(AdaMerging(steps=3, lr=0.1, data="train"), paths, [job] * 2, tmp_path / "out")
    assert not torch.equal(own["0.weight"], told["0.weight"])


# -- all of them


def make_method(name: str) -> Learned:
    return AdaMerging(steps=4) if name == "adamerging" else LEARNED[name]()


@pytest.mark.parametrize("name", LEARNED)
def test_a_model_with_itself_gives_it(name: str, tmp_path: Path) -> None:
    (module,) = make_modules(small, 1)
    (path,) = save_all([module], tmp_path)
    found = fuse(make_method(name), [path, path], [make_job()] * 2, tmp_path / "out")
    assert all(near(found[n], value) for n, value in module.state_dict().items())


@pytest.mark.parametrize("name", ["fisher", "regmean", "regmean++"])
def test_weights_of_1_and_0_give_the_first(name: str, tmp_path: Path) -> None:
    modules = make_modules(small, 2)
    paths = save_all(modules, tmp_path)
    found = fuse(make_method(name), paths, [make_job()] * 2, tmp_path / "out", weights=[1.0, 0.0])
    assert all(near(found[n], value) for n, value in modules[0].state_dict().items())


@pytest.mark.parametrize("name", LEARNED)
def test_the_same_call_gives_the_same_bytes(name: str, tmp_path: Path) -> None:
    paths = save_all(make_modules(small, 2), tmp_path)
    jobs = [make_job(train=classes(seed)) for seed in (1, 2)]
    found = []
    for seed in (0, 0, 1):
        fuse(make_method(name), paths, jobs, tmp_path / "out", examples=10, seed=seed)
        found.append((tmp_path / "out" / "model.safetensors").read_bytes())
    assert found[0] == found[1]
    assert found[0] != found[2]  # other samples


@pytest.mark.parametrize("name", LEARNED)
def test_statistics_of_batchnorm_are_those_of_the_fused_model(name: str, tmp_path: Path) -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 3))

    paths = save_all(make_modules(build, 2), tmp_path)
    jobs = [make_job(build, classes(seed)) for seed in (1, 2)]
    inputs = torch.cat([classes(seed)[0] for seed in (1, 2)])
    found = fuse(make_method(name), paths, jobs, tmp_path / "out")
    seen = inputs @ found["0.weight"].T + found["0.bias"]
    assert near(found["1.running_mean"], seen.mean(0))
    kept = fuse(make_method(name), paths, jobs, tmp_path / "out", calibrate=False)
    assert torch.equal(kept["1.running_mean"], torch.zeros(7))


@pytest.mark.parametrize("name", LEARNED)
def test_batches_by_name_and_outputs_with_logits_give_the_same(name: str, tmp_path: Path) -> None:
    class Named(nn.Sequential):
        def forward(self, inputs: Tensor) -> Any:
            return SimpleNamespace(logits=super().forward(inputs))

    paths = save_all(make_modules(small, 2), tmp_path)
    inputs, labels = classes(1)
    plain = make_job(train=(inputs, labels))
    named = make_job(
        lambda: Named(*small().children()),  # type: ignore[arg-type]
        {"inputs": inputs, "labels": labels},
        loss=lambda outputs, batch: F.cross_entropy(outputs.logits, batch["labels"]),
    )
    found = [fuse(make_method(name), paths, [job] * 2, tmp_path / "out") for job in (plain, named)]
    assert all(torch.equal(found[0][n], found[1][n]) for n in found[0])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", LEARNED)
def test_a_gpu_gives_the_same_to_rounding(name: str, tmp_path: Path) -> None:
    paths = save_all(make_modules(small, 2), tmp_path)
    jobs = [make_job(train=classes(seed)) for seed in (1, 2)]
    found = [
        fuse(make_method(name), paths, jobs, tmp_path / "out", device=device)
        for device in ("cpu", "cuda")
    ]
    assert all(near(found[1][n], value, 1e-4) for n, value in found[0].items())


def test_what_has_no_room_in_memory_is_refused_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learning, "room_bytes", lambda device, sharing: 1000)
    paths = save_all(make_modules(small, 2), tmp_path)
    with pytest.raises(MergeError, match=r"about 1\.3. kB in memory .* and 1 kB are free on cpu"):
        fuse(Fisher(), paths, [make_job()] * 2, tmp_path / "out")


@pytest.mark.parametrize("name", LEARNED)
def test_numbers_that_are_not_finite_are_named(name: str, tmp_path: Path) -> None:
    modules = make_modules(small, 2)
    modules[1][2].bias.data[1] = float("nan")
    paths = save_all(modules, tmp_path)
    with pytest.raises(MergeError, match=r"1\.safetensors: 2\.bias has numbers that are not"):
        fuse(make_method(name), paths, [make_job()] * 2, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_that_is_not_the_jobs_is_refused(tmp_path: Path) -> None:
    paths = save_all(make_modules(small, 2), tmp_path)
    job = make_job(lambda: nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 3)))
    with pytest.raises(MergeError, match=r"0\.safetensors does not fit the model.*\(7, 5\)"):
        fuse(RegMean(), paths, [job] * 2, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Fisher(floor=0.0), "floor is above 0"),
        (lambda: Fisher(labels="mine"), "of the model or of the data"),
        (lambda: RegMean(alpha=1.5), "alpha goes from 0 to 1"),
        (lambda: RegMeanPlus(ridge=-1.0), "ridge is 0 or more"),
        (lambda: AdaMerging(by="row"), "by layer or by task"),
        (lambda: AdaMerging(steps=0), "at least one step"),
        (lambda: AdaMerging(data="all"), "train, validation, test"),
    ],
)
def test_arguments_that_mean_nothing_are_refused(make: Any, said: str) -> None:
    with pytest.raises(PlanError, match=said):
        make()
