"""Training a model that is cut between its layers: the numbers of one process, in any order."""

from __future__ import annotations

import functools
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sliced import GatedUnit, Residual
from test_training_split import CASES, Case, assert_near, classes, decayed, figures, recorded
from torch import Tensor, nn
from training_cases import TIGHT, assert_equal, session, train, under

from allfuse.base.errors import (
    JobError,
    NonFiniteLoss,
    PeerLost,
    PlanError,
    UserError,
    WorkerFailed,
)
from allfuse.job import Job, Stop
from allfuse.launcher.local import launch_local
from allfuse.launcher.thread import launch_threads
from allfuse.link.thread import Script
from allfuse.split.pipe.courier import Courier
from allfuse.split.pipe.itinerary import Parcel
from allfuse.store.tensorfile import read_tensors
from allfuse.training.loop import Result, train_job


class Asked(nn.Module):
    """Several inputs, one of them by name and optional, and outputs that are a dict."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.table = nn.Embedding(24, width)
        self.blocks = nn.ModuleList(
            Residual(nn.LayerNorm(width), GatedUnit(width, 16)) for _ in range(4)
        )
        self.scale = nn.Parameter(torch.ones(width))  # used between modules
        self.head = nn.Linear(width, 24)

    def forward(self, words: Tensor, shift: Tensor, *, mask: Tensor | None = None) -> Any:
        x = (self.table(words) + shift.unsqueeze(1)) * self.scale
        kept = torch.ones_like(words, dtype=x.dtype) if mask is None else mask.to(x.dtype)
        for block in self.blocks:
            x = block(x) * kept.unsqueeze(-1)
        return {"logits": self.head(x), "kept": kept}


def ask(model: nn.Module, batch: Any) -> Any:
    return model(batch["words"], batch["shift"], mask=batch["words"] != 3)


def count_words(outputs: Any, batch: Any) -> tuple[Tensor, Tensor]:
    """A sum, and the count of the words that it is over."""
    losses = F.cross_entropy(outputs["logits"].transpose(1, 2), batch["next"], reduction="none")
    return (losses * outputs["kept"]).sum(), outputs["kept"].sum()


def asked(**changes: Any) -> Job:
    generator = torch.Generator().manual_seed(8)
    words = torch.randint(24, (48, 5), generator=generator)
    samples = [
        {"words": words[i], "shift": torch.full((12,), i / 48).double(), "next": words[i].roll(-1)}
        for i in range(48)
    ]
    made = {"model": lambda: Asked().double(), "train": samples, "loss": count_words}
    return CASES["mlp"].job(**made, **{"forward": ask, **changes})


def in_place() -> nn.Module:
    """The first module of a stage may change what it takes."""
    layers: list[nn.Module] = []
    for _ in range(4):
        layers += [nn.Linear(6, 6), nn.ReLU(inplace=True), nn.Identity()]
    return nn.Sequential(*layers, nn.Linear(6, 4))


def padded(**changes: Any) -> Job:
    """Samples of several lengths, filled up to the longest of each batch."""
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(3, 8, (48,), generator=generator).tolist()
    samples = [torch.randint(1, 24, (length,), generator=generator) for length in lengths]

    def collate(found: list[Tensor]) -> tuple[Tensor, Tensor]:
        x = nn.utils.rnn.pad_sequence(found, batch_first=True)
        return x, x.roll(-1, 1)

    return CASES["tied"].job(train=samples, collate=collate, **changes)


JOBS: dict[str, Callable[..., Job]] = {
    "mlp": CASES["mlp"].job,
    "uneven": CASES["uneven"].job,
    "tied": CASES["tied"].job,
    "asked": asked,
    "in place": Case(in_place, (6,), (), 4).job,
    "padded": padded,
}


@functools.cache
def alone(name: str, steps: int = 20) -> tuple[Result, list[tuple[float, float]]]:
    results, told = recorded(JOBS[name](stop=Stop(steps=steps)), "data(1)")
    return results[0], figures(told[0])


def assert_learns_alike(name: str, plan: str, steps: int = 20, **changes: Any) -> None:
    result, expected = alone(name, steps)
    results, told = recorded(JOBS[name](stop=Stop(steps=steps), **changes), plan)
    for events in told:
        torch.testing.assert_close(figures(events), expected, **TIGHT)
    assert_near(results[0].weights, result.weights)
    assert not any(each.weights for each in results[1 : len(results) // 2])


@pytest.mark.parametrize("plan", ["pipe(2)", "pipe(3)", "data(2) * pipe(2)", "pipe(2) * tensor(2)"])
@pytest.mark.parametrize(
    "name",
    ["mlp", "asked", *(pytest.param(n, marks=pytest.mark.slow) for n in ("uneven", "tied"))],
)
def test_stages_learn_what_one_process_learns(name: str, plan: str) -> None:
    assert_learns_alike(name, plan)


def test_a_stage_may_change_what_it_takes() -> None:
    assert_learns_alike("in place", "pipe(3)", steps=6)


@pytest.mark.parametrize(
    "schedule", ["gpipe", "interleaved", "interleaved(3)", "zero_bubble", "zero_bubble(2)", "zbv"]
)
@pytest.mark.parametrize("name", ["tied", pytest.param("asked", marks=pytest.mark.slow)])
def test_every_schedule_gives_the_same_numbers(name: str, schedule: str) -> None:
    assert_learns_alike(name, f"pipe(2, schedule={schedule})", steps=8)


@pytest.mark.parametrize(
    "plan",
    [
        "data(2) * pipe(2, schedule=zbv)",
        "data(2) * pipe(2) * tensor(2)",
        pytest.param("tensor(2) * pipe(2, schedule=zero_bubble)", marks=pytest.mark.slow),
        "pipe(3, schedule=interleaved, microbatches=3)",
        "pipe(2, microbatches=1)",
    ],
)
def test_products_give_the_numbers_of_one_process(plan: str) -> None:
    assert_learns_alike("tied", plan, steps=6)


@pytest.mark.parametrize("plan", ["pipe(3)", "pipe(2, schedule=zbv) * tensor(2)"])
def test_batches_may_be_as_long_as_they_are(plan: str) -> None:
    assert_learns_alike("padded", plan, steps=5)


def test_microbatches_of_each_piece_that_is_accumulated_add_up() -> None:
    assert_learns_alike("asked", "data(2) * pipe(2)", steps=6, accumulate=2)


@pytest.mark.slow
def test_sites_of_stages_learn_what_whole_sites_do() -> None:
    """A tied weight is one, though both of its stages have it in a round of their own."""
    for plan in ("site(2, every=3)", "site(2, every=4, outer=nesterov, codec=int8)"):
        made = CASES["tied"].job(clip=None, stop=Stop(steps=8))
        whole = train(made, plan)[0].weights
        cut = train(made, f"{plan} * pipe(2)")[0].weights
        if "codec" not in plan:
            assert_near(cut, whole)
        for name, value in whole.items():
            assert (cut[name] - value).norm() < 0.5 * value.norm()


@pytest.mark.parametrize(
    "plan",
    [
        "pipe(2)",
        "data(2, codec=topk(0.2)) * pipe(2)",
        "data(3, topology=ring) * pipe(2)",
        "site(2, every=2, codec=int8) * pipe(2)",
    ],
)
def test_weights_that_stages_share_stay_equal_to_the_bit(plan: str) -> None:
    ends: dict[tuple[int, int], Tensor] = {}

    def work() -> None:
        def prepare(s: Any) -> None:
            def look(*_: Any) -> None:
                here = s.place.index, s.place.pipe.rank
                (own,) = s.models.values()
                ends[here] = own.table.weight.detach().clone()

            s.on("step", look)

        train_job(CASES["tied"].job(stop=Stop(steps=5)), prepare=prepare)

    under(plan, work)
    for (replica, stage), value in ends.items():
        assert torch.equal(value, ends[replica, 0]), (replica, stage)


ROUND_TRIPS = [
    ("pipe(2)", "data(1)"),
    ("pipe(2)", "pipe(3)"),
    ("data(2)", "pipe(2) * tensor(2)"),
    *(
        pytest.param(before, after, marks=pytest.mark.slow)
        for before, after in [
            ("data(1)", "pipe(2)"),
            ("pipe(2)", "pipe(2)"),
            ("pipe(2)", "tensor(2)"),
            ("tensor(2)", "pipe(2, schedule=interleaved)"),
            ("data(2) * pipe(2)", "data(3)"),
            ("pipe(2) * tensor(2)", "data(2)"),
            ("pipe(2, schedule=zbv)", "data(2) * pipe(2)"),
        ]
    ),
]


def assert_moves(before: str, after: str, folder: Path) -> None:
    """A run goes on under another plan, and its model is that of one process."""
    made, out = JOBS["tied"](save_every=10, stop=Stop(steps=10)), folder / "run"
    train(made, before, out=out)
    result = train(JOBS["tied"](save_every=10), after, out=out, resume=True)[0]
    assert result.steps == 20
    assert_near(result.weights, alone("tied")[0].weights)
    written = read_tensors(out / "model.safetensors")
    assert_near(written, {name: result.weights[name] for name in written})


def assert_goes_on_to_the_bit(plan: str, folder: Path) -> None:
    """A run that goes on from a checkpoint comes to the bits of one that was never broken off."""
    made, out = JOBS["asked"](save_every=3, stop=Stop(steps=3)), folder / "run"
    train(made, plan, out=out)
    whole = JOBS["asked"](save_every=3, stop=Stop(steps=6))
    result = train(whole, plan, out=out, resume=True)[0]
    straight = train(whole, plan)[0]
    assert_equal(result.weights, straight.weights, exact=True)


@pytest.mark.parametrize(("before", "after"), ROUND_TRIPS, ids=str)
def test_checkpoints_move_between_plans(before: str, after: str, tmp_path: Path) -> None:
    assert_moves(before, after, tmp_path)


def test_a_checkpoint_of_stages_is_gone_on_from_to_the_bit(tmp_path: Path) -> None:
    assert_goes_on_to_the_bit("data(2) * pipe(2)", tmp_path)


@pytest.mark.parametrize(
    "plan", ["pipe(2)", "data(2) * pipe(2, schedule=zbv)", "pipe(2) * tensor(2)"]
)
def test_all_ranks_know_the_figures_of_the_last_stage(plan: str) -> None:
    def right(outputs: Any, batch: Any) -> Tensor:
        return (outputs.argmax(-1) == batch[1]).double().mean(-1)

    def job() -> Job:
        made = JOBS["tied"](metrics={"right": right}, stop=Stop(steps=3))
        return JOBS["tied"](
            metrics={"right": right}, stop=Stop(steps=3), validation=made.train, batch_size=10
        )

    (one,) = train(job())
    for each in train(job(), plan):
        assert each.metrics == pytest.approx(one.metrics, rel=1e-9)
        assert each.loss == pytest.approx(one.loss, rel=1e-9)


def test_stages_keep_no_memory_for_what_others_have() -> None:
    def work() -> int:
        with session() as s:
            made = JOBS["uneven"]()
            model = s.model(made.model)
            s.optimizer(decayed(model.parameters()))
            for batch in s.batches(made.train, 8, steps=1):
                s.step(batch, made.loss, forward=lambda m, b: m(b[0]))
            return sum(p.untyped_storage().nbytes() for p in model.parameters())

    held = under("pipe(2)", work)
    whole = sum(p.nbytes for p in JOBS["uneven"]().model().parameters())  # type: ignore[operator]
    assert sum(held) < whole + 100
    assert max(held) < 0.8 * whole


@pytest.mark.parametrize(("schedule", "most"), [("1f1b", 2), ("gpipe", 6), ("zero_bubble", 2)])
def test_no_more_is_held_of_what_was_sent_than_a_schedule_needs(
    schedule: str, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    give, held = Courier.give, [0]

    def watched(self: Courier, parcel: Parcel, tensor: Tensor) -> None:
        give(self, parcel, tensor)
        held.append(self.held)

    monkeypatch.setattr(Courier, "give", watched)
    made = JOBS["mlp"](stop=Stop(steps=1))
    train(made, f"pipe(2, schedule={schedule}, microbatches=6)")
    assert max(held) == most


# What is refused, and what fails.


def test_statistics_of_batches_are_refused_or_local() -> None:
    made = CASES["normed"].job()
    with pytest.raises(PlanError, match=r'microbatches at once.*batch_statistics="local"'):
        train(made, "pipe(2)")
    results = train(CASES["normed"].job(batch_statistics="local", stop=Stop(steps=3)), "pipe(2)")
    assert results[0].weights["1.num_batches_tracked"] == 3 * 2  # microbatches of 3 and 4 rows


@pytest.mark.parametrize(
    ("changes", "text"),
    [({"precision": "fp16"}, "bf16 or fp32")],
)
def test_settings_that_stages_cannot_keep_to_are_refused(
    changes: dict[str, Any], text: str
) -> None:
    with pytest.raises(PlanError, match=text):
        train(CASES["mlp"].job(**changes), "pipe(2)")


def test_more_stages_than_places_are_refused_with_the_places() -> None:
    with pytest.raises(PlanError, match=r"7 stages need 6.*has 4: 1, 2, 3, 4.*pipe\(5\)"):
        train(CASES["mlp"].job(), "pipe(7)")


def test_more_microbatches_than_samples_are_refused_with_the_way_out() -> None:
    with pytest.raises(UserError, match=r"microbatches=4.*gives 3 samples.*at least 8"):
        train(CASES["mlp"].job(), "data(2) * pipe(2, microbatches=4)")


def test_backward_of_a_script_s_own_is_refused() -> None:
    def work() -> None:
        made = JOBS["mlp"]()
        with session() as s:
            model = s.model(made.model)
            s.optimizer(decayed(model.parameters()))
            for batch in s.batches(made.train, 8, steps=1):
                s.backward(made.loss(model(batch[0]), batch))

    with pytest.raises(UserError, match=r"stage.*s\.step|s\.step.*stage"):
        under("pipe(2)", work)


def test_a_model_that_is_called_by_itself_is_refused() -> None:
    def work() -> None:
        made = JOBS["mlp"]()
        with session() as s:
            model = s.model(made.model)
            s.optimizer(decayed(model.parameters()))
            for batch in s.batches(made.train, 8, steps=1):
                s.step(batch, made.loss)
                model(batch[0])

    with pytest.raises(UserError, match=r"some stages of it only.*s\.evaluate"):
        under("pipe(2)", work)


@pytest.mark.parametrize("schedule", ["1f1b", "zero_bubble"])
def test_each_of_several_optimizers_steps_its_own_parameters(schedule: str) -> None:
    made = JOBS["mlp"]()

    def work() -> dict[str, Tensor]:
        with session() as s:
            model = s.model(made.model)
            halves = [*model[:2].parameters()], [*model[2:].parameters()]
            optimizers = [s.optimizer(torch.optim.SGD(half, lr=0.1)) for half in halves]
            for batch in s.batches(made.train, 8, steps=3):
                for optimizer in optimizers:
                    s.step(batch, made.loss, optimizer=optimizer)
            weights: dict[str, Tensor] = s.weights()["model"]
            return {name: value.detach().clone() for name, value in weights.items()}

    expected = under("data(1)", work)[0]
    assert_near(under(f"pipe(2, schedule={schedule})", work)[0], expected)


def test_a_loss_that_is_not_finite_names_the_rank_of_the_last_stage() -> None:
    made = JOBS["mlp"](loss=lambda outputs, batch: classes(outputs, batch) * float("nan"))
    for error in launch_threads(lambda: train_job(made), 2, plan="pipe(2)"):
        assert isinstance(error, NonFiniteLoss)
        assert "on rank 1" in str(error)


def test_a_forward_pass_that_looks_at_numbers_is_refused() -> None:
    class Looks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.one(x)
            result: Tensor = self.two(y if bool((y > 0).any()) else -y)
            return result

    with pytest.raises(UserError, match=r"cannot be followed by shapes alone"):
        train(Case(Looks, (6,), (), 4).job(), "pipe(2)")


def test_a_microbatch_that_fails_ends_all_and_is_named() -> None:
    class Fails(nn.Linear):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            if x.device.type == "cpu" and type(x) is Tensor:
                self.calls += 1
                if self.calls == 6:
                    raise ValueError("six")
            return super().forward(x)

    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(6, 6), nn.ReLU(), Fails(6, 4))

    made = Case(build, (6,), (), 4).job(batch_size=8)
    text = r"stage 1 on rank 1 failed in the forward pass of microbatch 1: ValueError: six"
    with pytest.raises(JobError, match=text):
        train(made, "pipe(2, microbatches=4)")


def test_a_rank_that_dies_ends_all_within_the_deadline() -> None:
    results = launch_threads(
        lambda: train_job(JOBS["mlp"](stop=Stop(steps=30))),
        4,
        plan="data(2) * pipe(2)",
        script=Script(kill={(2, 90)}),
    )
    lost = [each for each in results if isinstance(each, PeerLost)]
    assert len(lost) == 3
    assert any(each.peer == 2 for each in lost)


# Processes, which have random generators of their own.


def dropping(chance: float) -> nn.Module:
    first, second = nn.Linear(6, 16), nn.Linear(16, 12)
    return nn.Sequential(first, nn.Dropout(chance), second, nn.Dropout(chance), nn.Linear(12, 4))


def drawing(chance: float = 0.3, **changes: Any) -> Job:
    made: dict[str, Any] = {"save_every": 2, "stop": Stop(steps=4)}
    return Case(lambda: dropping(chance), (6,), (), 4).job(**{**made, **changes})


def test_dropout_repeats_itself_and_goes_on_to_the_bit(tmp_path: Path) -> None:
    def work() -> dict[str, Any]:
        out = tmp_path / "run"
        once, again = train_job(drawing()), train_job(drawing())
        train_job(drawing(stop=Stop(steps=2)), out=out)
        resumed = train_job(drawing(), out=out, resume=True)
        plain = train_job(drawing(0.0))
        kinds = {"once": once, "again": again, "resumed": resumed, "plain": plain}
        return {name: result.weights for name, result in kinds.items()}

    found = launch_local(work, 2, plan="pipe(2)")
    assert_equal(found["again"], found["once"], exact=True)
    assert_equal(found["resumed"], found["once"], exact=True)
    assert not torch.equal(found["plain"]["0.weight"], found["once"]["0.weight"])


def test_a_killed_process_ends_its_pipeline_and_is_named() -> None:
    def work() -> None:
        def die(session: Any, event: Any) -> None:
            if event.step == 3 and session.rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)

        train_job(drawing(stop=Stop(steps=10**6)), prepare=lambda s: s.on("step", die))

    with pytest.raises(WorkerFailed, match=r"rank 0 lost rank 1 in .* at step 3"):
        launch_local(work, 2, plan="pipe(2)")
