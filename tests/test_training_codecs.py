"""Training with codecs and with rules for gradients: what resumes, is equal, or is refused."""

from __future__ import annotations

import functools
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_codec import LOSSY
from test_rule import variants as rule_variants
from torch import nn
from training_cases import (
    assert_equal,
    job,
    network,
    normed_network,
    points,
    session,
    train,
    under,
)

from allfuse.base.errors import UserError
from allfuse.codec import Codec
from allfuse.fusion import Fuser
from allfuse.job import Stop
from allfuse.plan import as_plan
from allfuse.rule import Mean, Rule
from allfuse.store.checkpoint import Checkpoints
from allfuse.store.writing import write_checkpoint
from allfuse.training.step import Step
from allfuse.verify.verify import verify_job

RULES = [rule for rule in rule_variants() if not isinstance(rule, Mean)]


def wide_network() -> nn.Module:
    return nn.Sequential(
        nn.Linear(4, 40), nn.Tanh(), nn.Linear(40, 30), nn.Tanh(), nn.Linear(30, 1)
    ).double()


def wide_job(**changes: object):  # type: ignore[no-untyped-def]
    return job(model=wide_network, train=points(48), **changes)


@pytest.mark.parametrize("codec", LOSSY, ids=str)
@pytest.mark.parametrize("plan", ["data(3, codec={})", "site(3, every=2, codec={})"])
def test_all_ranks_end_equal_and_near_to_what_no_codec_gives(codec: Codec, plan: str) -> None:
    text = plan.format(codec)
    assert as_plan(text).promise == "replayed"
    results = train(wide_job(stop=Stop(epochs=12)), text)
    for result in results:
        assert_equal(result.weights, results[0].weights, exact=True)
    first = loss_of("data(1)", Stop(steps=1))
    gain, whole = first - results[0].loss, first - loss_of(plan.format("identity"), Stop(epochs=12))
    assert gain > 0.7 * whole


@functools.cache
def loss_of(plan: str, stop: Stop) -> float:
    """What all codecs are compared with."""
    return float(train(wide_job(stop=stop), plan)[0].loss)


RESUMED = [
    "data(3, codec={})",
    "site(2, every=2, codec={})",
    "site(2, every=2) * data(2, codec={})",
]


@pytest.mark.parametrize(
    ("plan", "codec"),
    [  # each codec once, each plan with every third one; make test-all takes all pairs
        pytest.param(plan, codec, marks=() if (i + j) % 3 == 0 else pytest.mark.slow)
        for i, plan in enumerate(RESUMED)
        for j, codec in enumerate(LOSSY)
    ],
    ids=str,
)
def test_what_was_not_sent_is_saved_so_that_resuming_is_bit_equal(
    codec: Codec, plan: str, tmp_path: Path
) -> None:
    text = plan.format(codec)
    for steps in (3, 8):
        resumed = train(wide_job(stop=Stop(steps=steps)), text, out=tmp_path / "run", resume="auto")
    whole = train(wide_job(stop=Stop(steps=8)), text)
    assert_equal(resumed[0].weights, whole[0].weights, exact=True)


WARM = ["topk(0.1, warm={})", "lowrank(2, warm={})", "int4(stochastic=true, warm={})"]


@pytest.mark.parametrize("codec", WARM)
@pytest.mark.parametrize(
    "plan", ["data(3, topology={}, codec={})", "site(3, topology={}, codec={})"]
)
def test_warm_rounds_train_as_no_codec_does_and_the_next_one_does_not(
    codec: str, plan: str
) -> None:
    for steps, equal in ((4, True), (5, False)):
        made = wide_job(stop=Stop(steps=steps))
        coded = train(made, plan.format("central", codec.format(4)))[0].weights
        plain = train(made, plan.format("central", "identity"))[0].weights
        assert equal == all(torch.equal(coded[name], plain[name]) for name in plain)


@pytest.mark.parametrize("codec", WARM)
@pytest.mark.parametrize(
    "plan",
    ["data(3, codec={})", "site(2, every=2, codec={})", "site(2, every=2) * data(2, codec={})"],
)
def test_a_run_that_is_resumed_goes_on_counting_its_warm_rounds(
    codec: str, plan: str, tmp_path: Path
) -> None:
    text = plan.format(codec.format(2 if plan.startswith("site(2, every=2, codec") else 4))
    for steps in (3, 6, 10):  # within the warm rounds and after them
        resumed = train(wide_job(stop=Stop(steps=steps)), text, out=tmp_path / "run", resume="auto")
    whole = train(wide_job(stop=Stop(steps=10)), text)
    assert_equal(resumed[0].weights, whole[0].weights, exact=True)
    cold = train(wide_job(stop=Stop(steps=10)), plan.format(codec.replace(", warm={}", "")))
    assert any(not torch.equal(whole[0].weights[n], cold[0].weights[n]) for n in whole[0].weights)


