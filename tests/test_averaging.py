"""Weights averaged along the steps, and snapshots of them: torch's numbers, whoever holds what."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_training_loss import left_of, moments
from test_training_split import CASES, assert_near
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from training_cases import (
    Recorded,
    assert_equal,
    job,
    mse,
    network,
    normed_network,
    points,
    session,
    train,
    under,
)

import allfuse as af
from allfuse.base.errors import JobError, PlanError, RunError, UserError
from allfuse.job import Job, Stop
from allfuse.prediction.restore import read_average, read_weights
from allfuse.store.run import RunFolder
from allfuse.store.tensorfile import read_model
from allfuse.sync.averaging import Averaging
from allfuse.training.averaging import Averages
from allfuse.training.loop import train_job
from allfuse.verify import verify_job

RULES: list[Averaging] = [
    af.EMA(decay=0.9),
    af.EMA(decay=0.8, every=3, start=2),
    af.SWA(start=4, every=2),
]
EMA, SWA = RULES[0], RULES[2]


def often(*cases: tuple[Any, ...], seldom: list[Any]) -> list[Any]:
    """Cases that are tested each time, and those that are left to test-all."""
    return [*cases, *(pytest.param(*case, marks=pytest.mark.slow) for case in seldom)]


def cut_job(case: str = "mlp", **changes: Any) -> Job:
    """Of a model that every plan can cut."""
    return CASES[case].job(**{"stop": Stop(steps=8), **changes})


def torchs(made: Job, steps: set[int] | None = None, plan: str = "data(1)") -> AveragedModel:
    """torch's own average of the weights as they are after each step that counts."""
    rule, found = made.average, []
    assert rule is not None
    is_ema = isinstance(rule, af.EMA)

    def prepare(s: Any) -> None:
        def count(s: Any, event: Any) -> None:
            model = s.state.only_model()
            if s.rank == 0 and (event.step in steps if steps else rule.is_due(event.step, False)):
                if not found:
                    how = get_ema_multi_avg_fn(rule.decay) if is_ema else None
                    found.append(AveragedModel(model, multi_avg_fn=how, use_buffers=True))
                found[0].update_parameters(model)

        s.on("step", count)

    train(replace(made, average=None), plan, prepare=prepare)
    return found[0]


def numbers(average: AveragedModel) -> dict[str, Tensor]:
    """All but counters: torch averages these, too."""
    held = average.module.state_dict().items()
    return {name: value for name, value in held if value.is_floating_point()}


def written(out: Path, name: str = "average") -> dict[str, Tensor]:
    held = read_model(out / f"{name}.safetensors").items()
    return {name: value for name, value in held if value.is_floating_point()}


def loss_of(model: nn.Module) -> float:
    x, y = points(9)
    with torch.no_grad():
        return float(mse(model(x), (x, y)))


@pytest.mark.parametrize(
    ("rule", "case", "plan"),
    often(
        (EMA, "mlp", "data(1)"),
        (SWA, "mlp", "data(2)"),
        (EMA, "mlp", "shard(2)"),
        (EMA, "mlp", "tensor(2)"),
        (SWA, "mlp", "pipe(2)"),
        seldom=[
            (rule, "tied", plan)
            for rule in RULES
            for plan in ("data(2)", "shard(2)", "tensor(2)", "pipe(2)", "data(2) * shard(2)")
        ],
    ),
    ids=str,
)
def test_the_average_is_torchs_under_every_plan(
    rule: Averaging, case: str, plan: str, tmp_path: Path
) -> None:
    made = cut_job(case, average=rule)
    results = train(made, plan, out=tmp_path / "run")
    assert_near(written(tmp_path / "run"), numbers(torchs(made)))
    without = train(replace(made, average=None), plan)
    assert_equal(results[0].weights, without[0].weights, exact=True)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_buffers_are_averaged_as_weights_are(rule: Averaging, tmp_path: Path) -> None:
    made = job(model=normed_network, average=rule)
    under("data(1)", lambda: spent(made, tmp_path / "run"))
    assert_near(written(tmp_path / "run"), numbers(torchs(made)))


def spent(made: Job, out: Path) -> None:
    """A script's own loop, in which nobody takes statistics anew."""
    assert made.average is not None
    with session(out=out) as s:
        model = s.model(made.model)
        optimizer = s.optimizer(made.optimizer(model.parameters()))
        s.average(made.average)
        assert optimizer.param_groups
        for batch in s.batches(made.train, made.batch_size, epochs=made.stop.epochs):
            s.step(batch, mse)
        s.loader_again = None


