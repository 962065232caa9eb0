"""Jobs, and the files that they come from."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training_cases import job, points

from allfuse.base.errors import JobError
from allfuse.job import Hook, Metric, Stop, default_forward, on
from allfuse.jobfile import load_job, load_job_function, make_job, resolve

GOOD = """
from torch import nn, optim, zeros
import allfuse as af

def job(lr=1e-3, hidden=8, deep=False, name="x", sizes=(1, 2), extra=None):
    return af.Job(
        model=lambda: nn.Linear(2, 1), train=(zeros(4, 2), zeros(4, 1)),
        loss=lambda o, b: (o - b[1]).square().mean(),
        optimizer=lambda p: optim.SGD(p, lr=lr), batch_size=hidden,
    )
"""


def write(folder: Path, text: str, name: str = "job.py") -> Path:
    path = folder / name
    path.write_text(text)
    return path


# Jobs.


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"batch_size": 0}, r"Job\(batch_size=...\): received 0; allowed: a whole number from 1"),
        ({"batch_size": True}, "received True"),
        ({"batch_size": 2.0}, "received 2.0"),
        ({"accumulate": -1}, "received -1"),
        ({"loaders": -1}, "a whole number from 0"),
        ({"precision": "fp8"}, "did you mean 'fp32'.*allowed: fp32, bf16, fp16"),
        ({"batch_statistics": "both"}, "allowed: global, local"),
        ({"scheduler_every": "steps"}, "did you mean 'step'"),
        ({"evaluate_every": "epochs"}, "allowed: steps, 'epoch' or None"),
        ({"save_every": 0}, "received 0"),
        ({"save_every": True}, "received True"),
        ({"clip": 0.0}, "a number above 0"),
        ({"clip": "1"}, "a number above 0"),
        ({"seed": 0.5}, "a whole number"),
        ({"model": None}, "received NoneType; allowed: a function"),
        ({"loss": 1.0}, "received float; allowed: a function"),
        ({"optimizer": "adam"}, "received str; allowed: a function"),
        ({"scheduler": "cosine"}, "received str"),
        ({"collate": 3}, "received int"),
        ({"forward": 3}, "received int"),
        ({"metrics": [abs]}, "allowed: a dict of name"),
        ({"hooks": [abs]}, r"allowed: what af\.on"),
        ({"stop": 5}, r"allowed: af\.Stop"),
        ({"metrics": {"accuracy": abs}, "monitor": "acuracy"}, "did you mean 'accuracy'"),
        ({"monitor": "-accuracy"}, "allowed: loss with or without '-'"),
        ({"stop": Stop(target=1)}, r"Stop\(target=...\)\): it needs evaluations"),
        (
            {"stop": Stop(patience=1), "validation": points(4), "evaluate_every": None},
            "evaluate_every=None; next: give validation data",
        ),
        ({"scheduler": abs, "scheduler_every": "evaluation"}, "it needs evaluations"),
    ],
)
def test_a_field_of_a_wrong_kind_is_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(JobError, match=said):
        job(**change)


@pytest.mark.parametrize(
    "rule",
    [
        {},
        {"steps": 0},
        {"steps": 1.5},
        {"steps": "5"},
        {"epochs": True},
        {"patience": -1},
        {"seconds": 0.0},
        {"seconds": math.nan},
        {"seconds": "60"},
        {"target": math.nan},
        {"target": "high"},
    ],
)
def test_a_rule_of_stopping_that_has_no_meaning_is_refused(rule: dict[str, Any]) -> None:
    with pytest.raises(JobError, match="Stop"):
        Stop(**rule)


def test_a_target_may_be_any_number() -> None:
    assert Stop(target=-3).target == -3
    assert Stop(target=0.0, seconds=1).seconds == 1


def test_the_first_metric_is_monitored_else_the_loss_where_lower_is_better() -> None:
    figures = {"loss": 2.0, "f1": 0.5, "error": 0.25}
    assert job().score(figures) == -2.0
    assert job(metrics={"f1": abs, "error": abs}).score(figures) == 0.5
    assert job(metrics={"f1": abs, "error": abs}, monitor="-error").score(figures) == -0.25
    assert job(monitor="loss").score(figures) == 2.0
    assert job().lower_is_better
    assert not job(metrics={"f1": abs}).lower_is_better


def test_a_hook_is_for_an_event_that_there_is() -> None:
    assert on("step", abs) == Hook("step", abs)
    with pytest.raises(JobError, match="did you mean 'evaluated'"):
        on("evaluate", abs)


def test_the_example_of_a_metric_holds() -> None:
    def counts(outputs: Tensor, batch: Any) -> Tensor:
        guess, truth = outputs > 0, batch[1] > 0
        return torch.stack([(guess & truth).sum(), guess.sum(), truth.sum()])

    f1 = Metric(update=counts, result=lambda t: float(2 * t[0] / (t[1] + t[2])))
    outputs = torch.tensor([1.0, 1.0, -1.0])
    assert f1.result(f1.update(outputs, (None, torch.tensor([1, 0, 1])))) == 0.5


class Sum(nn.Module):
    def forward(self, left: Tensor, right: Tensor | None = None) -> Tensor:
        return left if right is None else left + right


class Anything(nn.Module):
    def forward(self, **values: Tensor) -> list[str]:
        return sorted(values)


def test_the_default_forward_reads_every_kind_of_batch() -> None:
    one, two = torch.ones(1), torch.full((1,), 2.0)
    net = Sum()
    assert default_forward(net, one) == 1
    assert default_forward(net, (one, two)) == 1
    assert default_forward(net, [one, two]) == 1
    assert default_forward(net, {"left": one, "labels": two}) == 1
    assert default_forward(net, {"right": two, "left": one, "labels": two}) == 3
    assert default_forward(Anything(), {"b": one, "a": two}) == ["a", "b"]


# Files.


def test_arguments_are_read_as_the_types_of_their_defaults(tmp_path: Path) -> None:
    function = load_job_function(write(tmp_path, GOOD))
    text = {
        "lr": "3e-3",
        "hidden": "16",
        "deep": "yes",
        "name": "12",
        "sizes": "(3, 4)",
        "extra": "0.5",
    }
    assert resolve(function, text, "job.py") == {
        "lr": 3e-3,
        "hidden": 16,
        "deep": True,
        "name": "12",
        "sizes": (3, 4),
        "extra": 0.5,
    }
    assert (
        resolve(function, {"extra": "some text", "deep": False}, "job.py")["extra"] == "some text"
    )
    assert load_job(tmp_path / "job.py", {"hidden": "16"}).batch_size == 16


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"hiden": "3"}, "--set hiden: job.py has no such argument; did you mean 'hidden'"),
        ({"zzz": "3"}, "allowed: lr, hidden, deep, name, sizes, extra"),
        ({"hidden": "many"}, "--set hidden=many: allowed: a value of type int"),
        ({"hidden": "1.5"}, "a value of type int"),
        ({"lr": "fast"}, "a value of type float"),
        ({"deep": "perhaps"}, "a value of type bool"),
    ],
)
def test_arguments_that_cannot_be_are_refused(
    settings: dict[str, str], said: str, tmp_path: Path
) -> None:
    function = load_job_function(write(tmp_path, GOOD))
    with pytest.raises(JobError, match=said):
        resolve(function, settings, "job.py")


def test_a_job_may_need_arguments_take_any_or_none() -> None:
    def needs(lr: float) -> None: ...

    def takes_any(lr: float = 1.0, **rest: Any) -> None: ...

    with pytest.raises(JobError, match="needs its argument lr; next: add --set lr="):
        resolve(needs, {}, "job.py")
    assert resolve(needs, {"lr": "0.5"}, "job.py") == {"lr": 0.5}
    assert resolve(takes_any, {"depth": "3"}, "job.py") == {"lr": 1.0, "depth": 3}
    with pytest.raises(JobError, match=r"none: job\(\) takes no arguments"):
        resolve(lambda: None, {"lr": "1"}, "job.py")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x = 1\n", r"there is no function job\(\) in it; next: write def job"),
        ("job = 3\n", r"there is no function job\(\)"),
        ("def job():\n    return 3\n", r"job\(\) returned int; allowed: af\.Job"),
    ],
)
def test_a_file_without_a_job_is_refused(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(JobError, match=said):
        load_job(write(tmp_path, text), {})


@pytest.mark.parametrize(
    "text",
    [
        "import os\n\n1 / 0\n\ndef job(): ...\n",
        "def helper():\n    1 / 0\n\ndef job():\n    helper()\n",
    ],
)
def test_what_a_file_raises_is_shown_from_its_own_lines_on(text: str, tmp_path: Path) -> None:
    with pytest.raises(JobError) as failure:
        load_job(write(tmp_path, text), {})
    shown = str(failure.value)
    assert "ZeroDivisionError: division by zero" in shown
    assert "job.py" in shown
    assert "importlib" not in shown
    assert "allfuse/job.py" not in shown


def test_a_file_that_is_no_python_is_shown_with_its_line(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="SyntaxError") as failure:
        load_job(write(tmp_path, "def job(:\n"), {})
    assert "line 1" in str(failure.value)
    with pytest.raises(JobError, match=r"no such file; allowed: a Python file with a function"):
        load_job(tmp_path / "nothing.py", {})
    with pytest.raises(JobError, match="no such file"):
        load_job(tmp_path, {})
    with pytest.raises(JobError, match=r"is not a Python file"):
        load_job(write(tmp_path, GOOD, "job.txt"), {})
    with pytest.raises(JobError, match="importing it raised"):
        load_job(write(tmp_path, "import sys\nsys.exit(3)\n"), {})


def test_an_error_of_the_job_that_is_a_refusal_already_is_passed_on(tmp_path: Path) -> None:
    text = GOOD.replace("batch_size=hidden", "batch_size=-hidden")
    with pytest.raises(JobError, match=r"^Job\(batch_size=...\): received -8"):
        load_job(write(tmp_path, text), {})


def test_a_copied_file_still_finds_its_neighbours(tmp_path: Path) -> None:
    home, copy = tmp_path / "home", tmp_path / "copy"
    home.mkdir()
    copy.mkdir()
    write(home, "size = 5\n", "neighbour_of_a_job.py")
    text = "import neighbour_of_a_job\n" + GOOD.replace("=hidden", "=neighbour_of_a_job.size")
    original = write(home, text)
    assert load_job(write(copy, text), {}, str(original)).batch_size == 5


def test_what_is_made_must_be_a_job() -> None:
    with pytest.raises(JobError, match="returned NoneType"):
        make_job(lambda: None, {}, "job.py")  # type: ignore[arg-type, return-value]
    with pytest.raises(JobError, match=r"raised an error\n(.|\n)*ValueError: no"):

        def bad() -> Any:
            raise ValueError("no")

        make_job(bad, {}, "job.py")
