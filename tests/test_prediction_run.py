"""From a run folder to figures: what is restored, what is refused, and that figures agree."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from prediction_helpers import make_run

from allfuse.base.errors import CheckpointError, Interrupted, JobError, RunError, UserError
from allfuse.jobfile import load_job
from allfuse.launcher.local import launch_local
from allfuse.launcher.thread import first_failure, launch_threads
from allfuse.prediction import Evaluation, evaluate_run, open_run
from allfuse.store.run import RunFolder
from allfuse.store.tensorfile import read_model, write_model
from allfuse.training.loop import train_job


def evaluate(run: Path, workers: int, **options) -> Evaluation:
    """The figures of rank 0, after a check that all ranks have the same."""
    results = launch_threads(functools.partial(evaluate_run, run, **options), workers)
    failure = first_failure(results)
    if failure is not None:
        raise failure
    assert all(result.figures == results[0].figures for result in results)
    return results[0]


def trained(folder: Path, plan: str = "data(1)", **arguments: object) -> tuple[Path, object]:
    """A run folder that training made, and what training said of it."""
    made = make_run(folder, **arguments)
    out = folder / "trained"
    work = functools.partial(train_job, load_job(folder / "job_file.py", arguments), plan, out=out)
    results = launch_threads(work, int(plan[-2]))
    failure = first_failure(results)
    if failure is not None:
        raise failure
    with RunFolder.open(out, lock=True) as opened:
        opened.copy_job(made / "job.py")
        opened.update(arguments=arguments, job_file=str(folder / "job_file.py"))
    return out, results[0]


def test_the_trained_weights_come_back_by_name(tmp_path):
    run, result = trained(tmp_path, hidden=7)
    restored = open_run(run)
    assert restored.notes == []
    assert restored.record["plan"] == "data(1)"
    assert restored.folder.path == run
    weights = restored.model.state_dict()
    assert weights.keys() == result.weights.keys()
    assert all(torch.equal(weights[name], value) for name, value in result.weights.items())
    assert weights["0.weight"].shape == (7, 4)


@pytest.mark.parametrize("plan", ["data(1)", "site(3)"])
def test_interrupted_training_gives_the_newest_whole_checkpoint(tmp_path, plan):
    run, result = trained(tmp_path, plan)
    (run / "model.safetensors").unlink()
    restored = open_run(run)
    for name, value in restored.model.state_dict().items():
        assert torch.allclose(value, result.weights[name], atol=1e-6), name
    assert "the weights are those of the checkpoint of step 4" in restored.notes[-1]
    newest = max((run / "checkpoints").iterdir())
    next(newest.glob("*.safetensors")).write_bytes(b"damaged")
    with pytest.raises(RunError, match=r"holds neither .* next: train on with"):
        open_run(run)


def test_a_run_without_weights_says_how_to_get_some(tmp_path):
    with pytest.raises(RunError, match=r"there are no weights yet; next: train on with --resume"):
        open_run(make_run(tmp_path, weights=False))


def test_a_run_of_a_script_says_what_to_do(tmp_path):
    run = make_run(tmp_path)
    (run / "job.py").unlink()
    with pytest.raises(RunError, match=r"has no job\.py: a script made it.*next: write the model"):
        open_run(run)


def test_no_run_is_refused(tmp_path):
    with pytest.raises(RunError, match="there is no run in"):
        open_run(tmp_path)


def test_a_record_without_arguments_gives_the_defaults(tmp_path):
    run = make_run(tmp_path)
    with RunFolder.open(run, lock=True) as opened:
        record = {"plan": "data(1)"}
        opened._write(record)
    assert open_run(run).model[0].out_features == 5


def test_an_edited_job_is_refused_with_the_first_difference(tmp_path):
    run = make_run(tmp_path)
    job = run / "job.py"
    text = job.read_text()
    job.write_text(text.replace("hidden=5", "hidden=6"))
    with pytest.raises(RunError) as caught:
        open_run(run)
    assert "do not fit the job: 0.weight is (5, 4) in the file and (6, 4) in the" in str(
        caught.value
    )
    job.write_text(text.replace("nn.BatchNorm1d(hidden)", "nn.Identity()"))
    with pytest.raises(RunError, match=r"the model has no 1\.bias; .* 1\.weight; allowed"):
        open_run(run)
    job.write_text(text.replace("bias=False", "").replace("outputs)", "outputs), nn.Linear(3, 3)"))
    with pytest.raises(RunError, match=r"4\.weight is not in the file; 4\.bias"):
        open_run(run)


def test_a_damaged_model_file_is_told(tmp_path):
    run = make_run(tmp_path)
    (run / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read"):
        open_run(run)


def test_tied_and_lazy_weights_are_restored(tmp_path):
    run = make_run(tmp_path)
    (run / "job.py").write_text(
        "import torch\nfrom torch import nn\nimport allfuse as af\n"
        "class Net(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)\n"
        "        self.last.weight = self.first.weight\n"
        "        self.lazy = nn.LazyLinear(2)\n"
        "    def forward(self, x):\n"
        "        return self.lazy(self.last(self.first(x)))\n"
        "def job():\n"
        "    return af.Job(model=Net, train=torch.zeros(4, 4), loss=print, optimizer=print)\n"
    )
    model = load_job(run / "job.py", {}).model()
    model(torch.zeros(1, 4))
    write_model(run / "model.safetensors", model.state_dict())
    with RunFolder.open(run, lock=True) as opened:
        opened.update(arguments={})
    x = torch.randn(3, 4)
    assert torch.equal(open_run(run).model(x), model(x))


@pytest.mark.parametrize("test", [41, 2, 16, 33])
def test_figures_are_those_of_training_for_any_number_of_workers(tmp_path, test):
    run, result = trained(tmp_path, test=test)
    first = evaluate(run, 1)
    assert first.figures == result.test
    assert (first.data, first.samples, first.notes) == ("test", test, [])
    for workers in (2, 3):
        found = evaluate(run, workers)
        assert found.samples == test
        assert found.figures["accuracy"] == first.figures["accuracy"]
        assert found.figures["loss"] == pytest.approx(first.figures["loss"], rel=1e-6)


def test_figures_of_worker_processes_are_the_same(tmp_path):
    run = make_run(tmp_path)
    found = launch_local(functools.partial(evaluate_run, run), 2)
    assert found.figures == pytest.approx(evaluate(run, 1).figures, rel=1e-6)


def test_figures_equal_a_plain_loop(tmp_path):
    run = make_run(tmp_path)
    restored = open_run(run)
    x, y = restored.job.validation
    with torch.no_grad():
        outputs = restored.model.eval()(x)
    found = evaluate(run, 3, data="validation")
    assert found.figures["accuracy"] == pytest.approx(
        float((outputs.argmax(1) == y).float().mean())
    )
    loss = torch.nn.functional.cross_entropy(outputs, y)
    assert found.figures["loss"] == pytest.approx(float(loss), rel=1e-5)
    assert (found.data, found.samples) == ("validation", 23)
    assert evaluate(run, 2, data="train").samples == 64


def test_without_test_data_the_validation_data_is_taken_and_said(tmp_path):
    found = evaluate(make_run(tmp_path, test=0), 2)
    assert (found.data, found.samples) == ("validation", 23)
    assert found.notes == ["the job has no test data: measured on its validation data"]


def test_data_that_is_not_there_is_refused(tmp_path):
    run = make_run(tmp_path)
    with pytest.raises(UserError, match="--data tests: allowed: test, validation, train"):
        evaluate_run(run, data="tests")
    job = run / "job.py"
    job.write_text(job.read_text().replace("validation=samples(23, 1)", "validation=None"))
    with pytest.raises(JobError, match="the job has no validation data; next"):
        evaluate(run, 2, data="validation")


def test_an_interrupt_ends_an_evaluation(tmp_path):
    run = make_run(tmp_path, extra="forward=lambda m, b: interrupt(),")
    job = run / "job.py"
    job.write_text(job.read_text() + "def interrupt():\n    raise KeyboardInterrupt\n")
    with pytest.raises(Interrupted, match="the evaluation was interrupted"):
        evaluate(run, 2)


def test_evaluating_and_predicting_change_nothing_in_the_run_folder(tmp_path):
    run = make_run(tmp_path)
    before = {path.name: path.stat().st_mtime_ns for path in run.iterdir()}
    evaluate(run, 2)
    assert {path.name: path.stat().st_mtime_ns for path in run.iterdir()} == before
    assert read_model(run / "model.safetensors")
