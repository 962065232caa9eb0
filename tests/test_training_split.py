"""Training under plans that cut the model: the numbers of one process, whoever holds what of it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sliced import TiedWords, convolutions
from torch import Tensor, nn
from training_cases import TIGHT, Recorded, adam, assert_equal, job, session, train, under

from allfuse.base.errors import NonFiniteLoss, PlanError, UserError
from allfuse.job import Job, Stop
from allfuse.launcher import current_world
from allfuse.launcher.thread import launch_threads
from allfuse.plan import as_plan
from allfuse.store.run import RunFolder
from allfuse.store.tensorfile import read_tensors
from allfuse.training.loop import Result, train_job
from allfuse.training.pieces import works_per_element


def heavy(parameters: Any) -> torch.optim.Optimizer:
    """For models with BatchNorm: Adam makes full steps of the rounding of gradients that are 0."""
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01)


def decayed(parameters: Any) -> torch.optim.Optimizer:
    """Vectors are in a group of their own, without weight decay."""
    parameters = list(parameters)
    matrices = [p for p in parameters if p.dim() > 1]
    vectors = [p for p in parameters if p.dim() <= 1]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.1)


def classes(outputs: Tensor, batch: Any) -> Tensor:
    return F.cross_entropy(outputs.flatten(0, -2), batch[1].flatten())


@dataclass(frozen=True)
class Case:
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    targets: tuple[int, ...]
    classes: int
    words: int = 0
    optimizer: Callable[[Any], torch.optim.Optimizer] = decayed

    def job(self, **changes: Any) -> Job:
        generator = torch.Generator().manual_seed(5)
        if self.words:
            x = torch.randint(self.words, (48, *self.shape), generator=generator)
        else:
            x = torch.randn(48, *self.shape, generator=generator, dtype=torch.float64)
        y = torch.randint(self.classes, (48, *self.targets), generator=generator)
        made: dict[str, Any] = {
            "model": lambda: self.build().double(),
            "train": (x, y),
            "loss": classes,
            "optimizer": self.optimizer,
            "batch_size": 7,
            "clip": 0.5,
            "stop": Stop(steps=20),
        }
        return job(**{**made, **changes})


class Words(nn.Module):
    """A small transformer whose table of words is its output projection too."""

    def __init__(self, words: int = 24, width: int = 16, heads: int = 4, wide: int = 32) -> None:
        super().__init__()
        self.table = nn.Embedding(words, width)
        layer = nn.TransformerEncoderLayer(width, heads, wide, dropout=0.0, batch_first=True)
        self.trunk = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, words, bias=False)
        self.head.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.trunk(self.table(x)))
        return result


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 12), nn.GELU(), nn.Linear(12, 4)
    )


def uneven() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 8), nn.Tanh(), nn.Linear(8, 4))


def normed() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4))


CASES = {
    "mlp": Case(mlp, (6,), (), 4),
    "uneven": Case(uneven, (6,), (), 4),
    "normed": Case(normed, (6,), (), 4, optimizer=heavy),
    "convolutions": Case(convolutions, (3, 8, 8), (), 4, optimizer=heavy),
    "tied": Case(Words, (5,), (5,), 24, words=24),
    "odd": Case(functools.partial(Words, 25, 15, 5, 33), (5,), (5,), 25, words=25),
    "gated": Case(TiedWords, (5,), (5,), 24, words=24),
}
PLANS = ("tensor(2)", "tensor(4)", "data(2) * tensor(2)", "data(3) * tensor(2)")
OFTEN = {
    "tensor(4)": ("uneven", "tied", "odd"),
    "data(2) * tensor(2)": ("normed", "tied"),
    "data(3) * tensor(2)": ("uneven", "convolutions"),
}
"""What is tested each time, of all plans but the first: each says something that no other does."""


def pairs(names: Iterable[str], plans: Sequence[str], often: Mapping[str, Sequence[str]]) -> Any:
    """Cases and plans: all under the first plan and some under others; the rest is in test-all."""
    return pytest.mark.parametrize(
        ("name", "plan"),
        [
            pytest.param(
                name, plan, marks=[] if name in often.get(plan, names) else pytest.mark.slow
            )
            for name in names
            for plan in plans
        ],
    )


def assert_near(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """To rounding. Adam makes steps of the rounding of gradients that are 0, as those of the bias
    of keys in attention are: hence the absolute tolerance."""
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-9, atol=1e-10, msg=name)


def recorded(made: Job, plan: str, **options: Any) -> tuple[list[Result], list[Recorded]]:
    """What each rank of a plan returned, and the events of each."""
    told: list[Recorded] = []

    def work() -> Result:
        events = Recorded()
        told.append(events)

        def prepare(s: Any) -> None:
            events.attach(s)
            s.stepper.always_norm = True

        return train_job(made, prepare=prepare, **options)

    return under(plan, work), told


@functools.cache
def alone(name: str) -> tuple[Result, list[tuple[float, float]]]:
    """One process: its result, loss and norm of each step."""
    results, told = recorded(CASES[name].job(), "data(1)")
    return results[0], figures(told[0])


def figures(events: Recorded) -> list[tuple[float, float]]:
    return [(e.data["loss"], e.data["grad_norm"]) for e in events.named("step")]


@pairs(CASES, PLANS, OFTEN)
def test_a_cut_model_learns_what_one_process_learns(name: str, plan: str) -> None:
    result, expected = alone(name)
    results, told = recorded(CASES[name].job(), plan)
    for events in told:
        torch.testing.assert_close(figures(events), expected, **TIGHT)
    assert_near(results[0].weights, result.weights)


@pytest.mark.parametrize(
    "plan",
    [
        "site(2, every=3) * tensor(2)",
        "site(2, every=4, outer=nesterov, codec=int8) * tensor(2)",
        "data(2, codec=topk(0.2)) * tensor(2)",
        "data(2, rule=vote) * tensor(2)",
        "site(2, topology=gossip(ring)) * data(2) * tensor(2)",
    ],
)
def test_replicas_fuse_what_each_rank_has(plan: str) -> None:
    """All that differs is what is fused: the same as by replicas that are whole, to what a codec
    or rule makes of other blocks."""
    assert_fused_as_whole(CASES["mlp"].job(clip=None, stop=Stop(steps=8)), plan, " * tensor(2)")


def assert_fused_as_whole(made: Job, plan: str, split: str) -> None:
    """By a plan without the axis that cuts the model the same comes out."""
    whole = train(made, str(as_plan(plan.removesuffix(split))))[0].weights
    cut = train(made, plan)[0].weights
    lossless = "codec" not in plan and "rule" not in plan
    for name, value in whole.items():
        if lossless:
            torch.testing.assert_close(cut[name], value, **TIGHT)
        else:
            assert (cut[name] - value).norm() < 0.5 * value.norm()


ROUND_TRIPS = [
    ("data(1)", "tensor(2)"),
    ("tensor(2)", "data(1)"),
    ("tensor(2)", "tensor(4)"),
    ("tensor(4)", "tensor(2)"),
    ("tensor(2)", "tensor(2)"),
    ("data(2)", "tensor(2)"),
    ("tensor(2)", "data(2)"),
    ("data(2) * tensor(2)", "data(3)"),
    ("data(3)", "data(2) * tensor(2)"),
    ("data(2) * tensor(2)", "tensor(4)"),
    ("tensor(4)", "data(2) * tensor(2)"),
    ("tensor(3)", "tensor(2)"),
    ("data(2) * tensor(2)", "data(2) * tensor(2)"),
]


@pytest.mark.parametrize(("before", "after"), ROUND_TRIPS, ids=str)
def test_checkpoints_move_between_plans(before: str, after: str, tmp_path: Path) -> None:
    name = "odd" if "tensor(3)" in before else "tied"
    made, out = CASES[name].job(save_every=10, stop=Stop(steps=10)), tmp_path / "run"
    train(made, before, out=out)
    whole = CASES[name].job(save_every=10)
    result = train(whole, after, out=out, resume=True)[0]
    assert result.steps == 20
    assert_near(result.weights, alone(name)[0].weights)
    written = read_tensors(out / "model.safetensors")
    assert_near(written, {name: result.weights[name] for name in written})


def test_sites_that_share_models_go_on_from_their_own_checkpoints(tmp_path: Path) -> None:
    plan = "site(2, every=4, outer=nesterov, codec=int8) * tensor(2)"
    made, out = CASES["mlp"].job(save_every=5, stop=Stop(steps=10)), tmp_path / "run"
    train(made, plan, out=out)
    whole = CASES["mlp"].job(save_every=5, stop=Stop(steps=13))
    result = train(whole, plan, out=out, resume=True)[0]
    assert_equal(result.weights, train(whole, plan)[0].weights, exact=True)


def test_what_codecs_have_not_sent_moves_with_the_weights(tmp_path: Path) -> None:
    """The sum of residuals over all replicas stays the same, wherever they lie."""
    made, out = CASES["mlp"].job(save_every=6, stop=Stop(steps=6)), tmp_path / "run"
    train(made, "data(2, codec=topk(0.1)) * tensor(2)", out=out)

    def residuals(plan: str) -> dict[str, Tensor]:
        def work() -> dict[str, Tensor]:
            held: dict[str, Tensor] = {}

            def look(s: Any) -> None:
                def start(*_: Any) -> None:
                    place, index = s.place, s.place.mates.rank
                    for name, tensor in s.learners[0].fusion.capture()["residuals"].items():
                        held[f"{place.index} {index} {name}"] = tensor.clone()

                s.on("start", start)

            train_job(CASES["mlp"].job(stop=Stop(steps=6)), out=out, resume=True, prepare=look)
            return held

        found: dict[str, Tensor] = {}
        for each in under(plan, work):
            found |= each
        total: dict[str, Tensor] = {}
        for key, tensor in found.items():
            name = key.split()[-1]
            total[name] = total.get(name, torch.zeros(())) + tensor.sum()
        return total

    before = residuals("data(2, codec=topk(0.1)) * tensor(2)")
    assert sum(float(v.abs()) for v in before.values()) > 0
    after = residuals("data(4, codec=topk(0.1))")
    for name in ("0.weight", "0.bias", "2.weight"):
        torch.testing.assert_close(after[name], before[name], **TIGHT)


def test_a_session_cuts_the_model_of_a_script() -> None:
    case = CASES["mlp"]
    made = case.job()

    def work() -> tuple[int, float]:
        with session(clip=0.5) as s:
            model = s.model(made.model, forward=lambda m, batch: m(batch[0]))
            optimizer = s.optimizer(decayed(model.parameters()))
            before = model[0].weight
            for batch in s.batches(made.train, 7, steps=20):
                s.step(batch, classes, optimizer=optimizer)
            assert model[0].weight is before
            return before.shape[0], s.loss

    for rows, loss in under("tensor(2)", work):
        assert rows == 8
        assert loss == pytest.approx(alone("mlp")[1][-1][0], rel=1e-9)


def test_batches_of_a_script_s_own_are_refused_while_nothing_is_cut() -> None:
    def work() -> None:
        with session() as s:
            model = s.model(mlp)
            s.optimizer(adam(model.parameters()))
            s.step((torch.randn(4, 6), torch.zeros(4, dtype=torch.long)), classes)

    with pytest.raises(UserError, match=r"a batch of the script's own.*s\.batches"):
        under("tensor(2)", work)


@pytest.mark.parametrize(
    "plan", [f"{axis}(2) * tensor(2)" for axis in ("data", "site")] + ["data(2) * pipe(2)"]
)
def test_all_ranks_tell_alike_where_a_loss_was_not_finite(plan: str) -> None:
    def loss(outputs: Tensor, batch: Any) -> Tensor:
        world = current_world()
        assert world is not None
        return classes(outputs, batch) * (float("nan") if world.rank >= 2 else 1.0)

    made = CASES["mlp"].job(loss=loss)
    results = launch_threads(lambda: train_job(made), 4, plan=plan)
    told = {str(e).partition(";")[0] for e in results if isinstance(e, NonFiniteLoss)}
    rank = 3 if "pipe" in plan else 2
    assert told == {f"the loss is nan on rank {rank} at step 0"}


@pytest.mark.parametrize("plan", ["pipe(2)", "data(2) * tensor(2)"])
def test_the_link_of_the_ranks_of_a_replica_is_told(plan: str) -> None:
    _, told = recorded(CASES["mlp"].job(stop=Stop(steps=1)), plan)
    assert told[0].named("start")[0].data["link"] == "thread"


def test_a_model_of_which_nothing_can_be_cut_is_refused_with_its_reasons(tmp_path: Path) -> None:
    made = Case(lambda: nn.Linear(6, 4), (6,), (), 4).job()
    with pytest.raises(PlanError, match=r"tensor\(5\).*no layer of the model can be cut into 5"):
        train(made, "tensor(5)", out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_keeps_how_its_model_was_cut(tmp_path: Path) -> None:
    train(CASES["mlp"].job(stop=Stop(steps=1)), "tensor(2)", out=tmp_path / "run")
    assert "are cut into 2 slices" in RunFolder.open(tmp_path / "run").record["choices"]["tensor"]


def test_all_slices_leave_out_the_step_in_which_one_overflows() -> None:
    """Slice 1 alone has a weight whose gradient overflows at the scaler's first scale."""

    def work() -> tuple[list[bool], float, Tensor]:
        torch.manual_seed(0)
        with session(precision="fp16", device="cpu") as s:
            model = s.model(
                lambda: nn.Sequential(nn.Linear(6, 8, bias=False), nn.ReLU(), nn.Linear(8, 4))
            )
            with torch.no_grad():
                model[0].weight.abs_()
                model[2].weight[:, 4:] *= 30
            optimizer = s.optimizer(torch.optim.SGD(model.parameters(), lr=1e-4))
            skipped = []
            x, y = torch.linspace(1, 2, 48).view(8, 6), torch.arange(8) % 4
            for batch in s.batches((x, y), 8, steps=12, shuffle=False):
                before = model[0].weight.detach().clone()
                s.step(batch, classes, optimizer=optimizer)
                skipped.append(torch.equal(before, model[0].weight))
            assert s.precision.scaler is not None
            return skipped, s.precision.scaler.get_scale(), model[2].bias.detach().clone()

    (skipped, scale, bias), other = under("tensor(2)", work)
    assert other[0] == skipped
    assert other[1] == scale
    assert torch.equal(other[2], bias)
    assert any(skipped)
    assert not all(skipped)


