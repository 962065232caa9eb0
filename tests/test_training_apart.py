"""Training where a scheduler hands out work and servers hold the parameters."""

from __future__ import annotations

import json
import math
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from crews import run_crew, small_job, train_crew, train_crew_into

import allfuse as af
from allfuse.base.errors import Interrupted, NonFiniteLoss, PlanError, UserError
from allfuse.job import Job
from allfuse.launcher import current_world
from allfuse.launcher.thread import launch_threads
from allfuse.link.mailroom import Fault, random_faults
from allfuse.roles.agent import Agent
from allfuse.training import outflow
from allfuse.training.loop import train_job
from allfuse.training.start import build_model

STEPS = 14  # of two epochs of `small_job`


def weights_of(job: Job, plan: str) -> dict[str, Any]:
    """The weights after training in step, on threads."""
    results = launch_threads(lambda: train_job(job), int(af.plan.as_plan(plan).workers), plan=plan)
    return results[0].weights


def assert_close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("servers", [1, 2, 3])
def test_bsp_over_servers_equals_one_worker(servers: int) -> None:
    told = train_crew(small_job(), f"data(3, topology=central(servers={servers}))")
    assert_close(told.result.weights, weights_of(small_job(), "data(1)"))
    assert told.result.steps == STEPS


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda parameters: torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1),
        lambda parameters: torch.optim.Adagrad(parameters, lr=0.05),
    ],
)
def test_bsp_over_servers_equals_one_worker_whatever_the_optimizer(optimizer: Any) -> None:
    job = small_job(optimizer=optimizer)
    told = train_crew(job, "data(2, topology=central(servers=2))")
    assert_close(told.result.weights, weights_of(job, "data(1)"))


def test_bsp_over_servers_follows_a_learning_rate_schedule() -> None:
    job = small_job(
        scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 3, gamma=0.5)
    )
    told = train_crew(job, "data(2, topology=central(servers=1))")
    assert_close(told.result.weights, weights_of(job, "data(1)"))


def test_ssp_0_equals_bsp_bit_for_bit() -> None:
    plan = "data(3, topology=central(servers=2){})"
    bsp = train_crew(small_job(), plan.format("")).result.weights
    ssp = train_crew(small_job(), plan.format(", sync=ssp(0)")).result.weights
    assert all(torch.equal(value, ssp[name]) for name, value in bsp.items())


def test_bsp_over_servers_equals_one_worker_under_lost_doubled_and_late_letters() -> None:
    faults = random_faults(7, drop=0.03, double=0.1, swap=0.1, delay=0.1, delay_s=0.02)
    job = small_job(stop=af.Stop(steps=5))
    told = train_crew(job, "data(2, topology=central(servers=2))", faults)
    ends = [result.weights for result in told.results if not result.elsewhere]
    assert ends  # of two workers, where the last word of the first one was lost
    for weights in ends:
        assert_close(weights, weights_of(job, "data(1)"))


def test_sites_over_servers_equal_sites_in_step() -> None:
    plan = "site(2, every=3{})"
    told = train_crew(
        small_job(batch_size=16, stop=af.Stop(steps=6)),
        plan.format(", topology=central(servers=2)"),
    )
    job = small_job(batch_size=16, stop=af.Stop(steps=6))
    assert_close(told.result.weights, weights_of(job, plan.format("")))


def test_a_worker_whose_work_and_weights_are_there_waits_for_nothing_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nothing would come to wake it: it would wait out its slice, in each update."""
    monkeypatch.setattr("allfuse.roles.agent.SLICE_S", 60.0)
    begin = time.monotonic()
    train_crew(small_job(), "data(1, topology=central(servers=1), sync=asp)")
    assert time.monotonic() - begin < 20.0


def test_with_a_delay_a_site_goes_on_while_its_update_is_under_way() -> None:
    """All of a lease's steps are done before what came of the first one is here."""
    came: list[float] = []
    steps: list[float] = []

    def faults(sender: str, receiver: str, kind: str, nth: int) -> Fault:
        if kind == "weights":
            came.append(time.monotonic() + 0.5)
        return Fault(delay_s=0.5 if kind == "weights" else 0.0)

    def prepare(session: Any) -> None:
        session.on("step", lambda _, event: steps.append(time.monotonic()))

    plan = "site(1, every=3, delay=2, sync=asp, topology=central(servers=1))"
    job = small_job(stop=af.Stop(steps=6))
    run_crew(lambda: train_job(job, prepare=prepare), plan, faults)
    assert steps[2] < came[1] < steps[3]


