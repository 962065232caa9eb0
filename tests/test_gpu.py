"""What needs a CUDA device. Run by `pytest -m gpu` where one is at hand."""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_codec import LOSSY, MESSAGE, SUM, drawn, fuse
from test_rule import variants as rule_variants
from torch import Tensor, nn

import allfuse as af
from allfuse.base.errors import NonFiniteLoss, PeerLost, PlanError, UserError
from allfuse.codec import Codec, MessageCodec, SumCodec
from allfuse.codec.lowrank import LowRank
from allfuse.codec.memory import Memory
from allfuse.codec.randomk import RandomK
from allfuse.codec.scaled import Rounded
from allfuse.launcher.base import current_world
from allfuse.launcher.local import launch_local, open_store
from allfuse.launcher.thread import first_failure, launch_threads
from allfuse.link.check import SUMMABLE
from allfuse.link.group import GroupLink, StoreBoard
from allfuse.link.lookout import Lookout
from allfuse.plan import as_plan
from allfuse.rule import GatherRule, Rule, SumRule
from allfuse.store.tensorfile import read_model
from allfuse.training.exchange import _read_later
from allfuse.training.loop import train_job
from allfuse.verify import verify_job

GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not GPUS, reason="needs a CUDA device"),
    # what compilers advise of float32, which is to stay exact here
    pytest.mark.filterwarnings("ignore:TensorFloat32:UserWarning"),
]
several_gpus = pytest.mark.skipif(GPUS < 2, reason="needs a CUDA device for each of two workers")


def job(precision: str = "fp32", compile: bool = False, **more: Any) -> af.Job:
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
        **more,
    )


def double_job(batch_statistics: str) -> af.Job:
    """In float64, where all that is not rounding stands out, which AdamW would enlarge."""
    made = job(batch_statistics=batch_statistics)
    x, y = made.train
    model = made.model
    return replace(
        made,
        model=lambda: model().double(),
        train=(x.double(), y),
        test=None,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    )


def assert_close(a: dict[str, Tensor], b: dict[str, Tensor], **allowed: float) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        torch.testing.assert_close(value, b[name], msg=lambda t, n=name: f"{n}: {t}", **allowed)


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert_close(a, b, rtol=0, atol=0)


# One worker.


def test_a_gpu_gives_the_numbers_of_the_cpu_to_rounding() -> None:
    on_cpu = af.train(job(), device="cpu", quiet=True)
    on_gpu = af.train(job(), device="cuda", quiet=True)
    assert on_gpu.loss == pytest.approx(on_cpu.loss, rel=1e-3)
    assert on_gpu.test["accuracy"] > 0.95


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_autocast_learns_on_a_gpu(precision: str) -> None:
    assert af.train(job(precision), device="cuda", quiet=True).test["accuracy"] > 0.95


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_compiled_model_learns_on_a_gpu(precision: str) -> None:
    made = job(precision, compile=True)
    assert af.train(made, device="cuda", quiet=True).test["accuracy"] > 0.95


