"""How long a merge will take is said before it begins."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from allfuse.merge import estimate
from allfuse.merge.estimate import START_S, estimate_seconds
from allfuse.merge.outline import outline
from allfuse.merge.recipe import Recipe
from allfuse.rule import METHODS


@pytest.fixture
def paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Three models, on a machine that is as fast as the one that was measured."""
    monkeypatch.setattr(estimate, "_copy_speed", lambda: estimate.COPY_BYTES_PER_S)
    found = [tmp_path / f"{number}.safetensors" for number in range(3)]
    for path in found:
        save_file({"w": torch.zeros(2000, 1000)}, path)
    return found


def work_s(paths: Sequence[Path], name: str, threads: int = 1, **about: float) -> float:
    rule = METHODS[name](**about)
    base = paths[0] if rule.of_changes else None
    recipe = Recipe(models=paths[1:], rule=rule, weights=[1.0, 1.0], base=base)
    return estimate_seconds(outline(recipe), threads) - START_S


def test_more_threads_take_less_and_a_slower_machine_more(
    paths: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = work_s(paths, "linear")
    assert work_s(paths, "linear", threads=2) == pytest.approx(one / 2**estimate.SCALING)
    monkeypatch.setattr(estimate, "_copy_speed", lambda: estimate.COPY_BYTES_PER_S / 4)
    assert work_s(paths, "linear") == pytest.approx(4 * one)


def test_rules_that_measure_first_take_longer(paths: list[Path]) -> None:
    assert work_s(paths, "linear") < work_s(paths, "slerp") < work_s(paths, "ties", density=0.2)
    assert work_s(paths, "ties", density=1.0) < work_s(paths, "ties", density=0.2)


def test_the_speed_of_this_machine_is_that_of_its_memory() -> None:
    assert 1e8 < estimate._copy_speed() < 1e12