def test_with_a_delay_servers_measure_what_they_sent() -> None:
    """And not the mean of that and of what a site has come to."""

    def script() -> tuple[int, int]:
        data, as_sent, other = torch.utils.data.TensorDataset(*small_job().train), 0, 0
        with af.session() as s:
            model = s.model(lambda: torch.nn.Linear(8, 2, bias=False).double())
            optimizer = s.optimizer(torch.optim.SGD(model.parameters(), lr=0.1))
            assert s.apart is not None

            def look(model: torch.nn.Module, batch: Any) -> Any:
                nonlocal as_sent
                (held,) = model.parameters()
                as_sent += torch.equal(held.reshape(-1), s.apart.replica.read[0])
                return model(batch[0])

            for x, y in s.batches(data, batch_size=15, epochs=4):
                s.backward(torch.nn.functional.cross_entropy(model(x), y))
                optimizer.step()
                if s.due("epoch"):
                    (held,) = model.parameters()
                    other += not torch.equal(held.reshape(-1), s.apart.replica.read[0])
                    s.evaluate({"zero": lambda outputs, batch: 0.0}, data, forward=look)
        return as_sent, other

    results = run_crew(script, "site(2, every=2, delay=1, sync=asp)").results
    assert all(as_sent > other for as_sent, other in results if other)
    assert sum(other for _, other in results) >= 1  # of two workers one may have come too late


def test_with_a_delay_every_sample_is_told_once() -> None:
    told = train_crew(small_job(), "site(2, every=4, delay=2, topology=central(servers=2))")
    assert sum(commit["rows"] for commit in told.all("commit")) == 2 * 97


@pytest.mark.parametrize("sync", ["asp", "ssp(2)", "asp(scaled=true)"])
def test_every_sample_of_an_epoch_is_used_once(sync: str) -> None:
    told = train_crew(small_job(), f"data(3, topology=central(servers=1), sync={sync})")
    assert told.result.steps == STEPS
    commits = told.all("commit")
    assert sum(commit["rows"] for commit in commits) == 2 * 97
    units = Counter((commit["block"], commit["part"]) for commit in commits)
    assert set(units.values()) == {1}
    assert len(units) == 3 * STEPS


def test_ssp_keeps_its_bound() -> None:
    told = train_crew(small_job(), "data(3, topology=central(servers=1), sync=ssp(1))")
    assert told.result.steps == STEPS
    (staleness,) = told.all("staleness")
    assert max(lag for lag, _ in staleness["lag"]) <= 1
    assert sum(count for _, count in staleness["missed"]) == len(told.all("commit"))


def test_groups_are_in_step_inside_and_out_of_step_outside() -> None:
    told = train_crew(small_job(), "site(2, every=4, sync=asp) * data(2)")
    assert told.result.steps == STEPS
    for group in told.crew.results:
        first, second = (result.weights for result in group)
        assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_one_group_evaluates_for_all_and_its_findings_pass_on() -> None:
    x, y = torch.randn(20, 8, dtype=torch.float64), torch.zeros(20, dtype=torch.long)
    job = small_job(validation=(x, y), stop=af.Stop(epochs=50, patience=2), evaluate_every=2)
    told = train_crew(job, "data(3, topology=central(servers=1), sync=asp)")
    evaluated = [each for each in told.all("told") if each["event"] == "evaluated"]
    assert 3 <= len(evaluated) <= told.result.steps // 2 + 2
    assert told.result.reason.startswith("no improvement for 2 evaluations")
    assert told.result.steps < 50 * 7


def test_a_codec_both_ways_still_learns_what_plain_values_teach() -> None:
    job = small_job(stop=af.Stop(epochs=6))
    told = train_crew(job, "data(2, topology=central(servers=2), codec=int8)")
    plain = weights_of(job, "data(1)")
    assert told.result.steps == 6 * 7
    for name, value in told.result.weights.items():
        assert (value - plain[name]).norm() < 0.05 * plain[name].norm() + 0.01


def test_an_error_of_the_job_in_one_worker_is_told() -> None:
    def work() -> Any:
        raise UserError("no")

    told = run_crew(work, "data(2, topology=central(servers=1), sync=asp)", timeout_s=1.0)
    assert all(isinstance(result, UserError) for result in told.results)
    assert isinstance(told.crew.roles["scheduler 0"], BaseException | None)