@pytest.mark.parametrize("plan", ["shard(2)", "tensor(2)"])
def test_no_rank_holds_more_of_the_average_than_of_the_model(plan: str) -> None:
    held: list[tuple[int, int]] = []

    def prepare(s: Any) -> None:
        def look(s: Any, event: Any) -> None:
            (kept,) = s.averages.capture()["models"].values()
            (model,) = s.models.values()
            own = {p for n, p in model.named_parameters() if n not in s.state.elsewhere}
            held.append((sum({id(t): t.numel() for t in kept.values()}.values()), size(own)))

        s.on("step", look)

    train(cut_job(average=af.EMA(), stop=Stop(steps=1)), plan, prepare=prepare)
    whole = size(cut_job().model().parameters())  # type: ignore[union-attr, operator]
    assert len(held) == 2
    for average, model in held:
        assert average == model < 0.8 * whole


def size(tensors: Any) -> int:
    return sum(tensor.numel() for tensor in tensors)


@pytest.mark.parametrize(
    ("rule", "plan"),
    often(
        (af.EMA(decay=0.9, warmup=True), "shard(2)"),
        (af.EMA(decay=0.9), "site(2, every=3)"),
        (af.SWA(start=2), "data(2)"),
        seldom=[(af.SWA(start=2), "pipe(2)"), (af.SWA(start=2), "tensor(2)")],
    ),
    ids=str,
)
def test_a_run_that_is_resumed_goes_on_with_the_same_bits(
    rule: Averaging, plan: str, tmp_path: Path
) -> None:
    made = functools.partial(cut_job, average=rule)
    for steps in (4, 8):
        train(made(stop=Stop(steps=steps)), plan, out=tmp_path / "two", resume="auto")
    train(made(stop=Stop(steps=8)), plan, out=tmp_path / "one")
    assert_equal(written(tmp_path / "two"), written(tmp_path / "one"), exact=True)


@pytest.mark.parametrize(
    ("first", "second"),
    often(
        ("shard(2)", "tensor(2)"),
        ("data(2)", "shard(3)"),
        seldom=[("pipe(2)", "data(1)"), ("tensor(2)", "pipe(2)")],
    ),
)
def test_it_moves_to_another_plan_as_weights_do(first: str, second: str, tmp_path: Path) -> None:
    made = functools.partial(cut_job, average=af.EMA(decay=0.8))
    for plan, steps in ((first, 4), (second, 8)):
        train(made(stop=Stop(steps=steps)), plan, out=tmp_path / "run", resume="auto")
    assert_near(written(tmp_path / "run"), numbers(torchs(made(stop=Stop(steps=8)))))


@pytest.mark.parametrize("plan", ["site(2, every=3)", "site(2, every=3, rule=model_stock)"])
def test_sites_average_what_they_hold_after_rounds(plan: str, tmp_path: Path) -> None:
    made = job(stop=Stop(steps=8), average=af.EMA(decay=0.5), validation=points(9))
    results = train(made, plan, out=tmp_path / "run")
    expected = numbers(torchs(made, {3, 6}, plan))
    assert_equal(written(tmp_path / "run"), expected)
    model = network()
    model.load_state_dict(expected)
    loss = loss_of(model)
    for result in results:
        assert result.average["loss"] == pytest.approx(loss, rel=1e-12)


@pytest.mark.parametrize(
    "plan",
    [
        "site(2, every=end)",
        "site(2, every=4, delay=1)",
        "site(2, every=4, fragments=2)",
        "site(2, topology=gossip)",
        "data(2, sync=asp)",
        "site(2, every=4, sync=asp)",
    ],
)
def test_it_is_refused_where_nobody_has_weights_that_all_agree_on(plan: str) -> None:
    from allfuse.plan import as_plan
    from allfuse.training.averaging import refuse_plan

    with pytest.raises(PlanError, match="nearest that can: ") as caught:
        refuse_plan(as_plan(plan), af.EMA())
    nearest = str(caught.value).rpartition("nearest that can: ")[2]
    refuse_plan(as_plan(nearest), af.EMA())


def test_sites_that_never_agree_are_refused_before_the_first_step() -> None:
    with pytest.raises(PlanError, match=r"site\(2, every=20\)"):
        train(job(average=af.EMA()), "site(2, every=end)")


