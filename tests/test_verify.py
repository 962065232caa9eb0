"""Runs that keep their promise pass, and every planted fault is found and named.

Faults are planted in what only the run under the plan uses; the reference never calls it.
"""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, WeightedRandomSampler

import allfuse as af
from allfuse.base.errors import JobError, NonFiniteLoss, PlanError, UserError
from allfuse.fusion import Fuser
from allfuse.fusion.flight import Flight
from allfuse.fusion.gradients import GradientFusion
from allfuse.launcher import current_world
from allfuse.link.lone import Done
from allfuse.split.data import Loader, Portion, as_source, plan_batches
from allfuse.training.exchange import Figures
from allfuse.training.learner import Learner
from allfuse.training.rounds import Rounds
from allfuse.training.session import Session
from allfuse.verify import Report, verify_job
from allfuse.verify.reference import cut_into_pieces, sum_of_losses
from allfuse.verify.samples import read_batches

PLANS = (
    "data(1)",
    "data(2)",
    "data(3)",
    "site(2, every=2)",
    "site(3, every=end)",
    "site(2, every=2) * data(2)",
)
SMALL_BUCKETS = 400  # bytes, so that the model below has five


class Net(nn.Module):
    """BatchNorm, and a layer that only rows with a positive first entry use: few of them do."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.norm = nn.BatchNorm1d(8)
        self.dropout = nn.Dropout(dropout)
        self.rare = nn.Linear(8, 8)
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.dropout(F.relu(self.norm(self.first(x))))
        chosen = x[:, 0] > 1.2
        if chosen.any():
            extra = torch.zeros_like(hidden)
            extra[chosen] = self.rare(hidden[chosen])
            hidden = hidden + extra
        return self.last(hidden)


def samples(count: int = 37) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 6, generator=generator, dtype=torch.float32)
    return x, torch.randint(0, 3, (count,), generator=generator)


def cross_entropy(outputs: Tensor, batch: Any) -> Tensor:
    return F.cross_entropy(outputs, batch[1])


def weighted(outputs: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
    """A sum over some of the samples, as a loss over tokens is."""
    keep = batch[1] > 0
    losses = F.cross_entropy(outputs, batch[1], reduction="none")
    return (losses * keep).sum(), keep.sum()


def make_job(**changes: Any) -> af.Job:
    """37 samples in batches of 10: the last of four has 7, uneven among 2, 3 and 4."""
    fields: dict[str, Any] = {
        "model": Net,
        "train": samples(),
        "loss": cross_entropy,
        "optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
        "batch_size": 10,
    }
    return af.Job(**{**fields, **changes})


def check(plan: str, steps: int = 6, **changes: Any) -> Report:
    """Verify on the thread link."""
    return verify_job(functools.partial(make_job, **changes), plan, steps=steps, threads=True)


def step_of(session_step: int | None) -> int:
    """The step under way, counted from 1."""
    return (session_step or 0) + 1


def here() -> tuple[int, int]:
    """Rank and step under way of the code that runs."""
    world = current_world()
    assert world is not None
    return world.rank, step_of(world.step)


@pytest.fixture(autouse=True)
def _one_thread_each() -> Iterator[None]:
    """Ranks are threads already; torch's own would wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def small_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    small = functools.partial(
        GradientFusion, bucket_bytes=SMALL_BUCKETS, first_bucket_bytes=SMALL_BUCKETS
    )
    monkeypatch.setattr("allfuse.training.learner.GradientFusion", small)


# What keeps its promise passes.


@pytest.mark.parametrize("plan", PLANS)
def test_a_clean_run_has_the_numbers_of_its_reference(plan: str, small_buckets: None) -> None:
    report = check(plan)
    assert report.ok, report.lines()
    assert report.promise == ("exact" if plan.startswith("data") else "replayed")
    assert [row.moment for row in report.rows] == ["0", "1", "2", "3", "4", "5", "6", "end"]
    assert report.loss.size < 1e-12
    assert report.norm.size < 1e-12