def test_batch_statistics_of_the_whole_batch_are_refused_where_the_plan_would_be_exact() -> None:
    job = small_job(
        model=lambda: torch.nn.Sequential(
            torch.nn.Linear(8, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2)
        ).double()
    )
    told = train_crew(job, "data(2, topology=central(servers=1))")
    assert all(isinstance(result, PlanError) for result in told.results)


def test_statistics_of_batches_meet_at_the_servers() -> None:
    job = small_job(
        model=lambda: torch.nn.Sequential(
            torch.nn.Linear(8, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2)
        ).double()
    )
    told = train_crew(job, "data(2, topology=central(servers=2), sync=asp)")
    mean = told.result.weights["1.running_mean"]
    assert mean.norm() > 0
    assert bool(mean.isfinite().all())


def test_optimizers_that_are_not_per_element_are_refused() -> None:
    job = small_job(optimizer=lambda parameters: torch.optim.Adafactor(parameters, lr=0.1))
    told = train_crew(job, "data(2, topology=central(servers=1))")
    assert all("Adafactor" in str(result) for result in told.results)


@pytest.mark.parametrize("sync", ["", ", sync=ssp(0)"])
def test_servers_clip_the_gradient_that_all_workers_make_together(sync: str) -> None:
    job = small_job(clip=0.1)
    told = train_crew(job, f"data(3, topology=central(servers=2){sync})")
    assert_close(told.result.weights, weights_of(job, "data(1)"))
    plain = weights_of(small_job(), "data(1)")
    assert (told.result.weights["0.weight"] - plain["0.weight"]).norm() > 0.01  # it was clipped


def test_out_of_step_each_worker_clips_its_own_gradient() -> None:
    told = train_crew(small_job(clip=0.1), "data(2, topology=central(servers=2), sync=asp)")
    assert told.result.steps == STEPS


def test_a_plan_with_servers_is_refused_where_nobody_started_them() -> None:
    with pytest.raises(PlanError, match="a scheduler and servers are started by"):
        af.session(plan="data(1, sync=asp)")


def test_a_run_goes_on_from_its_folder_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    plan = "data(2, topology=central(servers=2))"
    whole = train_crew(small_job(), plan).result.weights
    first = train_crew_into(tmp_path / "run", small_job(stop=af.Stop(steps=5)), plan)
    assert first.result.steps == 5
    told = train_crew_into(tmp_path / "run", small_job(), plan, resume=True)
    assert told.result.steps == STEPS
    assert all(torch.equal(value, told.result.weights[name]) for name, value in whole.items())
    assert (tmp_path / "run" / "model.safetensors").exists()


def test_an_interrupted_run_says_how_it_goes_on(tmp_path: Path) -> None:
    def loss(outputs: Any, batch: Any) -> torch.Tensor:
        world = current_world()
        assert world is not None
        world.stop_requested.set()
        return torch.nn.functional.cross_entropy(outputs, batch[1])

    job = small_job(loss=loss, stop=af.Stop(epochs=50))
    told = train_crew_into(tmp_path / "run", job, "data(2, sync=asp)")
    with pytest.raises(Interrupted, match=f"in {tmp_path / 'run'}: go on with"):
        _ = told.result


def test_a_run_is_refused_to_go_on_with_another_job(tmp_path: Path) -> None:
    plan = "data(2, topology=central(servers=1))"
    job = small_job(stop=af.Stop(steps=2))
    assert train_crew_into(tmp_path / "run", job, plan).result.steps == 2
    other = small_job(batch_size=10)
    told = train_crew_into(tmp_path / "run", other, plan, resume=True)
    assert "batch_size" in str(told.crew.roles["scheduler 0"])


@pytest.mark.parametrize("sync", ["bsp", "asp"])
def test_a_part_without_samples_changes_nothing(sync: str) -> None:
    job = small_job(stop=af.Stop(epochs=1))  # the last batch has 7 samples for 8 workers
    told = train_crew(job, f"data(8, topology=central(servers=1), sync={sync})")
    assert told.result.steps == 7
    assert sum(commit["rows"] for commit in told.all("commit")) == 97
    if sync == "bsp":
        assert_close(told.result.weights, weights_of(job, "data(1)"))


