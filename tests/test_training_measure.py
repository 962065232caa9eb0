"""Figures over a data set: every sample once, whatever the number of workers and the batch size."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training_cases import Recorded, adam, job, mse, network, points, session, train, under

from allfuse.base.errors import JobError, UserError
from allfuse.job import Metric, Stop
from allfuse.training.measure import accuracy

PLANS = ("data(1)", "data(2)", "data(3)", "data(4)", "site(2)", "site(2) * data(2)")


def measured(
    plan: str, metrics: Any, data: Any, *, batch_size: int | None = None, **options: Any
) -> tuple[dict[str, float], int]:
    """Figures and samples of an untrained model, equal on all ranks."""

    def work() -> tuple[dict[str, float], int]:
        recorded = Recorded()
        with session() as s:
            recorded.attach(s)
            s.model(options.get("model", network))
            figures = s.evaluate(
                metrics, data, batch_size=batch_size, forward=options.get("forward")
            )
        (event,) = recorded.named("evaluated")
        assert event.data["metrics"] == figures or any(map(math.isnan, figures.values()))
        return figures, event.data["samples"]

    results = under(plan, work)
    for other in results[1:]:
        assert repr(other) == repr(results[0])
    return results[0]  # type: ignore[no-any-return]


def identity(model: nn.Module, batch: Any) -> Any:
    return batch[0]


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("count", [1, 3, 7, 16])
@pytest.mark.parametrize("batch_size", [None, 1, 4, 5])
def test_every_sample_counts_once(plan: str, count: int, batch_size: int | None) -> None:
    numbers = 2.0 ** torch.arange(count, dtype=torch.float64)  # a sum says which were added
    metrics = {
        "each": lambda outputs, batch: outputs,
        "sum": lambda outputs, batch: (outputs.sum(), len(outputs)),
        "mean": lambda outputs, batch: outputs.mean(),
        "total": Metric(update=lambda outputs, batch: outputs.sum(), result=float),
    }
    figures, samples = measured(plan, metrics, (numbers,), batch_size=batch_size, forward=identity)
    assert samples == count
    assert figures["total"] == 2.0**count - 1
    for name in ("each", "sum", "mean"):
        assert figures[name] == pytest.approx((2.0**count - 1) / count, rel=1e-12)


@pytest.mark.parametrize("plan", PLANS)
def test_a_metric_that_is_no_mean_sees_the_whole_data_set(plan: str) -> None:
    def counts(outputs: Tensor, batch: Any) -> Tensor:
        guess, truth = outputs > 0, batch[1] > 0
        return torch.stack([(guess & truth).sum(), guess.sum(), truth.sum()])

    f1 = Metric(update=counts, result=lambda t: float(2 * t[0] / (t[1] + t[2])))
    x, y = points(23)
    guess, truth = x[:, :1] > 0, y > 0
    expected = 2 * int((guess & truth).sum()) / (int(guess.sum()) + int(truth.sum()))
    figures, _ = measured(plan, {"f1": f1}, (x[:, :1], y), batch_size=4, forward=identity)
    assert figures["f1"] == pytest.approx(expected, rel=1e-12)


def test_a_loss_is_a_metric_and_equals_that_of_the_whole_data_set() -> None:
    x, y = points(23)
    torch.manual_seed(0)
    expected = float(mse(network()(x).detach(), (x, y)))
    for plan in PLANS:
        figures, _ = measured(plan, {"loss": mse}, (x, y), batch_size=5)
        assert figures["loss"] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("value", [1, 1.0, True, torch.tensor(1), torch.tensor([1.0]).half()[0]])
def test_a_figure_may_be_any_kind_of_number(value: Any) -> None:
    figures, _ = measured("data(1)", {"one": lambda outputs, batch: value}, points(5))
    assert figures == {"one": 1.0}


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, "metric bad returned None"),
        ("high", "metric bad returned a str"),
        (torch.ones(2, 3), r"shape \(2, 3\) for 5 samples"),
        ((torch.ones(3), 3), r"a sum of shape \(3,\)"),
        ((1.0, -1), "count of -1"),
        ((1.0, math.nan), "count of nan"),
        ([1.0, 2.0], "returned a list"),
    ],
)
def test_a_figure_of_a_wrong_kind_is_refused(value: Any, said: str) -> None:
    with pytest.raises(JobError, match=said):
        measured("data(1)", {"bad": lambda outputs, batch: value}, points(5))


def test_a_figure_may_be_nan() -> None:
    figures, _ = measured("data(2)", {"bad": lambda outputs, batch: math.nan}, points(5))
    assert math.isnan(figures["bad"])
    figures, _ = measured("data(2)", {"none": lambda outputs, batch: (0.0, 0)}, points(5))
    assert math.isnan(figures["none"])


def test_measuring_without_metrics_counts_samples_only() -> None:
    assert measured("data(2)", {}, points(5)) == ({}, 5)


def test_accuracy_reads_tuples_and_dicts() -> None:
    logits = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    assert accuracy(logits, (None, torch.tensor([1, 1]))).tolist() == [1.0, 0.0]
    assert accuracy(logits, {"labels": torch.tensor([1, 0])}).tolist() == [1.0, 1.0]


def test_the_model_is_measured_in_eval_mode_and_left_as_it_was() -> None:
    with session() as s:
        net = s.model(lambda: nn.Sequential(nn.Dropout(0.9), nn.BatchNorm1d(4)).double())
        x, y = points(6)

        def doubled(outputs: Tensor, batch: Any) -> Tensor:
            assert not outputs.requires_grad
            return (outputs - batch[0]).abs().mean()

        net.eval()
        s.evaluate({"same": doubled}, (x, y))
        assert not net.training
        net.train()
        assert s.evaluate({"same": doubled}, (x, y))["same"] < 1e-4
        assert net.training
        with pytest.raises(ZeroDivisionError):
            s.evaluate({"bad": lambda *_: 1 / 0}, (x, y))
        assert net.training


def test_of_several_models_one_must_be_named() -> None:
    with session() as s:
        one, _ = s.model(network), s.model(network)
        with pytest.raises(UserError, match="2 models; next: pass model="):
            s.evaluate({"loss": mse}, points(5))
        assert s.evaluate({"loss": mse}, points(5), model=one)["loss"] > 0


def test_a_stream_is_measured_whole() -> None:
    class Numbers(torch.utils.data.IterableDataset[Any]):
        def __iter__(self) -> Any:
            for number in range(7):
                yield (torch.tensor(2.0**number),)

    for plan in ("data(1)", "data(2)", "data(3)"):
        total = Metric(update=lambda outputs, batch: outputs.sum(), result=float)
        figures, samples = measured(
            plan, {"total": total}, Numbers(), batch_size=4, forward=identity
        )
        assert (figures["total"], samples) == (127.0, 7)


# What a job makes of figures.


def test_validation_comes_as_often_as_it_was_asked_for() -> None:
    def moments(every: Any) -> list[int]:
        recorded = Recorded()
        made = job(validation=points(7), evaluate_every=every, stop=Stop(epochs=2))
        train(made, "data(1)", prepare=recorded.attach)
        return [event.step for event in recorded.named("evaluated")]

    assert moments("epoch") == [4, 8]
    assert moments(3) == [3, 6, 8]  # and once more at the end
    assert moments(None) == [8]
    assert moments(100) == [8]


def test_the_best_evaluation_is_told_and_its_checkpoint_kept(tmp_path: Any) -> None:
    values = iter([3.0, 1.0, 2.0, 5.0, 4.0, math.nan, 6.0, 6.0])
    recorded = Recorded()
    made = job(
        validation=points(3),
        metrics={"value": lambda outputs, batch: next(values)},
        monitor="-value",
        evaluate_every=1,
        save_every=1,
        batch_size=3,
        stop=Stop(steps=8),
    )
    train(made, "data(1)", prepare=recorded.attach, out=tmp_path / "run")
    best = [event.step for event in recorded.named("evaluated") if event.data["best"]]
    assert best == [1, 2]
    from allfuse.store.checkpoint import Checkpoints

    kept = Checkpoints(tmp_path / "run" / "checkpoints")
    assert kept.best() == 2
    assert kept.steps() == [8, 7, 6, 2]


def test_the_best_is_saved_when_it_is_found_and_no_other_checkpoint_has_its_score(
    tmp_path: Any,
) -> None:
    values = iter([1.0, 9.0, 2.0, 3.0])
    made = job(
        validation=points(3),
        metrics={"value": lambda outputs, batch: next(values)},
        evaluate_every=2,
        save_every=3,
        batch_size=3,
        stop=Stop(steps=8),
    )
    train(made, "data(1)", out=tmp_path / "run")
    from allfuse.store.checkpoint import Checkpoints

    kept = Checkpoints(tmp_path / "run" / "checkpoints")
    assert kept.best() == 4
    assert kept.steps() == [8, 6, 4]


def test_the_result_holds_the_figures_of_the_model_as_it_is() -> None:
    made = job(validation=points(7), test=points(5), evaluate_every=3, stop=Stop(steps=4))
    for result in train(made, "data(2)"):
        net = network()
        net.load_state_dict(result.weights)
        x, y = points(7)
        assert result.metrics["loss"] == pytest.approx(float(mse(net(x).detach(), (x, y))))
        x, y = points(5)
        assert result.test["loss"] == pytest.approx(float(mse(net(x).detach(), (x, y))))


def test_a_plateau_scheduler_follows_the_monitored_figure() -> None:
    values = iter([1.0, 2.0, 3.0, 3.0, 3.0])
    rates: list[float] = []
    from allfuse.job import on

    made = job(
        validation=points(4),
        metrics={"value": lambda outputs, batch: next(values)},
        monitor="value",
        optimizer=lambda p: torch.optim.SGD(p, lr=1.0),
        scheduler=lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(
            o, mode="max", patience=0, factor=0.5
        ),
        scheduler_every="evaluation",
        evaluate_every=1,
        stop=Stop(steps=5),
        hooks=[on("step", lambda s, event: rates.append(event.data["lr"]))],
    )
    train(made)
    assert rates == [1.0, 1.0, 1.0, 1.0, 0.5]


def test_evaluating_changes_nothing_in_training() -> None:
    weights = [
        train(job(validation=points(7), evaluate_every=every, optimizer=adam))[0].weights
        for every in (None, 1)
    ]
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name])
