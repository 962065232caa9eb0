"""allfuse merge, as it is typed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import merge
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from allfuse.base.errors import Interrupted, MergeError, PlanError, UserError
from allfuse.cli.app import app, main


@pytest.fixture
def models(tmp_path: Path) -> list[str]:
    paths = [str(tmp_path / f"{number}.safetensors") for number in (0, 1, 2)]
    for number, path in enumerate(paths):
        save_file({"w": torch.full((20, 30), float(number)), "n": torch.tensor([number])}, path)
    return paths


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
        (["--rule", "ties(density=0.5"], PlanError, r"is not a rule.*ties\(density=0.5\)"),
        (["--dtype", "bf61"], UserError, "did you mean 'bfloat16'.*allowed: float64.*BF16"),
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


@pytest.mark.parametrize("said", ["bf16", "BF16", "bfloat16"])
def test_a_type_is_known_by_each_of_its_names(said: str, models: list[str], tmp_path: Path) -> None:
    merge(*models, "--out", str(tmp_path / "out"), "--dtype", said)
    assert load_file(tmp_path / "out" / "model.safetensors")["w"].dtype == torch.bfloat16


def test_bad_input_is_refused_before_torch_is_loaded(models: list[str], tmp_path: Path) -> None:
    rule, search = ["--rule", "fisher", "--job", "job.py"], ["--search", "greedy"]
    cases = [
        (["--rule", "fishre"], "did you mean 'fisher'"),
        ([*rule, "--examples", "0"], "--examples 0"),
        ([*rule, "--set", "x"], "no '='"),
        (rule, "no such file"),
        ([*rule, "--overwrite", "--out", models[0]], "lies inside"),
        (["--search", "greddy"], "did you mean 'greedy'"),
        ([*search, "--evaluations", "1"], "allowed: 4 or more"),
        ([*search, "--job", "nojob.py"], "no such file"),
        (["--align", "weights", "--examples", "1"], "2 or more"),
        (["--align", "weights", "--job", "nojob.py"], "no such file"),
    ]
    script = f"""
import sys
from typer.testing import CliRunner
from allfuse.cli.app import app
for arguments, said in {cases!r}:
    done = CliRunner().invoke(app, ["merge", *{models!r}, "--out", "out", *arguments])
    assert said in str(done.exception), (arguments, done.exception)
    assert "torch" not in sys.modules, arguments
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr


# What is left where it did not end well.


def test_ctrl_c_is_told_and_the_same_command_goes_on(
    models: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write, seen = os.pwrite, 0

    def pwrite(*given: Any) -> int:
        nonlocal seen
        seen += 1
        if seen == 2:
            raise KeyboardInterrupt
        return write(*given)

    command = [*models, "--out", str(tmp_path / "out"), "--threads", "1", "-q"]
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", pwrite)
        patch.setattr(sys, "argv", ["allfuse", "merge", *command])
        with pytest.raises(SystemExit) as stopped:
            main()
    assert stopped.value.code == 130
    said = "allfuse: interrupted; the same command goes on where it was\n"
    assert capsys.readouterr().err == said
    assert json.loads(merge(*command, "--json"))["resumed_blocks"] == 1


def test_ctrl_c_is_told_by_every_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*given: Any, **named: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("allfuse.cli.evaluate.choose_plan", stop)
    result = CliRunner().invoke(app, ["evaluate", "x"])
    assert isinstance(result.exception, Interrupted)
    assert str(result.exception) == "interrupted"


@pytest.mark.parametrize(
    "workers", [1, pytest.param(2, marks=pytest.mark.slow)], ids=lambda n: f"{n} workers"
)
def test_numbers_that_are_refused_leave_nothing_behind(
    workers: int, models: list[str], tmp_path: Path
) -> None:
    save_file({"w": torch.full((20, 30), torch.nan), "n": torch.tensor([1])}, models[1])
    with pytest.raises(MergeError, match="w has nan"):
        merge(*models, "--out", str(tmp_path / "out"), "--workers", str(workers))
    assert len(os.listdir(tmp_path)) == 3


# Where the result will be.


@pytest.mark.parametrize("dry_run", [["--dry-run"], []], ids=["dry", "real"])
def test_a_place_that_cannot_be_written_to_is_refused(
    dry_run: list[str], models: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)
    with pytest.raises(MergeError, match=r"may not be written to.*next: another --out"):
        merge(*models, "--out", str(tmp_path / "out"), *dry_run)
    monkeypatch.undo()
    with pytest.raises(MergeError, match=r"0\.safetensors, where out is to be, is a file"):
        merge(*models[1:], "--out", f"{models[0]}/out", *dry_run)
    assert len(os.listdir(tmp_path)) == 3


def test_folders_on_the_way_are_made_when_it_begins(models: list[str], tmp_path: Path) -> None:
    out = tmp_path / "o" / "p" / "x"
    merge(*models, "--out", str(out), "--dry-run")
    assert not (tmp_path / "o").exists()
    merge(*models, "--out", str(out))
    assert [file.name for file in out.iterdir()] == ["model.safetensors"]


def lay(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (["thesis.txt"], r"no model and no run \(it holds thesis.txt\)"),
        (["a.safetensors", "b.safetensors"], r"2 models \(it holds a.safetensors, ...\)"),
        (["data.bin", "thesis.txt"], "no model and no run"),
        (["a/run.json", "b/run.json"], r"holds other folders \(a, ...\)"),
        (["model.safetensors", "thesis/one.tex"], r"holds other folders \(thesis\)"),
    ],
)
def test_overwrite_removes_nothing_but_one_model_or_run(
    files: list[str], said: str, models: list[str], tmp_path: Path
) -> None:
    lay(tmp_path / "out", *files)
    with pytest.raises(MergeError, match=said):
        merge(*models, "--out", str(tmp_path / "out"), "--overwrite")
    assert all((tmp_path / "out" / file).read_text() == "x" for file in files)


@pytest.mark.parametrize(
    "files",
    [
        [],
        ["model.safetensors", "README.md"],
        ["soup.safetensors"],
        ["w-1-of-2.safetensors", "w-2-of-2.safetensors"],
        ["run.json", "job.py", "checkpoints/0/x", "snapshots/step-1.safetensors"],
    ],
    ids=str,
)
def test_overwrite_replaces_a_model_and_a_run(
    files: list[str], models: list[str], tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    lay(tmp_path / "out", *files)
    merge(*models, "--out", str(tmp_path / "out"), "--overwrite")
    assert os.listdir(tmp_path / "out") == ["model.safetensors"]


def test_a_file_is_no_folder_to_overwrite(models: list[str], tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("x")
    with pytest.raises(MergeError, match="is a file, and the result is a folder"):
        merge(*models, "--out", str(tmp_path / "thesis.txt"), "--overwrite")


@pytest.mark.parametrize("dry_run", [["--dry-run"], []], ids=["dry", "real"])
def test_one_folder_says_which_models_it_stands_for(
    dry_run: list[str], models: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "some"
    folder.mkdir()
    for model in models:
        os.rename(model, folder / Path(model).name)
    out = ["--out", str(tmp_path / "out"), *dry_run]
    names = "0.safetensors, 1.safetensors, 2.safetensors"
    assert f"note: {folder} stands for 3 models: {names}" in merge(str(folder), *out)
    told = json.loads(merge(str(folder), *out, "--json", "-q", "--overwrite"))
    assert told["models"] == [str(folder / Path(model).name) for model in models]
    assert any("stands for 3 models" in note for note in told["notes"])