class Longest(torch.optim.SGD):
    """Steps as long as the gradient of a whole tensor says."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.sub_(group["lr"] * parameter.grad / parameter.grad.norm())


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda p: torch.optim.Adafactor(p), "Adafactor.*by the rows and columns"),
        (lambda p: Longest(p, lr=0.1), "Longest.*depends on others"),
    ],
)
def test_optimizers_that_need_whole_tensors_are_refused(make: Any, why: str) -> None:
    with pytest.raises(UserError, match=f"{why}.*AdamW.*leaves the model whole"):
        train(CASES["mlp"].job(optimizer=make), "tensor(2)")


@pytest.mark.parametrize(
    "name",
    ["Adadelta", "Adagrad", "Adam", "Adamax", "AdamW", "ASGD", "NAdam", "RAdam", "RMSprop", "SGD"],
)
def test_optimizers_that_work_per_element_are_known_as_such(name: str) -> None:
    made = getattr(torch.optim, name)([nn.Parameter(torch.zeros(2, 2))], lr=0.01)
    assert works_per_element(made, made.param_groups[0])
    assert not made.state.get(made.param_groups[0]["params"][0], {}).get("step", 0)


def in_a_loop(plan: str, edit: Callable[[nn.Module], None], when: str) -> list[Any]:
    def work() -> None:
        with session() as s:
            model = s.model(mlp)
            optimizer = s.optimizer(torch.optim.SGD(model.parameters(), lr=0.1))
            x = torch.linspace(-1, 1, 144).view(24, 6)
            for batch in s.batches((x, torch.zeros(24, dtype=torch.long)), 6, steps=3):
                if when == "before":
                    edit(model)
                s.backward(classes(model(batch[0]), batch))
                if when == "between":
                    edit(model)
                optimizer.step()
                if when == "after":
                    edit(model)

    return under(plan, work)


def halve(model: nn.Module) -> None:
    with torch.no_grad():
        model[0].weight.mul_(0.5)


def halve_bias(model: nn.Module) -> None:
    with torch.no_grad():
        model[2].bias.mul_(0.5)


def clip(model: nn.Module) -> None:
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)


@pytest.mark.parametrize("when", ["before", "between", "after"])
def test_a_script_that_changes_slices_of_weights_is_refused_with_the_module(when: str) -> None:
    with pytest.raises(UserError, match=r"0\.weight was changed in place.*keep_whole=\['0'\]"):
        in_a_loop("tensor(2)", halve, when)


def test_a_script_that_clips_slices_of_gradients_is_told_who_can() -> None:
    with pytest.raises(UserError, match=r"gradient of 0\.weight was changed.*session\(clip=1.0\)"):
        in_a_loop("tensor(2)", clip, "between")


@pytest.mark.parametrize("plan", ["data(2)", "tensor(2)", "site(2, every=2) * tensor(2)"])
def test_what_may_be_changed_is_changed(plan: str) -> None:
    in_a_loop(plan, halve_bias if "tensor" in plan else halve, "after")
    in_a_loop(plan, lambda model: None, "after")
    if plan == "data(2)":
        in_a_loop(plan, clip, "between")


def test_sites_measure_their_mean_without_being_taken_for_a_script_s_change() -> None:
    made = CASES["mlp"].job(
        validation=CASES["mlp"].job().train, evaluate_every=3, stop=Stop(steps=8)
    )
    train(made, "site(2, every=4) * tensor(2)")