@pytest.mark.parametrize("plan", ["data(2)", "data(3)", "site(2, every=2) * data(2)"])
@pytest.mark.parametrize(
    "changes",
    [
        {"loss": weighted},
        {"clip": 0.1},
        {"accumulate": 2, "model": lambda: nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3))},
        {"batch_statistics": "local", "model": lambda: nn.Linear(6, 3)},
        {"scheduler": lambda o: torch.optim.lr_scheduler.StepLR(o, 2, 0.5)},
        {
            "scheduler": lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.5),
            "scheduler_every": "epoch",
        },
        {"optimizer": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)},
        {"train": samples(31)},  # the last batch has 1 sample: some ranks have none
    ],
    ids=(
        "tokens",
        "clip",
        "accumulate",
        "local statistics without BatchNorm",
        "scheduler",
        "scheduler of epochs",
        "momentum",
        "ranks without samples",
    ),
)
def test_what_a_job_can_ask_for_changes_no_numbers(plan: str, changes: dict[str, Any]) -> None:
    if "site" in plan and "train" in changes:
        changes = {**changes, "model": lambda: nn.Linear(6, 3)}  # BatchNorm of 1 sample cannot be
    elif "train" in changes:
        changes = {**changes, "model": lambda: nn.Sequential(nn.Linear(6, 3))}
    report = check(plan, **changes)
    assert report.ok, report.lines()


@pytest.mark.parametrize("plan", ["data(2)", "site(2, every=2) * data(2)"])
def test_batch_norm_under_accumulation_is_compared_piece_by_piece(plan: str) -> None:
    report = check(plan, accumulate=2, train=samples(40))
    assert report.ok, report.lines()
    assert "one piece of the batch at a time" in report.notes[-1]


def test_ranks_with_fewer_pieces_or_no_samples_take_part_in_batch_norm() -> None:
    fewer = check("data(4)", accumulate=2, train=samples(36))  # shares of 1, 2, 1 and 2
    assert fewer.ok, fewer.lines()
    none = check("data(3)", train=samples(32))  # shares of 0, 1 and 1
    assert none.ok, none.lines()