def counted_from(first: int) -> Any:
    """A loss over the samples whose first number is above that of most."""

    def loss(outputs: Any, batch: Any) -> Any:
        counts = (batch[0][:, 0] > first).double()
        each = torch.nn.functional.cross_entropy(outputs, batch[1], reduction="none")
        return (each * counts).sum(), counts.sum()

    return loss


def test_a_share_whose_loss_is_over_nothing_counts_nothing_in_step() -> None:
    job = small_job(loss=counted_from(1), batch_size=32, stop=af.Stop(steps=3))
    told = train_crew(job, "data(8, topology=central(servers=2))")
    assert min(commit["count"] for commit in told.all("commit")) == 0
    assert_close(told.result.weights, weights_of(job, "data(1)"))


@pytest.mark.parametrize("plan", ["data(4, sync=asp)", "site(4, every=2, sync=asp)"])
def test_a_share_whose_loss_is_over_nothing_is_no_update_out_of_step(plan: str) -> None:
    job = small_job(loss=counted_from(9), stop=af.Stop(steps=4))  # momentum, and nothing to learn
    told = train_crew(job, plan)
    first = build_model(job.model, job.seed).state_dict()
    assert {commit["weight"] for commit in told.all("commit")} == {0.0}
    assert all(torch.equal(value, first[name]) for name, value in told.result.weights.items())


def test_a_loss_that_is_no_number_names_the_worker_and_the_run_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outflow, "CHUNK_BYTES", 1)  # pushed before anybody looks at the loss

    def loss(outputs: Any, batch: Any) -> torch.Tensor:
        world = current_world()
        assert world is not None
        assert world.crew is not None
        bad = world.crew.index == 1 and world.step == 4
        return torch.nn.functional.cross_entropy(outputs, batch[1]) * (math.nan if bad else 1.0)

    job = small_job(loss=loss, stop=af.Stop(steps=6))
    plan = "data(2, topology=central(servers=2))"
    told = train_crew_into(tmp_path / "run", job, plan)
    (error,) = [each for each in told.results if isinstance(each, NonFiniteLoss)]
    assert "the loss is nan in worker 1 at step 4" in str(error)
    assert f"held is in a checkpoint in {tmp_path / 'run'}" in str(error)
    again = train_crew_into(tmp_path / "run", small_job(stop=af.Stop(steps=6)), plan, resume=True)
    expected = weights_of(small_job(stop=af.Stop(steps=6)), "data(1)")
    assert_close(again.result.weights, expected)


class Gate(torch.autograd.Function):
    """Lets a gradient through once an event is set; not longer than 5 s."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, event: threading.Event) -> torch.Tensor:
        ctx.event = event
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:  # type: ignore[override]
        assert ctx.event.wait(5.0), "nothing was pushed while backward waited"
        return gradient, None


def test_gradients_leave_while_backward_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last layer's are on their way before the first layer's are made."""
    pushed, push = threading.Event(), Agent.push

    def tell(self: Agent, gradients: Any, options: Any, scale: float = 1.0) -> None:
        push(self, gradients, options, scale)
        pushed.set()

    monkeypatch.setattr(Agent, "push", tell)
    monkeypatch.setattr(outflow, "CHUNK_BYTES", 1)

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = torch.nn.Linear(8, 9).double(), torch.nn.Linear(9, 2).double()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden: torch.Tensor = Gate.apply(self.first(x), pushed)
            out: torch.Tensor = self.last(hidden)
            return out

    job = small_job(model=Net, stop=af.Stop(steps=1))
    told = train_crew(job, "data(1, topology=central(servers=2), sync=asp)")
    assert told.result.steps == 1


def test_gradients_that_left_early_are_those_that_would_have_left_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    job = small_job(loss=counted_from(0), accumulate=2)
    plan = "data(2, topology=central(servers=2), codec=int8)"
    late = train_crew(job, plan).result.weights
    monkeypatch.setattr(outflow, "CHUNK_BYTES", 1)
    early = train_crew(job, plan).result.weights
    assert all(torch.equal(value, early[name]) for name, value in late.items())


