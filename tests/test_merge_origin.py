"""What is made of runs can be used as a run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from prediction_helpers import make_run, write_rows
from safetensors.torch import load_file, save_file

from allfuse.api import train
from allfuse.base.errors import RunError
from allfuse.merge.learned import LEARNED
from allfuse.merge.learned.learn import LearnedMerge, merge_learned
from allfuse.merge.loaded import find_jobs
from allfuse.merge.merge import merge
from allfuse.merge.recipe import Recipe
from allfuse.prediction import evaluate_run, predict_file
from allfuse.prediction.restore import open_run
from allfuse.rule import METHODS
from allfuse.store.run import RunFolder


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """Two runs of one job, of different weights."""
    found = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        found.append(make_run(tmp_path / name, hidden=7))
    file = found[1] / "model.safetensors"
    save_file({n: v + 1 if v.is_floating_point() else v for n, v in load_file(file).items()}, file)
    return found


def merge_mean(models: list[Path], out: Path) -> Path:
    merge(Recipe(models=models, rule=METHODS["mean"](), weights=[1.0] * len(models)), out)
    return out


def test_a_merge_of_runs_evaluates_and_predicts(runs: list[Path], tmp_path: Path) -> None:
    out = merge_mean(runs, tmp_path / "out")
    weights = open_run(out).model.state_dict()
    first, second = (load_file(run / "model.safetensors") for run in runs)
    torch.testing.assert_close(weights["0.weight"], (first["0.weight"] + second["0.weight"]) / 2)
    assert 0 <= evaluate_run(out).figures["accuracy"] <= 1
    rows = write_rows(tmp_path / "rows.csv", torch.randn(5, 4))
    assert predict_file(out, rows, tmp_path / "answers.csv").rows == 5


def test_the_record_says_what_it_is_made_of(runs: list[Path], tmp_path: Path) -> None:
    record = RunFolder.open(merge_mean(runs, tmp_path / "out")).record
    assert record["arguments"] == {"hidden": 7}
    assert record["merged"]["models"] == [str(run) for run in runs]
    assert record["merged"]["rule"] == "mean"
    assert "plan" not in record  # which is of one run's training


def test_a_merge_by_data_knows_its_job_too(runs: list[Path], tmp_path: Path) -> None:
    method, out = LEARNED["fisher"](), tmp_path / "out"
    jobs = find_jobs(runs, [], {})
    merge_learned(
        LearnedMerge(method=method, models=runs, jobs=jobs, weights=[1.0, 1.0], examples=8), out
    )
    assert RunFolder.open(out).record["merged"]["rule"] == "fisher"
    assert evaluate_run(out).samples == 41


def test_a_merge_is_not_trained_over(runs: list[Path], tmp_path: Path) -> None:
    out = merge_mean(runs, tmp_path / "out")
    before = (out / "model.safetensors").read_bytes()
    with pytest.raises(RunError, match="its weights were merged"):
        train(out / "job.py", out=out, resume=True, quiet=True, settings={"hidden": 7})
    assert (out / "model.safetensors").read_bytes() == before


def test_a_merge_of_merges_and_files_has_the_job_of_the_first_run(
    runs: list[Path], tmp_path: Path
) -> None:
    once = merge_mean(runs, tmp_path / "once")
    file = runs[0] / "model.safetensors"
    twice = merge_mean([file, once], tmp_path / "twice")
    assert evaluate_run(twice).samples == 41
    plain = merge_mean([file, file], tmp_path / "plain")
    assert sorted(each.name for each in plain.iterdir()) == ["model.safetensors"]
