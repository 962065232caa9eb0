"""Which fusion of models is best, and how that is told."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import merge
from judged import chosen, find, near, subject, truth, weights_of, write_job, write_models
from safetensors.torch import load_file, save_file

from allfuse.base.errors import Interrupted, JobError, MergeError
from allfuse.job import Metric
from allfuse.jobfile import load_job
from allfuse.judge.candidate import Candidate, single, together
from allfuse.judge.coefficients import Space
from allfuse.judge.data import read_data
from allfuse.judge.interval import interval
from allfuse.judge.measured import figure_of, measure_model
from allfuse.judge.methods import legal_rules
from allfuse.judge.report import NAME
from allfuse.judge.scores import NAME as SCORES
from allfuse.judge.scratch import scratch
from allfuse.judge.search import search
from allfuse.judge.subject import find_job
from allfuse.judge.wish import Wish
from allfuse.launcher.thread import first_failure, launch_threads
from allfuse.merge.grouping import place_of
from allfuse.merge.outline import outline
from allfuse.plan.parse import read_call
from allfuse.prediction import evaluate_run
from allfuse.rule import METHODS, Mean
from allfuse.rule.model_stock import ModelStock
from allfuse.rule.slerp import Slerp
from allfuse.rule.task_arithmetic import TaskArithmetic
from allfuse.rule.ties import Ties

# Searches.


def test_a_greedy_soup_leaves_the_bad_model_out(tmp_path: Path) -> None:
    models = write_models(tmp_path, [near(1), -truth(), near(2), near(3)])
    report = find(subject(models), tmp_path / "out")
    assert str(models[1]) not in chosen(report)["models"]
    assert len(chosen(report)["models"]) > 1
    single_row, uniform = report["rows"]["best single"], report["rows"]["uniform"]
    for data in ("validation", "test"):
        assert chosen(report)[data]["figure"] > single_row[data]["figure"]
        assert chosen(report)[data]["figure"] > uniform[data]["figure"]
    kept = [models.index(Path(path)) for path in chosen(report)["models"]]
    expected = torch.stack([load_file(models[model])["0.weight"] for model in kept]).mean(0)
    assert torch.allclose(weights_of(tmp_path / "out"), expected, atol=1e-6)


def test_a_greedy_soup_adds_what_makes_it_no_worse(tmp_path: Path) -> None:
    same = near(1)
    models = write_models(tmp_path, [same, same + 1e-6, same - 1e-6])
    report = find(subject(models), tmp_path / "out")
    assert len(chosen(report)["models"]) == 3


def test_nothing_better_ships_the_best_single_model_and_says_so(tmp_path: Path) -> None:
    models = write_models(tmp_path, [-truth(), near(1, 0.1), -truth()])
    report = find(subject(models), tmp_path / "out")
    assert chosen(report)["models"] == [str(models[1])]
    assert chosen(report)["rule"] == "none"
    assert any("best single model" in note and "as it is" in note for note in report["notes"])
    assert torch.equal(weights_of(tmp_path / "out"), load_file(models[1])["0.weight"])


def test_worse_than_the_best_single_model_on_test_data_is_told(tmp_path: Path) -> None:
    models = write_models(tmp_path, [near(1), near(2), near(3), near(4)])
    free = find(subject(models), tmp_path / "free")
    assert not free["notes"]
    teacher = free["rows"]["best single"]["models"][0]  # it alone knows what the test data says
    report = find(subject(models, arguments={"teacher": teacher}), tmp_path / "out")
    assert report["gain"]["test"]["figure"] < 0
    assert any("worse than the best single model" in note for note in report["notes"])
    kept = json.loads((tmp_path / "out" / NAME).read_text())
    assert kept["notes"] == report["notes"]


def test_coefficients_find_weights_that_the_uniform_soup_has_not(tmp_path: Path) -> None:
    pytest.importorskip("cma")
    models = write_models(tmp_path, [near(1), -0.8 * truth(), near(2)])
    given = subject(models)
    report = find(given, tmp_path / "out", "coefficients", evaluations=40)
    assert report["candidates"] <= 40
    found = chosen(report)
    assert found["validation"]["figure"] > report["rows"]["uniform"]["validation"]["figure"] + 0.1
    assert found["validation"]["figure"] >= report["rows"]["best single"]["validation"]["figure"]
    assert found["weights"][1] < 0.3 * max(found["weights"])


@pytest.mark.slow
def test_the_same_seed_finds_the_same_coefficients(tmp_path: Path) -> None:
    pytest.importorskip("cma")
    rows = []
    state = np.random.get_state()[1].copy()
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        models = write_models(tmp_path / name, [near(1), near(2)])
        report = find(subject(models), tmp_path / name / "out", "coefficients", evaluations=15)
        rows.append([(row["weights"], row["validation"]) for row in report["judged"]])
    assert rows[0] == rows[1]
    assert (np.random.get_state()[1] == state).all()


@pytest.mark.slow
def test_a_weight_for_each_layer_finds_what_no_weights_for_all_can(tmp_path: Path) -> None:
    pytest.importorskip("cma")
    job = tmp_path / "job_of_models.py"
    text = write_job(tmp_path).read_text()
    deep = "nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 3, bias=False))"
    text = text.replace("network(norm),", f"{deep},", 1)
    eye, noise = torch.eye(6), torch.randn(6, 6, generator=torch.Generator().manual_seed(5))
    models = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    save_file({"0.weight": eye, "1.weight": 3 * noise[:3]}, models[0])
    save_file({"0.weight": 3 * noise, "1.weight": truth()}, models[1])
    given = subject(models)
    job.write_text(text)
    flat = find(given, tmp_path / "flat", "coefficients", evaluations=40)
    deep_report = find(given, tmp_path / "deep", "coefficients", evaluations=120, per_layer=True)
    best = chosen(deep_report)
    assert best["validation"]["figure"] > chosen(flat)["validation"]["figure"] + 0.03
    layers = best["layers"]
    assert layers["0"][0] > layers["0"][1]
    assert layers["1"][1] > layers["1"][0]


@pytest.mark.slow
def test_methods_try_all_rules_that_the_models_allow(tmp_path: Path) -> None:
    save_file({"0.weight": 0.3 * truth()}, tmp_path / "base.safetensors")
    models = write_models(tmp_path, [near(1), near(2)])
    report = find(subject(models, base=tmp_path / "base.safetensors"), tmp_path / "out", "methods")
    rules = [row["rule"] for row in report["judged"]]
    names = {read_call(rule).name for rule in rules if rule != "none"}
    assert {"mean", "slerp", "ties", "dare_ties", "task_arithmetic", "model_stock"} <= names
    assert "ties(density=0.2)" in rules
    figures = [row["validation"] for row in report["judged"]]
    assert figures == sorted(figures, reverse=True)
    assert chosen(report)["validation"]["figure"] == figures[0]


def test_rules_are_legal_by_the_number_of_models_and_the_base() -> None:
    names = [{type(rule).name for rule in legal_rules(models, base)}
             for models, base in ((2, False), (3, False), (3, True))]  # fmt: skip
    assert "slerp" in names[0]
    assert "ties" not in names[0]
    assert "slerp" not in names[1]
    assert "ties" in names[2]
    assert all("passthrough" not in each for each in names)
    changing = {name for name, rule in METHODS.items() if rule.of_changes}
    assert changing <= names[2]


def test_lower_is_better_where_the_job_says_so(tmp_path: Path) -> None:
    models = write_models(tmp_path, [near(1), near(2), -truth()])
    report = find(subject(models, arguments={"metric": "loss"}), tmp_path / "out")
    assert report["metric"] == "loss"
    assert report["lower_is_better"]
    single_row = report["rows"]["best single"]
    assert chosen(report)["validation"]["figure"] <= single_row["validation"]["figure"]
    assert report["gain"]["validation"]["figure"] >= 0


# What is told, and whether it is so.


@pytest.mark.parametrize("about", [{}, {"dtype": "BF16"}], ids=["as they are", "in bf16"])
def test_figures_are_those_that_evaluate_finds_of_the_result(
    about: dict[str, Any], tmp_path: Path
) -> None:
    others = {
        "1.weight": torch.ones(3), "1.bias": torch.zeros(3), "1.running_mean": torch.zeros(3),
        "1.running_var": torch.ones(3), "1.num_batches_tracked": torch.tensor(5),
    }  # fmt: skip
    models = write_models(tmp_path, [near(1), near(2), near(3)], **others)
    report = find(subject(models, arguments={"norm": True}, **about), tmp_path / "out")
    assert len(chosen(report)["models"]) > 1
    assert any("BatchNorm" in note for note in report["notes"])
    for data in ("validation", "test"):
        found = evaluate_run(tmp_path / "out", data=data)
        assert found.figures == chosen(report)[data]["figures"]
        assert found.samples == chosen(report)[data]["samples"]
    mean = load_file(tmp_path / "out" / "model.safetensors")["1.running_mean"]
    assert mean.abs().max() > 0


def test_statistics_stay_as_they_are_where_that_is_asked(tmp_path: Path) -> None:
    others = {
        "1.weight": torch.ones(3), "1.bias": torch.zeros(3), "1.running_mean": torch.zeros(3),
        "1.running_var": torch.ones(3), "1.num_batches_tracked": torch.tensor(5),
    }  # fmt: skip
    models = write_models(tmp_path, [near(1), near(2)], **others)
    given = subject(models, arguments={"norm": True}, calibrate=False)
    find(given, tmp_path / "out")
    assert not load_file(tmp_path / "out" / "model.safetensors")["1.running_mean"].any()


def test_candidates_are_told_as_they_are_judged(tmp_path: Path) -> None:
    events: list[tuple[str, dict[str, Any]]] = []
    models = write_models(tmp_path, [near(1), near(2), near(3)])
    report = find(
        subject(models), tmp_path / "out", tell=lambda name, **data: events.append((name, data))
    )
    assert events[0] == ("searching", {"search": "greedy", "models": 3, "total": 6})
    judged = [data for name, data in events if name == "judged"]
    assert [data["number"] for data in judged] == list(range(1, report["candidates"] + 1))
    assert judged[0]["candidate"] == str(models[0])
    bests = [data["best"] for data in judged]
    assert bests == sorted(bests)
    assert bests[-1] >= chosen(report)["validation"]["figure"]


def test_half_of_the_validation_data_is_held_back_where_there_is_no_test_data(
    tmp_path: Path,
) -> None:
    job = load_job(write_job(tmp_path), {"test": 0})
    data, note = read_data(job)
    assert note is not None
    assert "150 of its 301 validation samples" in note
    whole = sorted(map(tuple, job.validation[0].tolist()))
    parts = [tuple(data[name].sample(row)[0].tolist())
             for name in data for row in range(data[name].size)]  # fmt: skip
    assert sorted(parts) == whole
    models = write_models(tmp_path, [near(1), near(2)])
    report = find(subject(models, arguments={"test": 0}), tmp_path / "out")
    assert report["notes"][0] == note
    assert chosen(report)["test"]["samples"] == 150
    assert chosen(report)["validation"]["samples"] == 151


def test_intervals_are_those_of_a_mean_and_pairs_are_drawn_alike() -> None:
    chance = np.random.default_rng(0)
    right = (chance.random(1000) < 0.8).astype(float)
    parts = [[value, 1.0] for value in right]
    figure = functools.partial(figure_of, lambda outputs, batch: 0.0)
    low, high = interval(parts, figure) or (0, 0)
    error = 1.96 * (right.mean() * (1 - right.mean()) / 1000) ** 0.5
    assert low == pytest.approx(right.mean() - error, abs=0.15 * error)
    assert high == pytest.approx(right.mean() + error, abs=0.15 * error)
    other = right.copy()
    other[:10] = 1 - other[:10]
    pair = interval(parts, figure, [[value, 1.0] for value in other]) or (0, 0)
    assert pair[1] - pair[0] < 0.5 * (high - low)
    assert interval(parts[:9], figure) is None


def test_a_metric_that_is_no_mean_has_an_interval_over_batches(tmp_path: Path) -> None:
    job = load_job(write_job(tmp_path), {})

    def counts(outputs: Any, batch: Any) -> torch.Tensor:
        guess, right = outputs.argmax(1) == 0, batch[1] == 0
        return torch.stack([(guess & right).sum(), guess.sum(), right.sum()])

    f1 = Metric(update=counts, result=lambda total: float(2 * total[0] / (total[1] + total[2])))
    object.__setattr__(job, "metrics", {"f1": f1})
    object.__setattr__(job, "batch_size", 10)
    model = torch.nn.Sequential(torch.nn.Linear(6, 3, bias=False))
    data, _ = read_data(job)
    found = measure_model(model, job, data["validation"], torch.device("cpu"))
    assert found.units == "batches"
    assert figure_of(f1, np.sum(found.parts, axis=0)) == found.figures["f1"]
    low, high = interval(found.parts, functools.partial(figure_of, f1)) or (1, 0)
    assert low < found.figures["f1"] < high


# What was measured before.


def test_a_second_search_measures_nothing(tmp_path: Path) -> None:
    models = write_models(tmp_path, [near(1), near(2), near(3)])
    first = find(subject(models), tmp_path / "a")
    again = find(subject(models), tmp_path / "b")
    assert first["measured"] > 0
    assert first["known_before"] == 0
    assert again["measured"] == 0
    assert again["rows"] == first["rows"]
    other = find(subject(models), tmp_path / "c", "methods")
    assert other["measured"] < other["candidates"]


@pytest.mark.parametrize("change", ["model", "job", "data"])
def test_what_has_changed_is_measured_again(change: str, tmp_path: Path) -> None:
    models = write_models(tmp_path, [near(1), near(2)])
    first = find(subject(models), tmp_path / "a")
    given = subject(models)
    if change == "model":
        save_file({"0.weight": near(9)}, models[0])
    elif change == "job":
        text = given.job.path.read_text()
        given.job.path.write_text(
            text.replace("cross_entropy(outputs,", "cross_entropy(2 * outputs,")
        )
    else:
        given = subject(models, arguments={"seed": 77})
    again = find(given, tmp_path / "b")
    assert again["measured"] > 0
    assert first["candidates"] == again["candidates"]


def test_damaged_scores_count_for_nothing(tmp_path: Path) -> None:
    models = write_models(tmp_path, [near(1), near(2)])
    first = find(subject(models), tmp_path / "a")
    for file in (tmp_path / SCORES).glob("*.json"):
        file.write_text(file.read_text()[:-20])
    again = find(subject(models), tmp_path / "b")
    assert again["measured"] == first["measured"]
    assert again["rows"] == first["rows"]


def test_a_search_that_was_interrupted_goes_on(tmp_path: Path) -> None:
    models = write_models(tmp_path, [near(1), near(2), near(3), near(4)])

    def stop(name: str, **data: Any) -> None:
        if name == "judged" and data["number"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted, match="goes on"):
        find(subject(models), tmp_path / "out", tell=stop)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".partial*"))
    report = find(subject(models), tmp_path / "out")
    assert report["known_before"] >= 3
    whole = tmp_path / "whole"
    whole.mkdir()
    alone = find(subject(write_models(whole, [near(1), near(2), near(3), near(4)])), whole / "out")
    assert [row["figure"] for row in _figures(report)] == [row["figure"] for row in _figures(alone)]


def _figures(report: dict[str, Any]) -> list[dict[str, Any]]:
    return [row[data] for row in report["rows"].values() for data in ("validation", "test")]


@pytest.mark.slow
def test_a_search_that_was_killed_goes_on_and_leaves_nothing(tmp_path: Path) -> None:
    models = write_models(tmp_path, [near(seed) for seed in range(12)])
    command = [sys.executable, "-m", "allfuse", "merge", *map(str, models), "--search", "greedy"]
    command += ["--job", str(write_job(tmp_path)), "--out", str(tmp_path / "out"), "--json"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 60
    while len(list((tmp_path / SCORES).glob("[0-9a-f]*"))) < 5 and process.poll() is None:
        assert time.monotonic() < until
        time.sleep(0.002)
    assert process.poll() is None, "it was faster than the test"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out").exists()
    command += ["--workers", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["known_before"] >= 5
    left = {path.name for path in tmp_path.iterdir()} - {path.name for path in models}
    assert left <= {"out", "job_of_models.py", SCORES, "__pycache__"}


def test_scratch_of_processes_that_are_gone_is_swept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("allfuse.judge.scratch.MEMORY", tmp_path / "shm")
    (tmp_path / "shm").mkdir()
    for place, name in ((tmp_path, ".allfuse-judge-x"), (tmp_path / "shm", "allfuse-judge-y")):
        (place / name).mkdir()
        (place / name / "lock").touch()
        (place / name / "model.safetensors").touch()
    with scratch(1000, tmp_path) as held, scratch(1 << 60, tmp_path) as beside:
        assert held.parent == tmp_path / "shm"
        assert beside.parent == tmp_path
        assert held.exists()
        assert beside.exists()
        assert len(list(tmp_path.glob(".allfuse-judge-*"))) == 1
        assert len(list((tmp_path / "shm").iterdir())) == 1
    assert not list((tmp_path / "shm").iterdir())
    assert [path.name for path in tmp_path.iterdir()] == ["shm"]


# Several workers.


@pytest.mark.parametrize("how", ["greedy", "methods"])
def test_workers_find_what_one_finds(how: str, tmp_path: Path) -> None:
    reports = []
    for workers in (1, 3):
        folder = tmp_path / str(workers)
        folder.mkdir()
        models = write_models(folder, [near(1), -truth(), near(2), near(3)])
        given = subject(models)
        wish = Wish(search=how, out=folder / "out")
        results = launch_threads(functools.partial(search, given, wish), workers)
        failure = first_failure(results)
        if failure is not None:
            raise failure
        assert results[1:] == [None] * (workers - 1)
        reports.append(results[0])
    one, three = ([row["figure"] for row in _figures(report)] for report in reports)
    assert one == three
    kept = [[Path(path).name for path in chosen(report)["models"]] for report in reports]
    assert kept[0] == kept[1]


def test_an_error_of_another_worker_ends_all(tmp_path: Path) -> None:
    models = write_models(tmp_path, [near(1), near(2) / 0])
    work = functools.partial(search, subject(models), Wish(search="greedy", out=tmp_path / "out"))
    failure = first_failure(launch_threads(work, 2))
    assert isinstance(failure, MergeError)
    assert "m1.safetensors" in str(failure)
    assert not (tmp_path / "out").exists()


# What is refused.


@pytest.mark.parametrize(
    ("given", "wish", "said"),
    [
        ({}, {"how": "greedi"}, "did you mean 'greedy'"),
        ({}, {"per_layer": True}, "--search coefficients"),
        ({}, {"evaluations": 3}, "allowed: 4 or more"),
        ({"rule": Slerp()}, {}, "any number of models"),
        ({"rule": Ties()}, {}, "--base"),
        ({"rule": Ties()}, {"how": "methods"}, "leave it out"),
        ({"base": "m0.safetensors"}, {}, "would not look at the base"),
        ({"models": 1}, {}, "at least 2 models"),
    ],
)
def test_bad_searches_end_before_anything_starts(
    given: dict[str, Any], wish: dict[str, Any], said: str, tmp_path: Path
) -> None:
    models = write_models(tmp_path, [near(1), near(2), near(3)])[: given.pop("models", 3)]
    if "base" in given:
        given["base"] = tmp_path / given["base"]
    about = subject(models, **given)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(MergeError, match=said):
        find(about, tmp_path / "out", **wish)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_models_that_the_job_does_not_build_are_refused(tmp_path: Path) -> None:
    models = write_models(tmp_path, [near(1)[:, :5].contiguous(), near(2)[:, :5].contiguous()])
    with pytest.raises(MergeError, match="does not fit the model"):
        find(subject(models), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_job_without_validation_data_cannot_judge(tmp_path: Path) -> None:
    job = load_job(write_job(tmp_path), {})
    object.__setattr__(job, "validation", None)
    with pytest.raises(JobError, match="no validation data"):
        read_data(job)


def test_coefficients_name_the_package_that_they_need(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cma", None)
    models = write_models(tmp_path, [near(1), near(2)])
    with pytest.raises(MergeError, match=r"allfuse\[search\]"):
        find(subject(models), tmp_path / "out", "coefficients")


def test_a_model_whose_figure_is_no_number_is_the_worst(tmp_path: Path) -> None:
    models = write_models(tmp_path, [near(1), near(2) / 0, near(3)])
    with pytest.raises(MergeError, match=r"m1\.safetensors"):
        find(subject(models), tmp_path / "out")
    given = subject(models, arguments={"metric": "loss"}, allow_nan=True)
    report = find(given, tmp_path / "out")
    assert str(models[1]) not in chosen(report)["models"]
    kept = json.loads((tmp_path / "out" / NAME).read_text(), parse_constant=_refuse)
    assert kept["judged"][-1]["validation"] is None


def _refuse(word: str) -> None:
    raise AssertionError(f"{word} is not JSON")


# Candidates.


@pytest.mark.parametrize(
    "candidate",
    [
        single(3),
        together([2, 0], Mean()),
        Candidate((0, 1), Ties(density=0.25), (0.125, 1.0), (("layers.1", (0.5, 0.25)),)),
    ],
    ids=str,
)
def test_a_candidate_is_what_its_text_says(candidate: Candidate) -> None:
    assert Candidate.read(json.loads(json.dumps(candidate.plain()))) == candidate


def test_weights_of_layers_reach_their_tensors_alone(tmp_path: Path) -> None:
    names = ["1.weight", "11.weight", "layers.1.a", "layers.11.a", "head.bias"]
    for number in range(2):
        save_file({name: torch.ones(2) for name in names}, tmp_path / f"m{number}.safetensors")
    models = [tmp_path / "m0.safetensors", tmp_path / "m1.safetensors"]
    layers = tuple((place_of(name)[0], (0.1 * place, 1.0)) for place, name in enumerate(names))
    way = Candidate((0, 1), Mean(), (1.0, 1.0), layers)
    tasks = outline(subject(models).recipe(way)).tasks
    found = {task.target.name: task.weights for task in tasks}
    assert found == {name: (0.1 * place, 1.0) for place, name in enumerate(names)}


def test_points_stand_for_weights_and_arguments() -> None:
    space = Space(Ties(density=0.5), 2, [])
    assert space.size == 4
    start = space.start([0.5, 0.5])
    assert space.candidate(start) == Candidate((0, 1), Ties(density=0.5), (1.0, 1.0))
    sums = Space(TaskArithmetic(), 2, [])
    assert sums.candidate(sums.start([0.5, 0.5])).weights == (0.5, 0.5)
    assert space.candidate([0.0, 0.0, 2.0, -1.0]).weights == (1.0, 1.0)
    assert space.candidate([0.0, 1.0, 2.0, 0.5]).rule == Ties(density=1.0)
    assert Space(Slerp(), 2, ["a", "b"]).size == 1
    assert Space(TaskArithmetic(), 2, ["a", "b"]).size == 5
    with pytest.raises(MergeError, match="neither weights nor"):
        Space(ModelStock(), 2, [])


# The command line.


def test_the_command_searches_and_tells(tmp_path: Path) -> None:
    models = list(map(str, write_models(tmp_path, [near(1), -truth(), near(2)])))
    job, out = str(write_job(tmp_path)), tmp_path / "new" / "out"
    said = merge(*models, "--search", "greedy", "--job", job, "--out", str(out), "--dry-run")
    assert "greedy search of 3 models" in said
    assert not out.parent.exists()
    said = merge(*models, "--search", "greedy", "--job", job, "--out", str(out))
    for part in ("best single", "uniform", "chosen", "validation (301)", "test (200)", "95 %"):
        assert part in said
    said = merge(*models, "--search", "greedy", "--job", job, "--out", str(out), "--overwrite",
                 "--json", "-q")  # fmt: skip
    told = json.loads(said.splitlines()[-1])
    assert told["ok"]
    assert told["measured"] == 0


def test_the_models_in_a_folder_are_searched_and_the_job_is_that_of_its_run(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "snapshots").mkdir(parents=True)
    for step, seed in ((5, 1), (10, 2), (20, 3)):
        save_file({"0.weight": near(seed)}, run / "snapshots" / f"step-{step:06}.safetensors")
    (run / "job.py").write_text(write_job(tmp_path).read_text())
    record = {"format": 1, "plan": "data(1)", "arguments": {"test": 150}}
    (run / "run.json").write_text(json.dumps(record))
    said = merge(str(run), "--search", "greedy", "--out", str(tmp_path / "out"), "--json", "-q")
    told = json.loads(said.splitlines()[-1])
    assert len(told["models"]) == 3
    assert "stands for 3 models: step-000005.safetensors, " in told["notes"][0]
    assert told["rows"]["chosen"]["test"]["samples"] == 150


def test_options_of_a_search_need_one(tmp_path: Path) -> None:
    models = list(map(str, write_models(tmp_path, [near(1), near(2)])))
    with pytest.raises(Exception, match="belongs to a search"):
        merge(*models, "--out", str(tmp_path / "out"), "--evaluations", "9")
    with pytest.raises(Exception, match="a search finds them"):
        merge(*models, "--out", str(tmp_path / "out"), "--search", "greedy", "--weights", "1,2")


def test_without_a_job_it_says_what_to_give(tmp_path: Path) -> None:
    models = write_models(tmp_path, [near(1), near(2)])
    with pytest.raises(MergeError, match="--job"):
        find_job(models, [], {})
    with pytest.raises(MergeError, match="one --job"):
        find_job(models, [models[0], models[1]], {})
