"""Models that begin with weights from files, and models that no rank builds whole."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from test_training_split import CASES, PLANS
from torch import Tensor, nn
from training_cases import assert_equal, session, under

from allfuse.base.errors import CheckpointError, JobError, UserError
from allfuse.job import Job, Stop
from allfuse.launcher.base import current_world
from allfuse.split import building
from allfuse.store.tensorfile import write_model
from allfuse.store.weights import open_weights
from allfuse.training.building import build_first
from allfuse.training.start import build_model
from allfuse.verify import verify_job


@pytest.fixture(autouse=True)
def everything_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "LARGE_BYTES", 200)
    monkeypatch.setattr(building, "WINDOW_BYTES", 0)


CUTS = (
    "tensor(2)",
    "pipe(2)",
    "shard(2)",
    "tensor(2) * shard(2)",
    "data(2) * pipe(2)",
    "pipe(2) * tensor(2)",
)


def first_weights(job: Job, plan: str) -> dict[str, Tensor]:
    """Those that training under a plan begins with, put together again."""

    def work() -> dict[str, Tensor]:
        with session(seed=job.seed) as s:
            s.model(job.model, forward=job.forward, weights=job.weights)
            s.optimizer(job.optimizer(s.models["model"].parameters()))
            for _ in s.batches(job.train, job.batch_size, steps=1):
                assert s.pending is not None
                return {n: v.clone() for n, v in s.weights()["model"].items()}
        raise AssertionError

    return next(found for found in under(plan, work) if found)


@pytest.mark.parametrize("plan", CUTS)
@pytest.mark.parametrize("case", ["tied", "convolutions"])
def test_shared_models_begin_with_the_bits_of_a_plain_seed(case: str, plan: str) -> None:
    if case == "convolutions" and "pipe" in plan:
        pytest.skip("BatchNorm over the batch is refused there")
    job = CASES[case].job(seed=3)
    assert_equal(first_weights(job, plan), dict(build_model(job.model, 3).state_dict()), exact=True)


def written(folder: Path, case: str = "tied", **changes: Any) -> tuple[Job, dict[str, Tensor]]:
    """A job that begins with weights of another seed, and these."""
    job = CASES[case].job(**changes)
    model = build_model(job.model, 17)
    path = folder / "pretrained.safetensors"
    write_model(path, model.state_dict())
    return CASES[case].job(weights=path, **changes), dict(model.state_dict())


@pytest.mark.parametrize("plan", ["data(1)", "data(2)", *CUTS])
def test_training_begins_with_the_weights_of_a_file(plan: str, tmp_path: Path) -> None:
    job, wanted = written(tmp_path)
    if plan.startswith("data") and "*" not in plan:
        assert_equal(dict(build_first(job).state_dict()), wanted, exact=True)
        found = under(plan, lambda: held_by(job))[0]
    else:
        found = first_weights(job, plan)
    assert_equal(found, wanted, exact=True)


def held_by(job: Job) -> dict[str, Tensor]:
    with session() as s:
        return dict(s.model(job.model, weights=job.weights).state_dict())


def test_verify_begins_with_the_weights_of_a_file(tmp_path: Path) -> None:
    job, _ = written(tmp_path, stop=Stop(steps=3))
    report = verify_job(lambda: job, "tensor(2)", steps=3, threads=True)
    assert report.ok, report.lines()


def test_an_index_names_the_files_of_a_folder(tmp_path: Path) -> None:
    values = {"a": torch.randn(3, 4), "b": torch.randn(5)}
    for number, name in enumerate(values):
        safetensors.torch.save_file({name: values[name]}, tmp_path / f"part-{number}.safetensors")
    places = {name: f"part-{number}.safetensors" for number, name in enumerate(values)}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    found = open_weights(tmp_path)
    assert all(torch.equal(found.read(name), value) for name, value in values.items())
    index.write_text(json.dumps({"weight_map": {"a": "../elsewhere.safetensors"}}))
    with pytest.raises(CheckpointError, match="names files in other folders"):
        open_weights(tmp_path)
    index.unlink()
    with pytest.raises(UserError, match=r"2 safetensors files and no model\.safetensors\.index"):
        open_weights(tmp_path)
    with pytest.raises(UserError, match="there is no weights there; allowed: a safetensors file"):
        open_weights(tmp_path / "none")


def changed(change: Callable[[dict[str, Tensor]], Any], folder: Path) -> Job:
    _, values = written(folder)
    plain = {name: value.clone() for name, value in values.items()}
    change(plain)
    write_model(folder / "other.safetensors", plain)
    return CASES["tied"].job(weights=folder / "other.safetensors")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda v: v.pop("trunk.layers.0.norm1.bias"), "norm1.bias is not in the file"),
        (lambda v: v.update(more=torch.ones(2)), "the model has no more"),
        (lambda v: v.update({"table.weight": torch.ones(2, 2).double()}), r"is \(2, 2\) in the"),
        (lambda v: v.clear(), "; and [0-9]+ more; allowed: the same names"),
    ],
)
def test_weights_that_do_not_fit_are_refused(
    change: Callable[[dict[str, Tensor]], Any], told: str, tmp_path: Path
) -> None:
    with pytest.raises(JobError, match=told):
        build_first(changed(change, tmp_path))


def test_types_that_lose_digits_are_refused_and_others_are_not(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    short = nn.Linear(4, 3).bfloat16()
    write_model(path, short.state_dict())
    job = CASES["mlp"].job(model=lambda: nn.Linear(4, 3), weights=path)
    assert torch.equal(build_first(job).weight, short.weight.float())  # type: ignore[arg-type]
    job = CASES["mlp"].job(model=lambda: nn.Linear(4, 3).half(), weights=path)
    with pytest.raises(JobError, match=r"weight is torch\.bfloat16 in the file and torch\.float16"):
        build_first(job)


def test_ranks_that_build_different_models_get_those_of_the_first() -> None:
    """What is drawn by another generator than torch's cannot be known beforehand."""

    def work() -> dict[str, Tensor]:
        world = current_world()
        assert world is not None
        rank = world.rank

        def build() -> nn.Module:
            made = CASES["mlp"].build().double()
            nn.init.constant_(made.get_parameter("0.weight"), float(rank + 1))
            return made

        with session() as s:
            model = s.model(build)
            assert s.pending is None
            return {"weight": model.get_parameter("0.weight").detach().clone()}

    for found in under("tensor(2)", work):
        assert bool((found["weight"] == 1).all())


def test_a_loaded_state_dict_is_what_training_begins_with() -> None:
    job = CASES["mlp"].job()
    other = build_model(job.model, 23).state_dict()

    def work() -> dict[str, Tensor]:
        with session() as s:
            model = s.model(job.model)
            s.optimizer(job.optimizer(model.parameters()))
            model.load_state_dict(other)
            for _ in s.batches(job.train, job.batch_size, steps=1):
                return dict(s.weights()["model"])
        raise AssertionError

    assert_equal(under("tensor(2)", work)[0], dict(other), exact=True)


@pytest.mark.parametrize("plan", PLANS[:1])
def test_the_run_says_how_the_model_was_built(plan: str) -> None:
    def work() -> str:
        with session() as s:
            s.model(CASES["mlp"].job().model)
            return s.choices["building"]

    assert under(plan, work)[0].startswith("each rank has its pieces")