def residual_sums(folder: Path, step: int) -> dict[str, torch.Tensor]:
    """Of each parameter, the sum over ranks of what they had not sent at a checkpoint."""
    checkpoints = Checkpoints(folder / "checkpoints")
    sums: dict[str, torch.Tensor] = {}
    for writer in checkpoints.writers(step):
        kept = checkpoints.read(step, rank=writer)[0]["fusions"][0]
        for name, residual in kept["residuals"].items():
            sums[name] = sums.get(name, 0) + residual
    return sums


def test_under_another_number_of_workers_nothing_that_was_not_sent_is_lost(tmp_path: Path) -> None:
    codec = "topk(0.1)"
    train(wide_job(stop=Stop(steps=4)), f"data(3, codec={codec})", out=tmp_path / "run")
    before = residual_sums(tmp_path / "run", 4)
    assert any(bool(residual.any()) for residual in before.values())
    taken: list[dict[str, torch.Tensor]] = []

    def work() -> None:
        with session(out=tmp_path / "run", resume=True, plan=f"data(2, codec={codec})") as s:
            model = s.model(wide_network)
            s.optimizer(torch.optim.Adam(model.parameters(), lr=1e-2))
            for _ in s.batches(points(48), batch_size=6, steps=5):
                kept = s.learners[0].fusion.capture()
                assert kept is not None
                taken.append({name: value.clone() for name, value in kept["residuals"].items()})
                break

    under(f"data(2, codec={codec})", work)
    assert len(taken) == 2
    for name, total in before.items():
        torch.testing.assert_close(taken[0][name] + taken[1][name], total.reshape(-1))


def test_a_plan_without_codecs_goes_on_from_one_with_them_and_back(tmp_path: Path) -> None:
    plans = ["data(3, codec=int8)", "data(1)", "site(2, every=2, codec=topk(0.1))", "data(2)"]
    for number, plan in enumerate(plans, start=1):
        results = train(
            wide_job(stop=Stop(steps=3 * number)), plan, out=tmp_path / "run", resume="auto"
        )
        assert all(bool(value.isfinite().all()) for value in results[0].weights.values())


@pytest.mark.parametrize("plan", ["data(2)", "data(1)"])
def test_without_a_codec_what_one_had_not_sent_goes_with_the_next_step(
    plan: str, tmp_path: Path
) -> None:
    rate = 1e-2
    made = wide_job(
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=rate), stop=Stop(steps=4)
    )
    before = train(made, "data(3, codec=topk(0.1))", out=tmp_path / "run")[0].weights
    unsent = residual_sums(tmp_path / "run", 4)
    went_on = replace(made, stop=Stop(steps=5))
    shutil.copytree(tmp_path / "run", tmp_path / "forgetful")
    forget_unsent(tmp_path / "forgetful")
    after = train(went_on, plan, out=tmp_path / "run", resume=True)[0].weights
    without = train(went_on, plan, out=tmp_path / "forgetful", resume=True)[0].weights
    assert any(not torch.equal(before[name], after[name]) for name in before)
    for name, residual in unsent.items():
        expected = without[name] - rate * residual.view(without[name].shape)
        torch.testing.assert_close(after[name], expected, rtol=0, atol=1e-12)


def forget_unsent(out: Path) -> None:
    """Make the newest checkpoint one of which nothing was left unsent."""
    checkpoints = Checkpoints(out / "checkpoints")
    state, note = checkpoints.read(4)
    for fusion in state["fusions"]:
        for residual in fusion["residuals"].values():
            residual.zero_()
    alone = {**state, "fusions": [None for _ in state["fusions"]]}
    write_checkpoint(out / "checkpoints", 4, alone, note={**note, "plan": "data(1)"})


@pytest.mark.parametrize("plan", ["site(2, every=2)", "data(1)"])
def test_without_a_codec_what_sites_had_not_sent_becomes_part_of_their_weights(
    plan: str, tmp_path: Path
) -> None:
    made = wide_job(stop=Stop(steps=4))
    train(made, "site(2, every=2, codec=topk(0.1))", out=tmp_path / "run")
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints")
    states = [checkpoints.read(4, rank=rank)[0] for rank in checkpoints.writers(4)]
    unsent = [state["rounds"]["fusion"]["residuals"] for state in states]
    taken: list[list[torch.Tensor]] = []

    def work() -> None:
        with session(out=tmp_path / "run", resume=True, plan=plan) as s:
            model = s.model(wide_network)
            s.optimizer(torch.optim.Adam(model.parameters(), lr=1e-2))
            for _ in s.batches(points(48), batch_size=6, steps=5):
                taken.append([p.detach().clone() for p in model.parameters()])
                break

    under(plan, work)
    for number, name in enumerate(dict(wide_network().named_parameters())):
        held = [state["models"]["model"][name] for state in states]
        lost = sum(each[name] for each in unsent).view(held[0].shape)
        mean = torch.stack([each[number] for each in taken]).mean(0)
        torch.testing.assert_close(mean, torch.stack(held).mean(0) + lost, rtol=0, atol=1e-12)
    assert any(bool(each.any()) for each in unsent[0].values())


