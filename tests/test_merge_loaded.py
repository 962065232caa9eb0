"""Models of a job from the disk, their data, and back to the disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from merging_cases import classes, make_job, make_modules, save, save_all, small
from safetensors.torch import load_file, save_file
from torch import nn

from allfuse.base.errors import JobError, MergeError
from allfuse.merge.loaded import batches, build, find_jobs, load
from allfuse.merge.source import open_source
from allfuse.merge.written import write_model

JOB = """
import allfuse as af
import torch

def job(hidden=7):
    return af.Job(
        model=lambda: torch.nn.Linear(hidden, 2), train=torch.zeros(3, hidden),
        loss=lambda outputs, batch: outputs.mean(), optimizer=torch.optim.SGD,
    )
"""


def make_run(folder: Path, hidden: int, **more: Any) -> Path:
    folder.mkdir()
    (folder / "job.py").write_text(JOB)
    (folder / "run.json").write_text(
        json.dumps({"format": 1, "arguments": {"hidden": hidden}, **more})
    )
    return folder


def test_a_model_gets_all_its_numbers_from_the_disk(tmp_path: Path) -> None:
    (module,) = make_modules(small, 1)
    made = build(make_job())
    load(made, open_source(save(module, tmp_path / "a.safetensors")))
    for name, value in module.state_dict().items():
        assert torch.equal(made.state_dict()[name], value)


def test_building_leaves_the_jobs_own_module_alone(tmp_path: Path) -> None:
    own, other = make_modules(small, 2)
    before = own[0].weight.clone()  # type: ignore[index, operator]
    made = build(make_job(own))  # type: ignore[arg-type]
    load(made, open_source(save(other, tmp_path / "a.safetensors")))
    assert torch.equal(own[0].weight, before)  # type: ignore[index, arg-type]


def test_names_that_differ_are_refused(tmp_path: Path) -> None:
    save_file({"0.weight": torch.zeros(7, 5), "more": torch.zeros(2)}, tmp_path / "a.safetensors")
    with pytest.raises(MergeError, match=r"0\.bias is not in the file.*the model has no more"):
        load(small(), open_source(tmp_path / "a.safetensors"))


def test_a_limit_draws_so_many_samples_by_the_seed(tmp_path: Path) -> None:
    job = make_job(train=(torch.arange(100), torch.arange(100)))
    drawn = [torch.cat([b[0] for b in batches(job, "train", 21, seed=s)]) for s in (0, 0, 1)]
    assert [len(set(each.tolist())) for each in drawn] == [21, 21, 21]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    everything = torch.cat([batch[0] for batch in batches(job)])
    assert torch.equal(everything, torch.arange(100))


def test_data_that_a_job_lacks_is_said(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="no validation data"):
        next(batches(make_job(), "validation"))


def test_runs_know_their_jobs_and_arguments(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, hidden) for name, hidden in (("a", 3), ("b", 3), ("c", 4))]
    jobs = find_jobs(runs, [], {})
    assert jobs[0] is jobs[1]
    assert [tuple(build(job).weight.shape) for job in jobs] == [(2, 3), (2, 3), (2, 4)]
    assert tuple(build(find_jobs(runs, [], {"hidden": "5"})[0]).weight.shape) == (2, 5)


def test_models_without_a_job_are_refused_with_the_next_step(tmp_path: Path) -> None:
    paths = save_all(make_modules(small, 2), tmp_path)
    with pytest.raises(MergeError, match=r"0\.safetensors has no job.*next: --job"):
        find_jobs(paths, [], {})
    (tmp_path / "job.py").write_text(JOB)
    with pytest.raises(MergeError, match="2 jobs for 3 models; allowed: one for all, or one for"):
        find_jobs([*paths, paths[0]], [tmp_path / "job.py"] * 2, {})


def test_what_is_written_is_like_the_other_model(tmp_path: Path) -> None:
    folder = tmp_path / "first"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    tensors = {"w": torch.randn(4, 3), "n": torch.tensor([5])}
    save_file({"w": tensors["w"].bfloat16(), "n": tensors["n"]}, folder / "model.safetensors")
    write_model(open_source(folder), tensors, tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(found["w"], tensors["w"].bfloat16())
    assert torch.equal(found["n"], tensors["n"])
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    assert not list(tmp_path.glob(".partial-*"))


def test_tensors_that_are_not_the_models_are_refused(tmp_path: Path) -> None:
    like = open_source(save(nn.Linear(3, 2), tmp_path / "a.safetensors"))
    with pytest.raises(MergeError, match=r"bias is missing; x is too many"):
        write_model(like, {"weight": torch.zeros(2, 3), "x": torch.zeros(1)}, tmp_path / "out")
    with pytest.raises(MergeError, match=r"weight is \(3, 2\), not \(2, 3\)"):
        write_model(like, {"weight": torch.zeros(3, 2), "bias": torch.zeros(2)}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_batches_of_a_job_end_where_its_data_does() -> None:
    sizes = [len(batch[1]) for batch in batches(make_job(train=classes(0, 20)), "train", 256)]
    assert sizes == [8, 8, 4]