def test_a_batch_is_fetched_while_its_weights_travel() -> None:
    """Weights of the second lease come late, and only then is there time to fetch its batch."""
    fetched: list[float] = []

    class Data(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return 8

        def __getitem__(self, index: int) -> Any:
            fetched.append(time.monotonic())
            return torch.ones(8, dtype=torch.float64), torch.tensor(0)

    came: list[float] = []

    def faults(sender: str, receiver: str, kind: str, nth: int) -> Fault:
        if kind == "weights" and receiver.startswith("worker"):
            came.append(time.monotonic() + 0.2)
            return Fault(delay_s=0.2)
        return Fault()

    job = small_job(train=Data(), batch_size=4, stop=af.Stop(steps=2))
    train_crew(job, "data(1, topology=central(servers=1), sync=asp)", faults)
    assert fetched[4] < came[1]  # the first batch is fetched when it is known what the data are


def test_the_loss_told_at_the_end_is_of_samples_also_where_the_last_part_had_none() -> None:
    job = small_job(batch_size=1, stop=af.Stop(steps=12))
    assert torch.tensor(train_crew(job, "data(3, sync=asp)").result.loss).isfinite()


@pytest.mark.parametrize("plan", ["data(3, sync=asp)", "site(3, topology=gossip, sync=asp)"])
def test_the_loss_told_at_the_end_is_of_samples_also_by_a_worker_that_never_had_any(
    plan: str,
) -> None:
    """Of one batch of one sample: whoever ends the run most often has had another part."""
    job = small_job(batch_size=1, stop=af.Stop(steps=1))
    for _ in range(4):
        told = train_crew(job, plan)
        (loss,) = [each["loss"] for each in told.all("commit") if each["count"]]
        assert told.result.loss == pytest.approx(loss, rel=1e-12)


@pytest.mark.parametrize("plan", ["data(2, sync=asp)", "site(2, every=4, sync=asp)"])
def test_what_a_script_asks_for_every_so_often_is_due(plan: str) -> None:
    def script() -> int:
        data, count = torch.utils.data.TensorDataset(*small_job().train), 0
        with af.session() as s:
            model = s.model(lambda: torch.nn.Linear(8, 2).double())
            optimizer = s.optimizer(torch.optim.SGD(model.parameters(), lr=0.1))
            for x, y in s.batches(data, batch_size=15, epochs=4):
                s.backward(torch.nn.functional.cross_entropy(model(x), y))
                optimizer.step()
                optimizer.zero_grad()
                count += s.due("epoch")
        return count

    counts = run_crew(script, plan).results
    assert max(counts) >= 1, counts


@pytest.mark.parametrize("how", ["topology=central(servers=1)", "topology=gossip, sync=asp"])
def test_what_is_due_is_done_once_however_many_steps_a_lease_has(how: str) -> None:
    job = small_job(validation=small_job().train, evaluate_every=4, stop=af.Stop(steps=12))
    told = train_crew(job, f"site(2, every=4, {how})")
    due = [each for each in told.all("told") if each["event"] == "evaluated"]
    assert 2 <= len(due) <= 3  # two may fall due together, out of step


def test_a_worker_waits_for_a_slow_one_longer_than_for_a_scheduler_that_is_silent() -> None:
    """In step: without a word nobody would be waited for more than 3 s."""
    is_slow = threading.Lock()

    def loss(outputs: Any, batch: Any) -> torch.Tensor:
        if is_slow.acquire(blocking=False):  # once, of all workers
            time.sleep(4.5)  # emulated computing
        return torch.nn.functional.cross_entropy(outputs, batch[1])

    plan = "data(2, topology=central(servers=1))"
    assert train_crew(small_job(stop=af.Stop(steps=1)), plan).result.steps == 1  # all is loaded
    job = small_job(loss=loss, stop=af.Stop(steps=2))
    assert run_crew(lambda: train_job(job), plan, timeout_s=3.0).result.steps == 2


def losses_of_steps(out: Path) -> list[float]:
    events = map(json.loads, (out / "events.jsonl").read_text().splitlines())
    return [event["loss"] for event in events if event["event"] == "step"]


def test_the_loss_told_of_a_step_is_that_of_its_whole_batch(tmp_path: Path) -> None:
    job = small_job()
    af.train(job, out=tmp_path / "alone", quiet=True)
    train_crew_into(tmp_path / "crew", job, "data(3, topology=central(servers=2))")
    expected, told = (losses_of_steps(tmp_path / name) for name in ("alone", "crew"))
    assert len(expected) == 14
    assert told == pytest.approx(expected, rel=1e-9)