def network_without_a_lost_bias() -> nn.Module:
    """As `normed_network`, without the bias that BatchNorm takes away again: its gradient is 0, and
    Adam makes steps of the rounding of it, 3e-10 after six where all else is off by 1e-16."""
    first = nn.Linear(4, 6, bias=False)
    return nn.Sequential(first, nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 1)).double()


@pytest.mark.parametrize("plan", ["data(1)", "data(2)", "shard(2)"])
def test_swa_takes_the_statistics_of_batches_anew(plan: str, tmp_path: Path) -> None:
    made = job(
        model=network_without_a_lost_bias,
        batch_size=24,
        average=af.SWA(start=2),
        stop=Stop(epochs=6),
        validation=points(9),
    )
    (first, *_) = train(made, plan, out=tmp_path / "run")
    expected = torchs(made)
    update_bn([points(24)], expected)
    assert_near(written(tmp_path / "run"), numbers(expected))
    plain = expected.module.eval()
    assert first.average["loss"] == pytest.approx(loss_of(plain))


def test_it_is_measured_beside_the_weights_and_leaves_them_alone(tmp_path: Path) -> None:
    made = job(validation=points(9), average=af.EMA(decay=0.9), evaluate_every=4)
    events = Recorded()
    (result,) = train(made, out=tmp_path / "run", prepare=events.attach)
    told = [(e.step, e.data["split"]) for e in events.named("evaluated")]
    assert told == [(step, name) for step in (4, 8) for name in ("validation", "validation (ema)")]
    model = network()
    for name, figures in (("average", result.average), ("model", result.metrics)):
        model.load_state_dict(written(tmp_path / "run", name))
        assert figures["loss"] == pytest.approx(loss_of(model))
    assert result.average != result.metrics


@pytest.mark.parametrize("plan", ["data(1)", "shard(2)", "site(2, every=2)"])
def test_training_that_was_interrupted_has_its_average_in_a_checkpoint(
    plan: str, tmp_path: Path
) -> None:
    train(cut_job(average=af.EMA(decay=0.7)), plan, out=tmp_path / "run")
    folder = RunFolder.open(tmp_path / "run")
    for read, path in ((read_average, folder.average_path), (read_weights, folder.model_path)):
        expected = read_model(path)
        path.unlink()
        found, notes = read(folder)
        assert "step 8" in notes[-1]
        for name, value in expected.items():
            torch.testing.assert_close(found.read(name), value, rtol=1e-9, atol=1e-12)


def test_a_run_without_an_average_says_how_to_get_one(tmp_path: Path) -> None:
    train(job(average=af.SWA(start=100)), out=tmp_path / "run")
    assert not (tmp_path / "run" / "average.safetensors").exists()
    with pytest.raises(RunError, match="whose start was reached"):
        read_average(RunFolder.open(tmp_path / "run"))


def test_weights_of_two_bytes_are_averaged_in_four() -> None:
    """Steps of a thousandth would be lost in the rounding of bfloat16."""
    model = nn.Linear(1, 1, bias=False).bfloat16()
    state: Any = SimpleNamespace(models={"model": model}, elsewhere=frozenset())
    averages = Averages(af.EMA(decay=0.999), state)
    for value in [1.0, *[2.0] * 100]:
        model.weight.data.fill_(value)
        averages.update()
    (kept,) = averages.capture()["models"]["model"].values()
    assert float(kept) == pytest.approx(2 - 0.999**100, rel=1e-4)
    with averages.shown():
        assert model.weight.item() == pytest.approx(2 - 0.999**100, rel=4e-3)
        assert model.weight.dtype == torch.bfloat16
    assert model.weight.item() == 2.0


def test_a_warm_average_follows_early_weights() -> None:
    assert [af.EMA(warmup=True).share(n) for n in (1, 8)] == pytest.approx([1 - 2 / 11, 0.5])
    assert af.EMA(decay=0.9, warmup=True).share(10_000) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: af.EMA(decay=1.0), "from 0 to below 1"),
        (lambda: af.EMA(decay=True), "from 0 to below 1"),
        (lambda: af.EMA(every=0), "whole number of steps from 1"),
        (lambda: af.EMA(every="step"), "or 'epoch'"),
        (lambda: af.EMA(warmup=3), "True or False"),
        (lambda: af.SWA(start=-1), "from 0"),
        (lambda: job(average="ema"), r"af\.EMA\(decay=0\.999\)"),
        (lambda: job(snapshots=0), "'epoch' or None"),
    ],
)
def test_settings_without_meaning_are_refused(make: Any, match: str) -> None:
    with pytest.raises(JobError, match=match):
        make()


