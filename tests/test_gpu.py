"""What needs a CUDA device. Run by `pytest -m gpu` where one is at hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import allfuse as af

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def job(precision: str = "fp32", compile: bool = False) -> af.Job:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(512, 16, generator=generator)
    y = (x[:, :4].sum(1) > 0).long()
    return af.Job(
        model=lambda: nn.Sequential(
            nn.Linear(16, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 2)
        ),
        train=(x, y),
        test=(x, y),
        loss=lambda outputs, batch: nn.functional.cross_entropy(outputs, batch[1]),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
        metrics={"accuracy": af.accuracy},
        batch_size=64,
        stop=af.Stop(epochs=4),
        precision=precision,
        compile=compile,
    )


def test_a_gpu_gives_the_numbers_of_the_cpu_to_rounding() -> None:
    on_cpu = af.train(job(), device="cpu", quiet=True)
    on_gpu = af.train(job(), device="cuda", quiet=True)
    assert on_gpu.loss == pytest.approx(on_cpu.loss, rel=1e-3)
    assert on_gpu.test["accuracy"] > 0.95


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_autocast_learns_on_a_gpu(precision: str) -> None:
    assert af.train(job(precision), device="cuda", quiet=True).test["accuracy"] > 0.95


def test_a_compiled_model_learns_on_a_gpu() -> None:
    assert af.train(job(compile=True), device="cuda", quiet=True).test["accuracy"] > 0.95


def test_a_checkpoint_of_a_gpu_is_resumed_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("runs")
    whole = af.train(job(), device="cuda", quiet=True, out=folder / "whole")
    from dataclasses import replace

    short = replace(job(), stop=af.Stop(epochs=2))
    af.train(short, device="cuda", quiet=True, out=folder / "halves")
    rest = af.train(job(), device="cuda", quiet=True, out=folder / "halves", resume=True)
    for name, value in whole.weights.items():
        assert torch.equal(value, rest.weights[name]), name