@pytest.mark.parametrize("axis", ["data(2, codec={})", "site(2, codec={})"])
def test_a_codec_does_not_go_on_from_what_another_remembers(axis: str, tmp_path: Path) -> None:
    for number, codec in enumerate(["lowrank(1)", "lowrank(2)", "lowrank(1)"], start=1):
        plan = axis.format(codec)
        train(wide_job(stop=Stop(steps=2 * number)), plan, out=tmp_path / "run", resume="auto")


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_gradients_are_fused_by_every_rule_alike_on_all_ranks(rule: Rule, tmp_path: Path) -> None:
    plan = f"data(3, rule={rule})"
    results = train(job(accumulate=2), plan)
    for result in results:
        assert_equal(result.weights, results[0].weights, exact=True)
    for steps in (3, 8):
        resumed = train(job(stop=Stop(steps=steps)), plan, out=tmp_path / "run", resume="auto")
    whole = train(job(stop=Stop(steps=8)), plan)
    assert_equal(resumed[0].weights, whole[0].weights, exact=True)


REPLAYED = [
    *(f"data(3, codec={codec})" for codec in LOSSY),
    *(f"data(3, rule={rule})" for rule in RULES),
    *(f"site(3, every=2, codec={codec})" for codec in LOSSY),
    *(f"site(3, every=2, rule={rule})" for rule in RULES if rule.fuses_weights),
    "data(2, codec=int4, topology=ring)",
    "data(3, codec=int8(stochastic=true), topology=ring)",
    "data(4, codec=topk(0.1), topology=halving)",
    "data(5, codec=sign, topology=tree(double))",
    "data(3, codec=lowrank(2), topology=ring)",
    "data(3, codec=int8, rule=clipped(0.1))",
    "data(1, rule=vote)",
    *(f"data(3, codec={codec.format(3)})" for codec in WARM),
    *(f"site(3, every=2, codec={codec.format(1)})" for codec in WARM),
    "data(5, codec=sign(warm=2), topology=exchange)",
    "site(2, every=3, codec=topk(0.2)) * data(2, codec=int8)",
    "site(2, every=2, rule=median) * data(2, rule=vote)",
    "site(3, every=2, rule=ties(density=0.4))",
    "site(3, every=4, rule=model_stock, outer=nesterov(lr=0.7, momentum=0.5))",
    "site(2, every=3, delay=1, fragments=2, rule=ties(density=0.4, scale=0.8)) * data(2)",
    "site(3, every=end, rule=model_stock)",
]


@pytest.mark.parametrize("plan", REPLAYED)
def test_verify_replays_what_is_lost_and_what_is_kept(plan: str) -> None:
    made = functools.partial(wide_job, accumulate=2, clip=0.5, batch_size=7)
    report = verify_job(made, plan, steps=6, threads=True)
    assert report.promise == "replayed"
    assert report.ok, report.first


TIED = [
    "data(2, codec=int8)",
    "data(3, codec=lowrank(2), topology=ring)",
    "data(4, rule=median)",
    "data(3, rule=clipped(0.1), codec=int4)",
    "site(2, every=2) * data(2, rule=vote)",
]


@pytest.mark.parametrize("plan", TIED)
@pytest.mark.parametrize("accumulate", [1, 3])
def test_verify_replays_gradients_that_batch_norm_ties_together(plan: str, accumulate: int) -> None:
    made = functools.partial(job, model=normed_network, batch_size=10, accumulate=accumulate)
    report = verify_job(made, plan, steps=4, threads=True)
    assert report.ok, report.first


def test_verify_finds_a_residual_that_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Fuser.start

    def forgets(self: Fuser, block: Any, operation: str, **keywords: Any) -> Any:
        if (memory := keywords.get("memory")) is not None and self.link.rank == 1:
            memory.residual.zero_()
        return whole(self, block, operation, **keywords)

    monkeypatch.setattr(Fuser, "start", forgets)
    assert not verify_job(wide_job, "data(3, codec=topk(0.1))", steps=4, threads=True).ok