class Rows(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return zip(*samples(), strict=True)


@pytest.mark.parametrize("plan", ["data(2)", "site(2, every=2)"])
@pytest.mark.parametrize(
    "train",
    [
        Rows(),
        DataLoader(Rows(), drop_last=True),
        DataLoader(
            list(zip(*samples(), strict=True)),
            sampler=WeightedRandomSampler([1.0, 2.0, 3.0] * 10, 25),
        ),
    ],
    ids=("stream", "stream without its last batch", "sampler of the data's own"),
)
def test_other_kinds_of_data_are_followed(plan: str, train: Any) -> None:
    report = check(plan, train=train)
    assert report.ok, report.lines()


def test_the_reference_takes_each_sample_of_an_epoch_once_in_the_order_of_the_loaders() -> None:
    job = make_job(seed=3)
    source = as_source(job.train)
    order = plan_batches(source, batch_size=10, seed=3)
    batches = read_batches(job, 3)
    for epoch in range(2):
        loaders = [Loader(source, order, parts=3, index=i).epoch(epoch) for i in range(3)]
        seen: list[int] = []
        for portions in zip(*loaders, strict=True):
            batch = next(batches)
            own = [batch.fetch([share]) for share in batch.shares]
            assert batch.last == portions[0].last
            for fetched, portion in zip(own, portions, strict=True):
                assert torch.equal(fetched[0], portion.batch[0])
            seen += np.concatenate(batch.shares).tolist()
        assert sorted(seen) == list(range(37))


def test_pieces_hold_every_row_once() -> None:
    batch = (torch.arange(7), "label", torch.tensor(3))
    pieces = cut_into_pieces(batch, [3, 0, 4], 2, torch.device("cpu"))
    assert [piece[0].tolist() for piece, _ in pieces] == [[0, 3, 4], [1, 2, 5, 6]]
    assert [rows for _, rows in pieces] == [3, 4]
    assert len(cut_into_pieces(batch, [6, 1], 3, torch.device("cpu"))) == 1  # no run is empty
    assert cut_into_pieces(None, [0, 0], 2, torch.device("cpu")) == []


def test_losses_become_sums_with_counts() -> None:
    assert [float(x) for x in sum_of_losses(torch.tensor(2.0), 3)] == [6.0, 3.0]
    assert [float(x) for x in sum_of_losses(torch.tensor([1.0, 2.0]), 2)] == [3.0, 2.0]
    assert [float(x) for x in sum_of_losses((torch.tensor(5.0), 4), 2)] == [5.0, 4.0]


# What does not keep it is found, with its name, rank and step.


def test_a_missing_division_by_n_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    finish = Learner.finish
    monkeypatch.setattr(
        Learner, "finish", lambda self, factor: finish(self, factor * self.fusion.link.size)
    )
    first = check("data(2)").first
    assert first is not None
    assert (first.what, first.step) == ("gradient norm", 1)
    assert first.size == pytest.approx(1.0)  # twice as long
    assert check("data(1)").ok


def test_a_skipped_bucket_is_found_and_its_tensors_named(
    monkeypatch: pytest.MonkeyPatch, small_buckets: None
) -> None:
    start = Fuser.start

    def skip(self: Fuser, block: Tensor, operation: str, **keywords: Any) -> Any:
        if operation.endswith("bucket 1"):
            return Done()
        return start(self, block, operation, **keywords)

    monkeypatch.setattr(Fuser, "start", skip)
    report = check("data(2)")
    assert report.first is not None
    assert (report.first.what, report.first.step) == ("gradient norm", 1)
    assert set(report.wrong) <= {"first.weight", "norm.weight", "norm.bias", "first.bias"}
    assert "norm.weight" in report.wrong


def test_a_skipped_optimizer_step_of_one_rank_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    step = Learner.step
    monkeypatch.setattr(
        Learner,
        "step",
        lambda self: self.optimizer.zero_grad() if here() == (1, 3) else step(self),
    )
    report = check("data(2)")
    assert report.first is not None
    assert (report.first.rank, report.first.step) == (1, 3)
    assert {"first.weight", "last.weight", "last.bias"} <= set(report.wrong)


@pytest.mark.parametrize("name", ["last.bias", "first.weight"])
@pytest.mark.parametrize("plan", ["data(3)", "site(3, every=4)"])
def test_one_stale_tensor_of_one_rank_is_found(
    monkeypatch: pytest.MonkeyPatch, name: str, plan: str
) -> None:
    step = Learner.step

    def leave_out(self: Learner) -> None:
        if here() == (2, 2):
            self.parameters[self.names.index(name)].grad = None
        step(self)

    monkeypatch.setattr(Learner, "step", leave_out)
    report = check(plan)
    assert report.first is not None
    assert (report.first.what, report.first.rank, report.first.step) == (name, 2, 2)
    assert report.wrong == [name]


def change_portions(
    monkeypatch: pytest.MonkeyPatch, index: int, change: Callable[[Portion], Portion]
) -> None:
    """Change what one replica works on in the third step."""
    epoch = Loader.epoch

    def changed(self: Loader, number: int, first_step: int = 0) -> Iterator[Portion]:
        for portion in epoch(self, number, first_step):
            there = self.index == index and (number, portion.step) == (0, 2)
            yield change(portion) if there else portion

    monkeypatch.setattr(Loader, "epoch", changed)


def rows_of(portion: Portion, rows: list[int]) -> Portion:
    return portion._replace(batch=tuple(leaf[rows] for leaf in portion.batch), rows=len(rows))


@pytest.mark.parametrize("plan", ["data(2)", "site(2, every=2)"])
@pytest.mark.parametrize("rows", [[0, 0, 2, 3, 4], [0, 1, 2, 3]], ids=("repeated", "dropped"))
def test_a_repeated_or_dropped_sample_is_found(
    monkeypatch: pytest.MonkeyPatch, plan: str, rows: list[int]
) -> None:
    change_portions(monkeypatch, 1, lambda portion: rows_of(portion, rows))
    first = check(plan).first
    assert first is not None
    assert (first.what, first.step) == ("loss", 3)


def test_batch_statistics_left_local_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("allfuse.training.handing.globalize_batch_norm", lambda model, link: [])
    report = check("data(2)")
    assert report.first is not None
    assert (report.first.what, report.first.step) == ("loss", 1)
    assert {"norm.running_mean", "norm.running_var"} <= set(report.wrong)


def test_local_batch_statistics_that_were_asked_for_are_named() -> None:
    report = check("data(2)", batch_statistics="local")
    assert not report.ok
    assert "batch_statistics is local" in report.notes[0]
    assert check("site(2, every=2)", batch_statistics="local").ok


def test_sites_averaged_with_wrong_weights_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    carry = Flight.carry
    monkeypatch.setattr(
        Flight, "carry", lambda self, weights: carry(self, [1.0 / len(weights)] * len(weights))
    )
    report = check("site(3, every=2)")  # 10 samples are 3, 3 and 4
    assert report.first is not None
    assert report.first.step == 2
    assert "last.weight" in report.wrong
    assert check("site(2, every=2)", train=samples(40)).ok  # here they are 5 and 5


def test_a_last_round_that_is_left_out_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Flight, "land", lambda *arguments, **options: None)
    report = check("site(2, every=end)")
    assert [row.moment for row in report.rows if row.wrong] == ["end"]
    assert not report.ok


