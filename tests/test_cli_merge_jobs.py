"""allfuse merge with rules that look at data, as it is typed."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from commands import merge
from merging_cases import make_modules, save_all, small
from safetensors.torch import load_file

from allfuse.base.errors import Interrupted, MergeError, PlanError, UserError
from allfuse.merge import OF_DATA
from allfuse.merge.learned import LEARNED

JOB = """
import allfuse as af
import torch
import torch.nn.functional as F

def job(seed=0, samples=24):
    chance = torch.Generator().manual_seed(int(seed))
    inputs = torch.randn(samples, 5, generator=chance)
    return af.Job(
        model=lambda: torch.nn.Sequential(
            torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3)
        ),
        train=(inputs, torch.randint(3, (samples,), generator=chance)),
        loss=lambda outputs, batch: F.cross_entropy(outputs, batch[1]),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        batch_size=8,
    )
"""


@pytest.fixture
def models(tmp_path: Path) -> list[str]:
    (tmp_path / "job.py").write_text(JOB)
    return [str(path) for path in save_all(make_modules(small, 3), tmp_path)]


@pytest.mark.parametrize(
    ("rule", "name"),
    [
        ("fisher", "fisher"),
        ("regmean(alpha=0.5)", "regmean(alpha=0.5)"),
        ("regmean++", "regmean++"),
        ("regmean++(alpha=0.5)", "regmean++(alpha=0.5)"),
        ("adamerging(steps=2)", "adamerging(steps=2)"),
    ],
)
def test_a_rule_that_learns_says_what_it_did(
    rule: str, name: str, models: list[str], tmp_path: Path
) -> None:
    base = ["--base", models[2]] if rule.startswith("ada") else []
    out, job = str(tmp_path / "out"), str(tmp_path / "job.py")
    said = merge(*models[:2], *base, "--rule", rule, "--job", job, "--out", out)
    assert f"66 parameters in 4 tensors by {name} of 2 models" in said
    assert "at most 256 samples of each model's data" in said
    assert set(load_file(tmp_path / "out" / "model.safetensors")) == {
        "0.weight", "0.bias", "2.weight", "2.bias",
    }  # fmt: skip


def test_a_dry_run_says_what_it_takes_and_writes_nothing(models: list[str], tmp_path: Path) -> None:
    before = sorted(os.listdir(tmp_path))
    said = merge(*models, "--rule", "fisher", "--job", str(tmp_path / "job.py"), "--examples", "9",
                 "--out", str(tmp_path / "out"), "--dry-run")  # fmt: skip
    assert "66 parameters in 4 tensors by fisher of 3 models" in said
    assert "at most 9 samples of each model's data" in said
    assert sorted(set(os.listdir(tmp_path)) - {"__pycache__"}) == before


def test_json_ends_with_one_line(models: list[str], tmp_path: Path) -> None:
    said = merge(*models, "--rule", "regmean", "--job", str(tmp_path / "job.py"), "--set", "seed=3",
                 "--out", str(tmp_path / "out"), "--json", "--quiet")  # fmt: skip
    told = json.loads(said.splitlines()[-1])
    assert told["ok"] is True
    assert told["rule"] == "regmean"
    assert told["parameters"] == 66


def test_bad_input_is_refused_before_anything_is_written(models: list[str], tmp_path: Path) -> None:
    out, job = ["--out", str(tmp_path / "out")], ["--job", str(tmp_path / "job.py")]
    for arguments, error, said in (
        (["--rule", "fisher"], MergeError, "has no job.*next: --job"),
        (["--rule", "fisher", *job, *job], MergeError, "2 jobs for 3 models"),
        (["--rule", "adamerging", *job], MergeError, "there is none; next: --base"),
        (["--rule", "regmean", "--base", models[0], *job], MergeError, "would not look at"),
        (["--rule", "regmean", "--weights", "1,-1,1", *job], MergeError, "weights from 0"),
        (["--rule", "regmean", "--weights", "1,1", *job], MergeError, "2 weights for 3 models"),
        (["--rule", "fisher", "--examples", "0", *job], UserError, "--examples 0"),
        (["--rule", "fisher", "--threads", "0", *job], UserError, "--threads 0"),
        (["--rule", "fisher", "--allow-nan", *job], UserError, "for rules that stream"),
        (["--rule", "fisher", "--set", "sed=1", *job], UserError, "did you mean 'seed'"),
        (["--rule", "fisher", "--job", str(tmp_path / "no.py")], UserError, "no such file"),
        (["--rule", "regmena", *job], PlanError, "did you mean 'regmean'.*adamerging"),
        (["--rule", "regmean(alpah=1)", *job], PlanError, "did you mean 'alpha'"),
    ):
        with pytest.raises(error, match=said):
            merge(*models, *arguments, *out)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".partial-*"))


def test_the_rules_of_data_are_known_by_name() -> None:
    assert tuple(LEARNED) == OF_DATA


@pytest.mark.parametrize("where", ["os.pwrite", "allfuse.merge.learned.fisher.find_scores"])
def test_ctrl_c_leaves_nothing_and_is_told(
    where: str, models: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*given: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(where, stop)
    job = str(tmp_path / "job.py")
    with pytest.raises(Interrupted, match=r"interrupted; .*the same command begins anew"):
        merge(*models, "--rule", "fisher", "--job", job, "--out", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".partial-*"))


def test_one_folder_says_which_models_it_stands_for(models: list[str], tmp_path: Path) -> None:
    (tmp_path / "some").mkdir()
    for model in models:
        os.rename(model, tmp_path / "some" / Path(model).name)
    said = merge(str(tmp_path / "some"), "--rule", "regmean", "--job", str(tmp_path / "job.py"),
                 "--out", str(tmp_path / "new" / "out"))  # fmt: skip
    assert "some stands for 3 models: 0.safetensors, 1.safetensors, 2.safetensors" in said
    assert (tmp_path / "new" / "out" / "model.safetensors").exists()
