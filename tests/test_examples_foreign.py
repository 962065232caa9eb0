"""Loops of other libraries, whose gradients are fused by a plan of allfuse, under torchrun."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"

pytestmark = pytest.mark.peer


def last_loss(name: str, needed: str, *arguments: str) -> float:
    """What an example's rank 0 comes to with two processes."""
    for package in needed.split():
        if find_spec(package) is None:
            pytest.skip(f"needs {package}, which is not installed")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*torchrun, "--nproc-per-node", "2", str(EXAMPLES / name), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return float(done.stdout.split("loss of rank 0 ")[-1].split()[0])


@pytest.mark.slow
def test_accelerate_learns_from_one_percent_of_its_gradients() -> None:
    assert last_loss("accelerate_hook.py", "sklearn accelerate") < 0.5  # from 2.3


@pytest.mark.slow
def test_lightning_learns_from_gradients_of_low_rank() -> None:
    assert last_loss("lightning_hook.py", "sklearn lightning", "--epochs", "4") < 0.5  # from 2.3


@pytest.mark.slow
def test_the_trainer_learns_from_gradients_of_8_bits() -> None:
    assert last_loss("trainer_hook.py", "transformers accelerate") < 0.55  # from 0.69


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["data(2)", "data(2, topology=ring)"])
def test_accelerate_learns_from_whole_gradients(plan: str) -> None:
    loss = last_loss("accelerate_hook.py", "sklearn accelerate", "--epochs", "4", "--plan", plan)
    assert loss < 0.4