def test_a_wrong_loss_is_found_though_training_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        Figures, "loss", property(lambda self: self.losses[0] / max(self.counts[0], 1.0))
    )
    report = check("data(2)")
    assert report.first is not None
    assert (report.first.what, report.first.step) == ("loss", 1)
    assert report.wrong == []
    assert report.norm.ok
    assert "reported wrong" in "\n".join(report.lines())


def test_clipping_left_out_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    clip = Learner.clip
    monkeypatch.setattr(Learner, "clip", lambda self, largest: clip(self, None))
    report = check("data(2)", clip=0.1, optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    assert report.first is not None
    assert report.first.step == 1
    assert report.wrong


def test_other_first_weights_on_one_rank_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def move(tensors: list[Tensor], link: Any) -> None:
        if here()[0] == 1:
            tensors[0].data[0, 0] += 1e-6

    monkeypatch.setattr("allfuse.training.building.spread", move)
    first = check("data(2)").first
    assert first is not None
    assert (first.what, first.rank, first.step) == ("first.weight", 1, 0)
    assert "before the first step" in str(first)


def test_rounds_of_the_wrong_steps_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    starting = Rounds.starting
    monkeypatch.setattr(Rounds, "starting", lambda self, steps: starting(self, steps - 1))
    first = check("site(2, every=2)").first
    assert first is not None
    assert first.step == 2


def test_a_scheduler_that_never_steps_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Session, "scheduler", lambda self, scheduler, every="step": scheduler)
    first = check("data(2)", scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 2, 0.5)).first
    assert first is not None
    assert first.step == 3


# Randomness and precision.


def test_dropout_is_zero_in_both_runs_and_the_report_says_so() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside = nn.MultiheadAttention(6, 2, dropout=0.5, batch_first=True)
            self.after = Net(dropout=0.5)

        def forward(self, x: Tensor) -> Any:
            y = x[:, None]
            return self.after(self.inside(y, y, y)[0][:, 0])

    report = check("data(2)", model=Attention)
    assert report.ok, report.lines()
    assert report.notes == ["dropout is 0 in both runs, since every plan draws it differently"]


