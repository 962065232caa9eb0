"""Every example runs from end to end, alone and with two workers."""

from __future__ import annotations

import ast
import runpy
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import allfuse as af
from allfuse.cli.run import run_script

EXAMPLES = Path(__file__).parent.parent / "examples"


def needs(package: str) -> None:
    """Skip where a package is missing, without importing it here (it may warn)."""
    if find_spec(package) is None:
        pytest.skip(f"needs {package}, which is not installed")


def run(name: str, *arguments: str, plan: str = "data(2)") -> None:
    """As `allfuse run examples/NAME --plan PLAN -- ARGUMENTS` does."""
    workers = af.Plan.parse(plan).workers
    af.launch(run_script, str(EXAMPLES / name), list(arguments), workers=workers, plan=plan)


def train(name: str, plan: str, **settings: object) -> af.Result:
    return af.train(EXAMPLES / name, plan, settings=settings, quiet=True)


def run_by(starter: Sequence[str], name: str, *arguments: str) -> str:
    """What `STARTER examples/NAME ARGUMENTS` prints."""
    command = [*starter, str(EXAMPLES / name), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_digits_reaches_its_accuracy_with_two_workers() -> None:
    needs("sklearn")
    result = train("digits.py", "data(2)")
    assert result.test["accuracy"] >= 0.95


@pytest.mark.slow
def test_digits_reaches_its_accuracy_with_two_sites() -> None:
    needs("sklearn")
    result = train("digits.py", "site(2, every=5)")
    assert result.test["accuracy"] >= 0.95


SMALL = {"layers": 1, "width": 32, "context": 16, "steps": 20, "megabytes": 0.2}


def test_charlm_learns_and_two_workers_learn_the_same_and_show_a_sample(
    capfd: pytest.CaptureFixture[str],
) -> None:
    alone = train("charlm.py", "data(1)", **SMALL)
    capfd.readouterr()
    both = train("charlm.py", "data(2)", **SMALL)
    assert "def " in capfd.readouterr().out
    assert both.metrics["bits_per_character"] < 6  # from 8: all bytes alike
    for name, value in alone.weights.items():
        torch.testing.assert_close(both.weights[name], value, rtol=1e-2, atol=1e-3)


def test_charlm_reads_real_text_and_holds_other_files_out() -> None:
    charlm = runpy.run_path(str(EXAMPLES / "charlm.py"))
    text, held_out = charlm["read_standard_library"](50_000)
    assert len(text) == len(held_out) == 50_000
    assert b"import " in bytes(text.tolist())
    again, _ = charlm["read_standard_library"](50_000)
    assert torch.equal(text, again)
    rows = charlm["windows"](text, 64)
    assert torch.equal(rows[1], text[64:129])


def test_loop_runs_with_two_workers(capfd: pytest.CaptureFixture[str]) -> None:
    needs("sklearn")
    run("loop.py", "--epochs", "2")
    out = capfd.readouterr().out
    assert out.count("test accuracy 0.") == 1
    assert "with plan data(2)" in out


def test_loop_runs_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    needs("sklearn")
    monkeypatch.setattr(sys, "argv", ["loop.py", "--epochs", "2"])
    runpy.run_path(str(EXAMPLES / "loop.py"), run_name="__main__")
    assert "with plan data(1)" in capsys.readouterr().out


@pytest.mark.parametrize("plan", ["data(2)", "site(2, every=4)"])
def test_gan_runs(plan: str, capfd: pytest.CaptureFixture[str]) -> None:
    run("gan.py", "--epochs", "1", plan=plan)
    assert "of 8 clusters are found" in capfd.readouterr().out


@pytest.mark.slow
def test_gan_finds_all_clusters(capfd: pytest.CaptureFixture[str]) -> None:
    run("gan.py")
    assert "8 of 8 clusters are found" in capfd.readouterr().out


def test_finetune_runs(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    needs("transformers")
    run("finetune.py", "--samples", "300", "--epochs", "1", "--out", str(tmp_path / "run"))
    assert "accuracy" in capfd.readouterr().out
    assert (tmp_path / "run" / "model.safetensors").is_file()


@pytest.mark.slow
def test_finetune_learns(capfd: pytest.CaptureFixture[str]) -> None:
    needs("transformers")
    run("finetune.py")
    *_, last = (line for line in capfd.readouterr().out.splitlines() if "validation:" in line)
    assert float(last.split("accuracy ")[1].split()[0].rstrip(",")) > 0.8


def test_finetune_says_that_transformers_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(SystemExit, match="pip install transformers"):
        runpy.run_path(str(EXAMPLES / "finetune.py"))


def test_ddp_hook_runs_under_allfuse_run(capfd: pytest.CaptureFixture[str]) -> None:
    needs("sklearn")
    run("ddp_hook.py", "--epochs", "3")
    assert last_loss(capfd.readouterr().out) < 0.5


@pytest.mark.slow
def test_ddp_hook_runs_under_torchrun() -> None:
    needs("sklearn")
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2")
    assert last_loss(run_by(torchrun, "ddp_hook.py", "--epochs", "3")) < 0.5


def last_loss(out: str) -> float:
    return float(out.split("loss of rank 0 ")[-1].split()[0])


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_an_example_says_first_how_to_run_it(path: Path) -> None:
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    assert f"examples/{path.name}" in text