def test_a_session_says_when_an_average_cannot_be_asked_for() -> None:
    def work() -> None:
        with session() as s:
            model = s.model(network)
            s.optimizer(torch.optim.SGD(model.parameters(), lr=0.1))
            with pytest.raises(UserError, match=r"next: s\.average"), s.averaged():
                pass
            s.average(af.SWA(start=2))
            with pytest.raises(UserError, match="there is one already"):
                s.average(af.EMA())
            for batch in s.batches(points(24), 6, steps=2):
                with pytest.raises(UserError, match="no step has counted yet"), s.averaged():
                    pass
                s.step(batch, mse)
            before = {name: value.clone() for name, value in model.state_dict().items()}
            with s.averaged():
                assert_equal(dict(model.state_dict()), before, exact=True)  # one has counted

    under("data(1)", work)


def test_verify_passes_with_an_average() -> None:
    made = functools.partial(job, average=af.SWA(start=1), snapshots=2)
    assert verify_job(made, "data(2)", steps=4, threads=True).ok


@pytest.mark.parametrize(
    ("plan", "victim"),
    often(("data(3)", 1), seldom=[("data(2) * shard(2)", 3), ("site(3, every=2)", 1)]),
)
def test_it_survives_the_loss_of_a_worker(plan: str, victim: int) -> None:
    made = job(validation=points(10), evaluate_every=2, average=af.EMA(decay=0.8), snapshots=3)
    work = functools.partial(train_job, made)
    (alone,) = train(made)
    for moment in moments(plan, work, victim, 6):
        left = left_of(plan, work, (victim, moment))
        assert all(each.average == left[0].average for each in left)
        if "site" not in plan:
            assert left[0].average["loss"] == pytest.approx(alone.average["loss"], rel=1e-9)


# Snapshots.


@pytest.mark.parametrize(
    "plan",
    [
        "data(2)",
        "shard(2)",
        *(pytest.param(p, marks=pytest.mark.slow) for p in ("pipe(2)", "tensor(2)")),
    ],
)
def test_snapshots_are_the_weights_of_their_step(plan: str, tmp_path: Path) -> None:
    made = functools.partial(cut_job, snapshots=3)
    for steps in (4, 8):
        train(made(stop=Stop(steps=steps)), plan, out=tmp_path / "run", resume="auto")
    folder = tmp_path / "run" / "snapshots"
    assert sorted(path.name for path in folder.iterdir()) == [
        "step-000003.safetensors",
        "step-000006.safetensors",
    ]
    (alone,) = train(cut_job(stop=Stop(steps=6)))
    assert_near(written(tmp_path / "run", "snapshots/step-000006"), alone.weights)


def test_sites_write_the_mean_of_their_weights_and_go_on_with_their_own(tmp_path: Path) -> None:
    plan = "site(2, every=4)"
    held: list[dict[str, Tensor]] = []

    def prepare(s: Any) -> None:
        def look(s: Any, event: Any) -> None:
            if event.step == 3:
                held.append({n: p.clone() for n, p in s.state.only_model().state_dict().items()})

        s.on("step", look)

    made = job(stop=Stop(steps=6), snapshots=3)
    results = train(made, plan, out=tmp_path / "run", prepare=prepare)
    mean = {name: (held[0][name] + held[1][name]) / 2 for name in held[0]}
    assert_equal(written(tmp_path / "run", "snapshots/step-000003"), mean)
    without = train(replace(made, snapshots=None), plan)
    assert_equal(results[0].weights, without[0].weights, exact=True)


def test_a_snapshot_that_cannot_be_written_is_told_and_training_goes_on(tmp_path: Path) -> None:
    events = Recorded()

    def prepare(s: Any) -> None:
        events.attach(s)
        s.on("start", lambda *_: (tmp_path / "run" / "snapshots").write_text("in the way"))

    made = job(stop=Stop(steps=4), snapshots=2)
    (result,) = train(made, out=tmp_path / "run", prepare=prepare)
    assert result.steps == 4
    told = [event.data["text"] for event in events.named("warning")]
    assert len(told) == 2
    assert all("was not exported: cannot read or write" in text for text in told)


def test_snapshots_are_refused_where_workers_are_out_of_step() -> None:
    from allfuse.plan import as_plan
    from allfuse.training.snapshot import refuse_snapshots

    with pytest.raises(PlanError, match=r"nearest that can: data\(2\)"):
        refuse_snapshots(as_plan("data(2, sync=asp)"))
    refuse_snapshots(as_plan("site(2, every=4)"))