def test_other_random_numbers_are_named() -> None:
    class Noisy(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(F.dropout(x, 0.5))

    report = check("data(2)", model=Noisy)
    assert not report.ok
    assert "draws random numbers" in report.notes[0]


class Hard(nn.Module):
    """Cannot run in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.float())


def upcast(outputs: Tensor, batch: Any) -> Tensor:
    return F.cross_entropy(outputs.float(), batch[1])


@pytest.mark.parametrize("changes", [{"model": Hard}, {"loss": upcast}], ids=("model", "loss"))
def test_a_job_that_cannot_run_in_float64_is_compared_as_it_is(changes: dict[str, Any]) -> None:
    report = check("data(2)", **changes)
    assert report.ok, report.lines()
    assert report.precision == "fp32"
    assert "cannot run in float64" in report.notes[0]
    assert torch.get_default_dtype() == torch.float32


def test_faults_are_found_in_fp32_too(monkeypatch: pytest.MonkeyPatch) -> None:
    job = functools.partial(make_job, train=samples(40))
    clean = verify_job(job, "data(2)", steps=6, double=False, threads=True)
    assert clean.ok, clean.lines()
    change_portions(monkeypatch, 1, lambda portion: rows_of(portion, [0, 0, 2, 3, 4]))
    first = verify_job(job, "data(2)", steps=6, double=False, threads=True).first
    assert first is not None
    assert (first.what, first.step) == ("loss", 3)


def test_a_stale_weight_is_found_in_fp32_by_the_next_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    step = Learner.step
    monkeypatch.setattr(
        Learner,
        "step",
        lambda self: self.optimizer.zero_grad() if here() == (1, 3) else step(self),
    )
    first = verify_job(make_job, "data(2)", steps=6, double=False, threads=True).first
    assert first is not None
    assert (first.what, first.step) == ("loss", 4)


# The report, and what verify leaves behind.


def test_the_report_says_first_what_went_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    change_portions(monkeypatch, 1, lambda portion: rows_of(portion, [0, 0, 2, 3, 4]))
    text = "\n".join(check("data(2)").lines())
    assert "verify data(2): DIFFERENT NUMBERS after 6 steps in float64" in text
    assert "<- first difference" in text
    assert "first wrong loss on rank 0, step 3: off by" in text
    assert "allowed: 1e-09" in text


def test_the_report_is_plain_json_even_with_infinities(monkeypatch: pytest.MonkeyPatch) -> None:
    step = Learner.step

    def spoil(self: Learner) -> None:
        step(self)
        if here()[1] == 2:
            self.parameters[0].data[0, 0] = float("inf")

    monkeypatch.setattr(Learner, "step", spoil)
    report = check("data(2)", steps=2)
    found = json.loads(json.dumps(report.as_dict(), allow_nan=False))
    assert found["ok"] is False
    assert found["first"]["what"] == "first.weight"
    assert found["worst"]["size"] is None
    assert found["speed_ratio"] > 0


def test_progress_is_told_at_every_step() -> None:
    told: list[tuple[str, dict[str, Any]]] = []
    verify_job(
        make_job,
        "data(2)",
        steps=4,
        threads=True,
        on_event=lambda name, **data: told.append((name, data)),
    )
    compared = [data for name, data in told if name == "compared"]
    assert [data["step"] for data in compared] == [1, 2, 3, 4]
    assert compared[0].keys() == {
        "step",
        "steps",
        "loss_difference",
        "grad_norm_difference",
        "weight_difference",
        "tensor",
    }


def test_weights_of_large_jobs_are_kept_of_some_steps_only(monkeypatch: pytest.MonkeyPatch) -> None:
    size = sum(t.numel() for t in [*Net().parameters(), *Net().buffers()]) * 8
    monkeypatch.setattr("allfuse.verify.record.LIMIT_BYTES", 5.5 * size)
    report = check("data(2)", steps=7)
    assert report.ok
    assert [row.moment for row in report.rows if row.weights] == ["0", "3", "6", "7", "end"]
    assert any("every 3 steps only" in note for note in report.notes)
    monkeypatch.setattr("allfuse.verify.record.LIMIT_BYTES", 2.5 * size)
    with pytest.raises(UserError, match="the weights of one step take"):
        check("data(2)", steps=7)


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_left_behind(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fails: bool
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    if fails:
        monkeypatch.setattr(Learner, "step", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            check("data(2)")
    else:
        assert check("data(2)").ok
    assert list(tmp_path.iterdir()) == []
    assert torch.get_default_dtype() == torch.float32


def test_a_loss_that_is_not_finite_leaves_nothing_to_compare() -> None:
    with pytest.raises(NonFiniteLoss, match=r"reference.*step 2"):
        check("data(2)", optimizer=lambda p: torch.optim.SGD(p, lr=1e300))


def test_bad_requests_are_refused() -> None:
    with pytest.raises(PlanError, match="cannot run member yet"):
        verify_job(make_job, "member(2)", threads=True)
    with pytest.raises(UserError, match="received 0 steps"):
        verify_job(make_job, "data(2)", steps=0, threads=True)
    with pytest.raises(JobError, match="no such file"):
        verify_job("nowhere.py", "data(2)", threads=True)


def test_fresh_processes_give_the_same_report() -> None:
    told: list[str] = []
    report = verify_job(
        functools.partial(make_job, model=functools.partial(Net, dropout=0.1)),
        "site(2, every=2)",
        steps=3,
        on_event=lambda name, **data: told.append(name),
    )
    assert report.ok, report.lines()
    assert report.workers == 2
    assert told.count("compared") == 3


@pytest.mark.parametrize("every", ["3", "end"])
def test_sites_end_with_what_their_rule_makes_of_them(every: str) -> None:
    report = check(f"site(3, every={every}, rule=median)")
    assert report.ok, report.first