def test_clipping_and_accumulation_give_the_numbers_of_the_cpu() -> None:
    made = replace(double_job("global"), clip=0.1, accumulate=3)
    on_cpu = af.train(made, device="cpu", quiet=True)
    on_gpu = af.train(made, device="cuda", quiet=True)
    assert_close(on_cpu.weights, on_gpu.weights, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_checkpoint_of_a_gpu_is_resumed_bit_for_bit(tmp_path: Path, precision: str) -> None:
    made = job(precision)
    whole = af.train(made, device="cuda", quiet=True, out=tmp_path / "whole")
    short = replace(made, stop=af.Stop(epochs=2))
    af.train(short, device="cuda", quiet=True, out=tmp_path / "halves")
    rest = af.train(made, device="cuda", quiet=True, out=tmp_path / "halves", resume=True)
    assert_equal(whole.weights, rest.weights)


def test_verify_finds_the_same_numbers_on_a_gpu() -> None:
    report = verify_job(job(), "data(1)", device="cuda", steps=4)
    assert report.ok, str(report)


# A rank alone reads its loss without waiting for the backward pass.


def test_a_loss_comes_before_what_is_queued_after_it() -> None:
    losses = [(torch.tensor(2.5, device="cuda"), 4.0), (torch.tensor(0.1, device="cuda"), 3.0)]
    expected = sum(float(loss) * factor for loss, factor in losses)
    read = _read_later(losses)
    begin = time.perf_counter()
    torch.cuda._sleep(4_000_000_000)  # cycles, some 2 s
    assert read() == expected
    assert time.perf_counter() - begin < 0.7
    torch.cuda.synchronize()
    assert time.perf_counter() - begin > 1


class SlowBackward(torch.autograd.Function):
    """Gives its input back; its backward pass takes so many cycles of the GPU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cycles: int) -> Tensor:
        ctx.cycles = cycles
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        torch.cuda._sleep(ctx.cycles)
        return gradient, None


def test_a_step_of_a_rank_alone_ends_before_its_backward_pass() -> None:
    took, cycles = [], [1] * 8 + [4_000_000_000]  # the last is some 2 s
    with af.session("data(1)", device="cuda", quiet=True) as s:
        model = s.model(lambda: nn.Linear(16, 2))
        s.optimizer(torch.optim.AdamW(model.parameters()))
        for batch, count in zip(s.batches(job().train, batch_size=32), cycles, strict=False):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            s.step(
                batch,
                lambda outputs, b, n=count: nn.functional.cross_entropy(
                    SlowBackward.apply(outputs, n), b[1]
                ),
            )
            took.append(time.perf_counter() - begin)
            if count > 1:
                torch.cuda.synchronize()
                assert time.perf_counter() - begin > 1
                break
    assert took[-1] < 0.7, took


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_rank_alone_tells_the_losses_of_a_plain_loop(accumulate: int) -> None:
    made = double_job("local")
    with af.session("data(1)", device="cuda", quiet=True, accumulate=accumulate) as s:
        model = s.model(lambda: nn.Linear(16, 2).double())
        s.optimizer(torch.optim.SGD(model.parameters(), lr=0.1))
        plain = nn.Linear(16, 2).double().to("cuda")
        plain.load_state_dict(model.state_dict())
        optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
        for batch in s.batches(made.train, batch_size=64, epochs=2):
            told = s.step(batch, made.loss)
            loss = made.loss(plain(batch[0]), batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            assert told == pytest.approx(loss.item(), rel=1e-12)
            assert s.loss == told
    assert_close(model.state_dict(), plain.state_dict(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_told_before_the_optimizer_steps(bad: float) -> None:
    steps: list[int] = []
    with af.session("data(1)", device="cuda", quiet=True) as s:
        model = s.model(lambda: nn.Linear(16, 2))
        optimizer = s.optimizer(torch.optim.AdamW(model.parameters()))
        optimizer.register_step_post_hook(lambda *_: steps.append(s.steps))
        for step, batch in enumerate(s.batches(job().train, batch_size=64)):
            before = {name: value.clone() for name, value in model.state_dict().items()}
            factor = bad if step == 3 else 1.0
            expected: Any = contextlib.nullcontext()
            if step == 3:
                expected = pytest.raises(NonFiniteLoss, match=r"loss is.*weights were not changed")
            with expected:
                s.step(batch, lambda outputs, b, f=factor: job().loss(outputs, b) * f)
            if step == 3:
                break
        assert len(steps) == 3
        assert_equal(before, model.state_dict())


# Speed. What is asserted is far from the targets, for shared machines; the figures are printed.


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Those of the benchmarks."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parent.parent / "benchmarks"))
    return importlib.import_module("models")


def mlp(width: int = 2048) -> nn.Module:
    layers = [part for _ in range(6) for part in (nn.Linear(width, width), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(width, 10))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("name", "rows", "count"), [("mlp", 1024, 20), ("gpt", 256, 8)])
def test_a_session_costs_little_beside_a_plain_loop(
    name: str,
    rows: int,
    count: int,
    precision: str,
    models: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = (torch.randn(4 * rows, 2048), torch.randint(10, (4 * rows,)))
    build, loss_of = mlp, models.loss_of
    if name == "gpt":  # 86 million parameters
        data, build = models.texts(), functools.partial(models.SmallGpt, 768, 12, 12)

    def plain(steps: int) -> None:
        for _ in range(steps):
            chosen = torch.randperm(len(data[0]))[:rows]
            x, y = (part[chosen].pin_memory().to("cuda", non_blocking=True) for part in data)
            with torch.autocast("cuda", dtype=torch.bfloat16, enabled=precision == "bf16"):
                loss = loss_of(model(x), (x, y))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            loss.item()

    def ours(steps: int) -> None:
        for _ in range(steps):
            s.step(next(batches), loss_of)

    def seconds(run: Callable[[int], None]) -> float:
        torch.cuda.synchronize()
        begin = time.perf_counter()
        run(count)
        torch.cuda.synchronize()
        return (time.perf_counter() - begin) / count

    torch.manual_seed(0)
    model = build().to("cuda")
    optimizer = torch.optim.AdamW(model.parameters())
    with af.session(device="cuda", quiet=True, precision=precision) as s:
        s.optimizer(torch.optim.AdamW(s.model(build).parameters()))
        batches = s.batches(data, batch_size=rows)
        turns = [(seconds(ours), seconds(plain)) for _ in range(6)][1:]  # the first warms up
        batches.close()
    ratios = sorted(a / b for a, b in turns)
    ratio, told = statistics.median(ratios), statistics.median(b for _, b in turns) * 1e3
    with capsys.disabled():
        print(
            f"\n{name} {precision}: a session's step over a plain loop's of {told:.2f} ms "
            f"on a GPU: {ratio:.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})"
        )
    assert ratio < 1.5


@pytest.mark.parametrize("codec", LOSSY, ids=str)
def test_how_long_25_mb_take_to_encode_and_to_decode(
    codec: Codec, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a codec whose values are summed, its whole program without the sums."""
    values = drawn(2500 * 2500).to("cuda")
    decoded = torch.empty_like(values)
    memory = Memory([(2500, 2500)], values.dtype, values.device)

    def milliseconds(run: Callable[[], object]) -> float:
        took = []
        for _ in range(8):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            run()
            torch.cuda.synchronize()
            took.append(time.perf_counter() - begin)
        return statistics.median(took[3:]) * 1e3  # the first warm up

    if isinstance(codec, MessageCodec):
        message = codec.encode(values, 0)
        encode = milliseconds(lambda: codec.encode(values, 0))
        decode = milliseconds(lambda: codec.decode(message, decoded))
        told = f"encode {encode:.2f} ms, decode {decode:.2f} ms"
    else:
        assert isinstance(codec, SumCodec)
        both = milliseconds(lambda: list(codec.rounds(values.clone(), decoded, memory, 0)))
        told = f"encode and decode {both:.2f} ms"
    with capsys.disabled():
        print(f"\n25 MB of float32 on a GPU, {codec}: {told}")


# Codecs and rules.


@pytest.mark.parametrize("codec", MESSAGE, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_messages_of_either_device_say_the_same_on_both(
    codec: MessageCodec, dtype: torch.dtype
) -> None:
    for size in (1, 7, 64, 65, 257, 5000, 100_000):
        values = drawn(size, size, dtype)
        told = []
        for device in ("cpu", "cuda"):
            message = codec.encode(values.to(device), 5)
            assert message.device.type == device
            assert message.dtype == torch.uint8
            assert message.shape == (codec.encoded_bytes(size),)
            on_cpu, on_gpu = torch.full_like(values, 7.0), torch.full_like(values, 7.0).to("cuda")
            codec.decode(message.cpu(), on_cpu)
            codec.decode(message.to("cuda"), on_gpu)
            assert torch.equal(on_gpu.cpu(), on_cpu)
            told.append(on_cpu)
        differs = ~torch.isclose(told[0], told[1], rtol=1e-5, atol=1e-6)
        if isinstance(codec, Rounded):  # a value between two steps may take either
            step = float(values.abs().max()) / codec.steps * 1.001
            assert float((told[0] - told[1]).abs().max()) <= step
            assert float((told[1] - values).abs().max()) <= step
        if codec.error != "unbiased":  # what is drawn differs between devices
            assert int(differs.sum()) <= (size // 1000 if isinstance(codec, Rounded) else 0)


@pytest.mark.parametrize("codec", MESSAGE, ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_stays_so_on_a_gpu(codec: MessageCodec, bad: float) -> None:
    for size in (300, 100_000):
        values = drawn(size).to("cuda")
        values[123] = bad
        message = codec.encode(values, 0)
        codec.decode(message, values)
        assert not bool(values.isfinite().all())
        on_cpu = torch.zeros(size)
        codec.decode(message.cpu(), on_cpu)
        assert not bool(on_cpu.isfinite().all())


@pytest.mark.parametrize("codec", SUM, ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_and_summed_stays_so_on_a_gpu(codec: SumCodec, bad: float) -> None:
    for place in (123, 799):  # of the matrix, and of what is none
        block = drawn(800).to("cuda")
        block[place] = bad
        error = torch.zeros_like(block)
        memory = Memory([(30, 26), (20,)], block.dtype, block.device)
        for _ in codec.rounds(block, error, memory, 0):
            pass
        assert not bool(block.isfinite().all() and error.isfinite().all())


@pytest.mark.parametrize("size", [1, 2, 999, 100_003])
def test_random_places_are_alike_on_every_device(size: int) -> None:
    for fraction in (0.01, 0.1, 1.0):
        codec = RandomK(fraction)
        for seed in range(20):
            on_gpu = codec.places(size, seed, torch.zeros(1, device="cuda"))
            assert on_gpu.is_cuda
            assert torch.equal(on_gpu.cpu(), codec.places(size, seed, torch.zeros(1)))


@pytest.mark.parametrize("codec", SUM, ids=str)
@pytest.mark.parametrize(("dtype", "near"), [(torch.float64, 1e-9), (torch.float32, 1e-3)], ids=str)
def test_two_peers_on_a_gpu_lose_nothing_and_end_like_two_on_a_cpu(
    codec: SumCodec, dtype: torch.dtype, near: float
) -> None:
    shapes = [(6, 9), (4,), (), (5, 2, 7), (3, 3), (0, 4), (120, 80)]
    on_cpu, on_gpu = (Memory(shapes, dtype, torch.device(name)) for name in ("cpu", "cuda"))
    for round in range(4):
        values = torch.stack([drawn(sum(on_cpu.sizes), 2 * round + n, dtype) for n in range(2)])
        expected, kept_back = fuse(codec, values, on_cpu, round)
        fused, errors = fuse(codec, values.to("cuda"), on_gpu, round)
        assert fused.is_cuda
        together = fused + errors.sum(0)
        torch.testing.assert_close(together.cpu(), values.sum(0), rtol=near, atol=near / 10)
        torch.testing.assert_close(fused.cpu(), expected, rtol=near, atol=near)
        torch.testing.assert_close(errors.cpu(), kept_back, rtol=near, atol=near)
        if isinstance(codec, LowRank):
            assert on_gpu.kept
            assert all(kept.is_cuda for kept in on_gpu.kept.values())


def test_lowrank_survives_gradients_of_zero_on_a_gpu() -> None:
    memory = Memory([(12, 20)], torch.float64, torch.device("cuda"))
    assert not fuse(LowRank(2), torch.zeros(2, 240, device="cuda").double(), memory)[0].any()
    values = drawn(480, 3, torch.float64).view(2, 240).to("cuda")
    fused, errors = fuse(LowRank(2), values, memory)
    assert float(fused.norm()) > 0
    torch.testing.assert_close(fused + errors.sum(0), values.sum(0))


@pytest.mark.parametrize("rule", rule_variants(), ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_rules_give_on_a_gpu_what_they_give_on_a_cpu(rule: Rule, dtype: torch.dtype) -> None:
    for weights in ((1.0,), (1.0, 1.0), (1.0, 2.0, 4.0), (1.0, 3.0, 1.0, 1.0, 2.0)):
        for bad in (0.0, float("nan"), float("inf")):
            peers = [drawn(1000, n, dtype) for n in range(len(weights))]
            peers[0][::7] += bad
            told = [_fused_by(rule, peers, weights, device) for device in ("cpu", "cuda")]
            torch.testing.assert_close(told[1].cpu(), told[0], equal_nan=True)


def _fused_by(rule: Rule, peers: list[Tensor], weights: Sequence[float], device: str) -> Tensor:
    values = torch.stack(peers).to(device)
    if isinstance(rule, GatherRule):
        return rule.fuse(values, torch.tensor(weights, dtype=values.dtype, device=device))
    assert isinstance(rule, SumRule)
    if rule.needs_norm:
        values = torch.stack([value * rule.shrink(float(value.norm())) for value in values])
    parts = [rule.prepare(value, weight) for value, weight in zip(values, weights, strict=True)]
    return rule.finish(torch.stack(parts).sum(0), sum(weights))


# Several ranks as threads, which may share a GPU.


def trained_by_threads(made: af.Job, plan: str, device: str) -> dict[str, Tensor]:
    """The weights of rank 0. Those of both ranks are the same, bit for bit."""

    def work() -> dict[str, Tensor]:
        # Backward passes of one GPU share a thread, where one rank would wait for the other.
        with torch.autograd.set_multithreading_enabled(False):
            return af.train(made, device=device, quiet=True).weights

    results = launch_threads(work, 2, plan=plan)
    failure = first_failure(results)
    if failure is not None:
        raise failure
    learned = [{n: v for n, v in weights.items() if "running" not in n} for weights in results]
    assert_equal(learned[0], learned[1])
    first: dict[str, Tensor] = results[0]
    return first


@pytest.mark.parametrize("batch_statistics", ["global", "local"])
def test_ranks_on_a_gpu_give_the_numbers_of_ranks_on_a_cpu(batch_statistics: str) -> None:
    made = double_job(batch_statistics)
    on_gpu = trained_by_threads(made, "data(2)", "cuda:0")
    on_cpu = trained_by_threads(made, "data(2)", "cpu")
    assert_close(on_gpu, on_cpu, rtol=1e-9, atol=1e-12)


def test_two_ranks_on_a_gpu_give_the_numbers_of_one() -> None:
    made = double_job("global")
    alone = af.train(made, device="cuda", quiet=True).weights
    assert_close(trained_by_threads(made, "data(2)", "cuda:0"), alone, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("plan", ["site(2, every=3)", "data(2, topology=ring)"])
def test_other_plans_give_on_a_gpu_the_numbers_of_a_cpu(plan: str) -> None:
    made = double_job("local")
    on_gpu = trained_by_threads(made, plan, "cuda:0")
    assert_close(on_gpu, trained_by_threads(made, plan, "cpu"), rtol=1e-9, atol=1e-12)


def smooth_job() -> af.Job:
    """In float64, without gradients of nothing but rounding, whose signs would be chance, and with
    three classes: the gradients of two are equal in size, of which a codec may take either."""
    return replace(
        double_job("local"),
        model=lambda: nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 3)).double(),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.01),
        stop=af.Stop(epochs=2),
    )


@pytest.mark.parametrize("codec", LOSSY, ids=str)
def test_codecs_train_on_a_gpu_as_on_a_cpu(codec: Codec) -> None:
    plan = f"data(2, codec={codec})"
    on_gpu = trained_by_threads(smooth_job(), plan, "cuda:0")
    if codec.error != "unbiased":  # what is drawn differs between devices
        on_cpu = trained_by_threads(smooth_job(), plan, "cpu")
        assert_close(on_gpu, on_cpu, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("rule", rule_variants(), ids=str)
def test_rules_train_on_a_gpu_as_on_a_cpu(rule: Rule) -> None:
    plan = f"data(2, rule={rule})"
    on_gpu = trained_by_threads(smooth_job(), plan, "cuda:0")
    assert_close(on_gpu, trained_by_threads(smooth_job(), plan, "cpu"), rtol=1e-9, atol=1e-12)


# Models that several ranks share, as threads on one GPU.


def shared_job(precision: str = "fp32", **more: Any) -> af.Job:
    made = smooth_job() if precision == "fp32" else job(precision, batch_statistics="local")
    double = precision == "fp32"

    def build() -> nn.Module:
        model = nn.Sequential(
            nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 3)
        )
        return model.double() if double else model

    return replace(made, model=build, **more)


def shared_by_threads(made: af.Job, plan: str, device: str) -> af.Result:
    def work() -> af.Result:
        with torch.autograd.set_multithreading_enabled(False):
            return af.train(made, device=device, quiet=True)

    results = launch_threads(work, as_plan(plan).workers, plan=plan)
    failure = first_failure(results)
    if failure is not None:
        raise failure
    first: af.Result = results[0]
    return first


SHARED = (
    "tensor(2)",
    "pipe(2)",
    "shard(2)",
    "data(2) * tensor(2)",
    "pipe(2) * tensor(2)",
    "pipe(2) * shard(2)",
    "site(2, every=2) * pipe(2)",
    "data(2, codec=int8) * shard(2)",
)


@pytest.mark.parametrize("plan", SHARED)
def test_shared_models_train_on_a_gpu_as_on_a_cpu(plan: str) -> None:
    on_gpu = shared_by_threads(shared_job(clip=0.5), plan, "cuda:0").weights
    on_cpu = shared_by_threads(shared_job(clip=0.5), plan, "cpu").weights
    near = {"rtol": 1e-6, "atol": 1e-8} if "codec" in plan else {"rtol": 1e-9, "atol": 1e-12}
    assert_close(on_gpu, on_cpu, **near)


@pytest.mark.parametrize(
    "plan",
    ["shard(1, offload=true)", "shard(2, offload=true)", "data(2) * shard(2, offload=true)"],
)
def test_state_stays_with_the_host_and_the_model_runs_on_the_gpu(plan: str) -> None:
    """Parameters, gradients and moments; the numbers are those of a CPU."""
    places: set[str] = set()

    def work() -> af.Result:
        def look(s: Any, event: Any) -> None:
            for learner in s.learners:
                for parameter in learner.parameters:
                    places.update({parameter.device.type, parameter.grad.device.type})
                state = learner.optimizer.state.values()
                places.update(t.device.type for kept in state for t in kept.values())

        made = shared_job(clip=0.5, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2))
        with torch.autograd.set_multithreading_enabled(False):
            return train_job(made, device="cuda:0", prepare=lambda s: s.on("step", look))

    results = launch_threads(work, as_plan(plan).workers, plan=plan)
    failure = first_failure(results)
    if failure is not None:
        raise failure
    assert places == {"cpu"}
    made = shared_job(clip=0.5, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2))
    on_cpu = shared_by_threads(made, plan, "cpu").weights
    assert_close(results[0].weights, on_cpu, rtol=1e-9, atol=1e-12)


def test_offload_beside_what_moves_state_over_links_of_the_gpu_is_refused() -> None:
    with pytest.raises(PlanError, match="offload=true is not possible beside pipe"):
        shared_by_threads(shared_job(), "pipe(2) * shard(2, offload=true)", "cuda:0")


@pytest.mark.parametrize("plan", ["tensor(2)", "pipe(2)", "shard(2)"])
def test_shared_models_learn_in_bf16_on_a_gpu(plan: str) -> None:
    assert shared_by_threads(shared_job("bf16"), plan, "cuda:0").test["accuracy"] > 0.95


# Links of NCCL.


def open_link(size: int = 1, device: int = 0) -> Any:
    world = current_world()
    assert world is not None
    return GroupLink(
        world.board,  # type: ignore[arg-type]
        world._lookout,  # type: ignore[attr-defined]
        "data",
        tuple(range(size)),
        device=torch.device("cuda", device),
        timeout_s=world.timeout_s,
    )


def test_a_link_of_one_rank_moves_every_type_and_ends_at_once() -> None:
    board = StoreBoard(open_store())
    lookout = Lookout(board, 0, 1)
    link = GroupLink(board, lookout, "one", (0,), device=torch.device("cuda", 0), timeout_s=60)
    assert link.kind == "nccl"
    for dtype in sorted(SUMMABLE, key=str):
        for count in (0, 1, 1009):
            value = (torch.randn(count) * 8).to(dtype)
            on_gpu = value.to("cuda")
            link.all_reduce(on_gpu, "sum").wait()
            assert torch.equal(on_gpu.cpu(), value)
    for value in (torch.tensor([True, False]), torch.arange(5, dtype=torch.int16)):
        on_gpu = value.to("cuda")
        link.broadcast(on_gpu, "spread").wait()
        assert torch.equal(on_gpu.cpu(), value)
    with pytest.raises(ValueError, match="cannot sum"):
        link.all_reduce(torch.ones(3, dtype=torch.bool, device="cuda"), "mask")
    begin = time.monotonic()
    link.close()
    assert time.monotonic() - begin < 10


def test_a_process_with_a_link_ends_without_complaints(capfd: pytest.CaptureFixture[str]) -> None:
    def work() -> float:
        world, link = current_world(), open_link()
        assert world is not None
        world.form_replica((0,), "nccl")
        total = torch.ones(3, device="cuda")
        link.all_reduce(total, "sum").wait()
        torch.distributed.all_reduce(total)
        link.close()
        return float(total.sum())

    assert launch_local(work, 1, timeout_s=60) == 3
    told = capfd.readouterr()
    assert "arning" not in told.err, told.err


def test_a_transfer_that_never_ends_is_told_at_the_deadline() -> None:
    """The link tells it, before NCCL's own watchdog would end the process."""

    def work() -> tuple[str, float]:
        link, begin = open_link(), time.monotonic()
        total = torch.ones(3, device="cuda")
        torch.cuda._sleep(20_000_000_000)  # cycles, some 10 s: the transfer waits for it
        with pytest.raises(PeerLost) as caught:
            link.all_reduce(total, "sum").wait()
        took = time.monotonic() - begin
        time.sleep(2)  # in which a watchdog would strike
        link.close()
        return str(caught.value), took

    told, took = launch_local(work, 1, timeout_s=1.0)
    assert "rank 0 lost a peer in sum" in told
    assert 1 <= took < 8


def test_a_member_that_never_comes_is_named_at_the_deadline() -> None:
    def work() -> str:
        world = current_world()
        assert world is not None
        if world.rank == 1:
            world.board.wait("over", 60)
            return ""
        with pytest.raises(PeerLost) as caught:
            open_link(2)
        world.board.set("over", b"")
        return str(caught.value)

    told = launch_local(work, 2, timeout_s=2.0)
    assert "rank 0 lost rank 1 in form link data" in told
    assert "is alive but did not come" in told


def test_ranks_that_share_a_gpu_are_named() -> None:
    with pytest.raises(UserError, match=r"ranks 0, 1 share a GPU.*next: fewer workers"):
        launch_local(lambda: open_link(2), 2, timeout_s=30)


@several_gpus
@pytest.mark.parametrize("plan", ["data(2)", "site(2, every=3)", "data(2, topology=ring)"])
def test_ranks_on_gpus_of_their_own_give_the_numbers_of_ranks_on_a_cpu(plan: str) -> None:
    made = double_job("global")
    on_gpus = af.train(made, plan, device="cuda", quiet=True).weights
    assert_close(on_gpus, trained_by_threads(made, plan, "cpu"), rtol=1e-9, atol=1e-12)


# The hook for loops of others.


def test_the_hook_fuses_gradients_on_a_gpu(tmp_path: Path) -> None:
    def work() -> tuple[Tensor, Tensor]:
        world = current_world()
        assert world is not None
        world.form_replica((0,), "nccl")
        plain = nn.Linear(8, 4).to("cuda")
        wrapped = nn.parallel.DistributedDataParallel(plain, device_ids=[0])
        wrapped.register_comm_hook(None, af.comm_hook("data(1)"))
        x = torch.randn(16, 8, device="cuda")
        wrapped(x).square().sum().backward()
        assert plain.weight.grad is not None
        expected = torch.autograd.grad(plain(x).square().sum(), plain.weight)[0]
        return plain.weight.grad.cpu(), expected.cpu()

    fused, expected = launch_local(work, 1, timeout_s=60)
    torch.testing.assert_close(fused, expected)


# The command line.

JOB = """
import torch
from torch import nn

import allfuse as af


def job(width=512):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(640, 4, generator=generator)
    y = (x.sum(1) > 0).long() + (x[:, 0] > 1).long()
    return af.Job(
        model=lambda: nn.Sequential(
            nn.Linear(4, width), nn.BatchNorm1d(width), nn.ReLU(),
            nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 3),
        ),
        train=(x, y),
        validation=(x[:100], y[:100]),
        test=(x[:41], y[:41]),
        loss=lambda outputs, batch: nn.functional.cross_entropy(outputs, batch[1]),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
        metrics={"accuracy": af.accuracy},
        batch_size=64,
        stop=af.Stop(epochs=3),
        save_every=7,
        inputs=["a", "b", "c", "d"],
        classes=["low", "middle", "high"],
    )
"""


@pytest.fixture
def job_file(tmp_path: Path) -> Path:
    path = tmp_path / "job.py"
    path.write_text(JOB)
    return path


def allfuse(*arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "allfuse", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


def device_of(run: Path) -> str:
    with (run / "events.jsonl").open() as lines:
        return str(json.loads(next(lines))["device"])


def test_a_run_goes_on_from_what_was_saved_while_it_trained(tmp_path: Path, job_file: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    allfuse("train", job_file, "--device", "cuda", "--out", whole, "-q")
    assert device_of(whole) == "cuda:0"
    allfuse("train", job_file, "--device", "cuda", "--out", broken, "--steps", 17, "-q")
    newest = max((broken / "checkpoints").iterdir())
    assert "17" in newest.name
    shutil.rmtree(newest)  # what is left was copied beside the steps that came after it
    (broken / "model.safetensors").unlink()
    told = allfuse("train", job_file, "--device", "cuda", "--resume", broken).stdout
    assert "14" in told
    a, b = (read_model(run / "model.safetensors") for run in (whole, broken))
    assert_equal(a, b)


def test_a_run_of_a_gpu_predicts_and_measures_on_either_device(
    tmp_path: Path, job_file: Path
) -> None:
    run, rows = tmp_path / "run", tmp_path / "rows.csv"
    allfuse("train", job_file, "--out", run, "-q")
    assert device_of(run) == "cuda:0"  # by itself, where each worker can have one
    values = torch.randn(600, 4, generator=torch.Generator().manual_seed(1)).tolist()
    rows.write_text("\n".join(["a,b,c,d", *(",".join(map(repr, row)) for row in values)]) + "\n")
    figures, labels = [], []
    for device in ("cuda", "cpu"):
        measured = allfuse("evaluate", run, "--device", device, "--json").stdout
        figures.append(json.loads(measured.splitlines()[-1]))
        out = tmp_path / f"{device}.csv"
        allfuse("predict", run, "--input", rows, "--output", out, "--device", device, "-q")
        labels.append([line.split(",")[0] for line in out.read_text().splitlines()])
    on_gpu, on_cpu = (found["metrics"] for found in figures)
    assert on_gpu == pytest.approx(on_cpu, rel=1e-4)
    assert len(labels[0]) == 601
    assert sum(a == b for a, b in zip(*labels, strict=True)) >= 600  # a tie may fall either way


def test_more_workers_than_gpus_are_refused(tmp_path: Path, job_file: Path) -> None:
    out, workers = tmp_path / "run", GPUS + 1
    asked = ("--device", "cuda", "--workers", workers, "--out", out)
    told = allfuse("train", job_file, *asked, code=2).stderr
    assert f"sees {GPUS} GPU" in told
    assert "next: fewer workers" in told
    assert "Traceback" not in told
    assert not out.exists()


def test_more_workers_than_gpus_take_the_cpu_by_themselves(tmp_path: Path, job_file: Path) -> None:
    by_itself, told = tmp_path / "by-itself", tmp_path / "told"
    settings = ("--workers", GPUS + 1, "--set", "width=64", "-q")
    allfuse("train", job_file, "--out", by_itself, *settings)
    allfuse("train", job_file, "--out", told, "--device", "cpu", *settings)
    assert device_of(by_itself) == device_of(told) == "cpu"
    a, b = (read_model(run / "model.safetensors") for run in (by_itself, told))
    assert_equal(a, b)
