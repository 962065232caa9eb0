"""allfuse merge, as it is typed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from allfuse.base.errors import MergeError, PlanError, UserError
from allfuse.cli.app import app


@pytest.fixture
def models(tmp_path: Path) -> list[str]:
    paths = [str(tmp_path / f"{number}.safetensors") for number in (0, 1, 2)]
    for number, path in enumerate(paths):
        save_file({"w": torch.full((20, 30), float(number)), "n": torch.tensor([number])}, path)
    return paths


def merge(*arguments: str) -> str:
    """What the command prints; its error is raised."""
    result = CliRunner().invoke(app, ["merge", *arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def test_merge_writes_a_model_and_says_so(models: list[str], tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    said = merge(*models, "--weights", "1,1,2", "--out", out)
    assert "601 parameters in 2 tensors by mean" in said
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(found["w"], torch.full((20, 30), 1.25))


def test_a_dry_run_reads_no_data_and_writes_nothing(models: list[str], tmp_path: Path) -> None:
    said = merge(*models[1:], "--base", models[0], "--rule", "ties(density=0.2)", "--dry-run",
                 "--out", str(tmp_path / "out"))  # fmt: skip
    assert "601 parameters" in said
    assert "an estimate from the speed of this machine's memory" in said
    assert "being whole numbers: n" in said
    assert sorted(os.listdir(tmp_path)) == ["0.safetensors", "1.safetensors", "2.safetensors"]


def test_json_ends_with_one_line(models: list[str], tmp_path: Path) -> None:
    said = merge(*models, "--out", str(tmp_path / "out"), "--json", "--quiet")
    told = json.loads(said.splitlines()[-1])
    assert told["ok"] is True
    assert told["rule"] == "mean"
    assert told["parameters"] == 601


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        (["--rule", "tie"], PlanError, "did you mean 'ties'"),
        (["--rule", "ties(densty=1)"], PlanError, "did you mean 'density'"),
        (["--rule", "ties"], MergeError, "--base"),
        (["--weights", "1,x,1"], UserError, "allowed: numbers"),
        (["--weights", "1"], MergeError, "1 weights for 3 models"),
        (["--memory", "much"], UserError, "such as 500MB"),
        (["--threads", "0"], UserError, "1 or more"),
        (["--plan", "site(2)"], PlanError, r"workers that share nothing else.*data\(2\)"),
        (["--plan", "data(2)", "--workers", "2"], UserError, "one of the two"),
    ],
)
def test_bad_options_end_before_anything_is_written(
    arguments: list[str], error: type[Exception], said: str, models: list[str], tmp_path: Path
) -> None:
    with pytest.raises(error, match=said):
        merge(*models, "--out", str(tmp_path / "out"), *arguments)
    assert len(os.listdir(tmp_path)) == 3


def test_the_command_loads_no_torch_before_headers_are_checked(
    models: list[str], tmp_path: Path
) -> None:
    script = (
        "import sys; from typer.testing import CliRunner; from allfuse.cli.app import app; "
        f"CliRunner().invoke(app, ['merge', {models[0]!r}, {models[1]!r}, '--out', "
        f"{str(tmp_path / 'out')!r}, '--dry-run'], catch_exceptions=False); "
        "print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60
    )
    assert done.stdout.strip() == "False", done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["linear", "slerp", "ties(density=0.2)", "dare_ties(density=0.2)"])
def test_a_merge_takes_no_more_memory_than_it_may(rule: str, tmp_path: Path) -> None:
    """Models of 300 MB, of which none could be held in what is left beside Python and torch."""
    for number in range(4):
        values = {f"w{n}": torch.randn(8000, 1200).bfloat16() for n in range(16)}
        save_file(values, tmp_path / f"{number}.safetensors")
    models = [str(tmp_path / f"{number}.safetensors") for number in (1, 2, 3)]
    start = ["--base", str(tmp_path / "0.safetensors")] if "ties" in rule else []
    chosen = models[:2] if rule == "slerp" else models
    command = [sys.executable, "-m", "allfuse", "merge", *chosen, *start, "--rule", rule, "-q"]
    command += ["--memory", "500MB", "--out", str(tmp_path / "out")]
    # a process counts what it was before it became another program: not what these tests take
    script = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True); "
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    done = subprocess.run([sys.executable, "-c", script, *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.splitlines()[-1]) * 1024 <= 500e6


@pytest.mark.parametrize(
    "given", [["--job", "job.py"], ["--set", "lr=1"], ["--examples", "8"]], ids=lambda g: g[0]
)
def test_what_only_rules_of_data_look_at_is_refused_beside_others(
    given: list[str], models: list[str], tmp_path: Path
) -> None:
    (tmp_path / "job.py").write_text("")
    with pytest.raises(UserError, match=f"{given[0]}: this rule looks at models alone"):
        merge(*models, "--out", str(tmp_path / "out"), *given)
    assert not (tmp_path / "out").exists()