@pytest.mark.parametrize("plan", ["data(3, codec=sign(warm=2))", "site(3, codec=int4(warm=2))"])
def test_verify_finds_warm_rounds_that_are_miscounted(
    plan: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Fuser.encodes
    monkeypatch.setattr(Fuser, "encodes", lambda self, round: whole(self, round + 1))
    assert not verify_job(wide_job, plan, steps=4, threads=True).ok


def test_verify_finds_a_weight_that_is_not_the_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Step, "weights", property(lambda self: [1.0] * len(self.group)))
    made = functools.partial(wide_job, batch_size=7)
    assert not verify_job(made, "data(3, rule=trimmed(0.4))", steps=3, threads=True).ok


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("workers", [1, 3])
def test_one_step_by_a_rule_is_what_the_rule_makes_of_the_gradients_of_all(
    rule: Rule, workers: int
) -> None:
    """Against gradients that are computed one after the other, of uneven shares."""
    x, y = points(7)
    rate = 0.1
    made = job(
        train=(x, y),
        batch_size=7,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=rate),
        stop=Stop(steps=1),
    )
    found = train(made, f"data({workers}, rule={rule})")[0].weights
    shares: list[tuple[int, Any]] = []

    def look() -> None:
        with session() as s:
            s.model(lambda: nn.Linear(1, 1))
            shares.extend((s.rank, batch) for batch in s.batches((x, y), batch_size=7, steps=1))

    under(f"data({workers})", look)
    torch.manual_seed(0)
    model = network()
    start = [p.detach().clone() for p in model.parameters()]
    rows, weights = [], []
    for _, batch in sorted(shares, key=lambda pair: pair[0]):
        model.zero_grad()
        nn.functional.mse_loss(model(batch[0]), batch[1]).backward()
        rows.append(torch.cat([p.grad.reshape(-1) for p in model.parameters()]))
        weights.append(float(len(batch[0])))
    values, told = torch.stack(rows), torch.tensor(weights, dtype=torch.float64)
    if hasattr(rule, "fuse"):
        fused = rule.fuse(values, told)
    else:
        lengths = [rule.shrink(float(v.norm())) if rule.needs_norm else 1.0 for v in values]
        parts = [rule.prepare(v * k, w) for v, k, w in zip(values, lengths, weights, strict=True)]
        fused = rule.finish(torch.stack(parts).sum(0), sum(weights))
    place = 0
    for name, first in zip(found, start, strict=True):
        step = fused[place : place + first.numel()].view_as(first)
        place += first.numel()
        torch.testing.assert_close(found[name], first - rate * step)


def test_a_corrupt_rank_does_not_move_the_median_of_gradients() -> None:
    def work(rule: str, corrupt: bool) -> torch.Tensor:
        with session(plan=f"data(5, rule={rule})") as s:
            model = s.model(lambda: nn.Linear(4, 1).double())
            s.optimizer(torch.optim.SGD(model.parameters(), lr=0.05))
            for batch in s.batches(points(40), batch_size=40, epochs=30):
                factor = -1e3 if corrupt and s.rank == 3 else 1.0
                s.step(batch, lambda out, b, f=factor: f * (out - b[1]).square().mean())
            return model.weight.detach().clone()

    good = under("data(5, rule=median)", lambda: work("median", False))[0]
    robust = under("data(5, rule=median)", lambda: work("median", True))[0]
    mean = under("data(5)", lambda: work("mean", True))[0]
    assert float((robust - good).norm()) < 0.2 * float(good.norm())
    assert float((mean - good).norm()) > float(good.norm())


@pytest.mark.parametrize("plan", ["data(2, codec=int8)", "data(2, rule=vote)"])
def test_half_precision_with_loss_scaling_is_refused(plan: str) -> None:
    with pytest.raises(UserError, match="allowed: bf16 or fp32 here, or rule=mean"):
        train(replace(job(), precision="fp16"), plan)


def test_a_step_that_is_not_finite_leaves_nothing_behind() -> None:
    from allfuse.base.errors import NonFiniteLoss

    def work() -> bool:
        with session(plan="data(2, codec=topk(0.5))") as s:
            model = s.model(lambda: nn.Linear(4, 1).double())
            s.optimizer(torch.optim.SGD(model.parameters(), lr=0.01))
            for step, batch in enumerate(s.batches(points(40), batch_size=4, epochs=1)):
                bad = float("nan") if step == 3 and s.rank == 0 else 1.0
                try:
                    s.step(batch, lambda out, b, f=bad: f * (out - b[1]).square().mean())
                except NonFiniteLoss:
                    assert step == 3
                    break
            kept = s.learners[0].fusion.capture()
            assert kept is not None
            return all(bool(value.isfinite().all()) for value in kept["residuals"].values())

    assert under("data(2, codec=topk(0.5))", work) == [True, True]
