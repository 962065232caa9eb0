"""Scoring files: every row once and in order, the same bytes for any number of workers, and no
half-written output after any failure."""

from __future__ import annotations

import csv
import errno
import functools
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from prediction_helpers import make_run, write_rows

from allfuse.base.errors import DataError, Interrupted, JobError, PeerLost, RunError, UserError
from allfuse.launcher import current_world
from allfuse.launcher.local import launch_local
from allfuse.launcher.thread import first_failure, launch_threads
from allfuse.link.thread import Killed, Script
from allfuse.prediction import Summary, open_run, predict_file
from allfuse.prediction import output as output_module
from allfuse.prediction import score as score_module
from allfuse.prediction.score import batch_starts

CLASSES = ["low", "middle, or so", 'say "high"']


def rows(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 4, generator=torch.Generator().manual_seed(seed))


def predict(run: Path, source: Path, target: Path, workers: int = 1, **options) -> Summary:
    """Predict with ranks as threads; what rank 0 returned, or the failure to show."""
    script = options.pop("script", None)
    work = functools.partial(predict_file, run, source, target, **options)
    results = launch_threads(work, workers, script=script, timeout_s=20)
    failure = first_failure(results)
    if failure is not None:
        raise failure
    assert all(result == results[0] for result in results if result.seconds == results[0].seconds)
    return results[0]


def read(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def left_over(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if "partial" in path.name)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path)


def test_classes_and_confidences_are_those_of_the_model(tmp_path, run):
    numbers = rows(700)
    source = write_rows(tmp_path / "in.csv", numbers)
    summary = predict(run, source, tmp_path / "out.csv")
    with torch.no_grad():
        wanted = open_run(run).model.eval()(numbers).softmax(1)
    found = read(tmp_path / "out.csv")
    assert list(found[0]) == ["prediction", "confidence"]
    assert [row["prediction"] for row in found] == [CLASSES[i] for i in wanted.argmax(1).tolist()]
    confidences = torch.tensor([float(row["confidence"]) for row in found])
    assert torch.allclose(confidences, wanted.max(1).values, atol=1e-6)
    assert (summary.rows, summary.shares, summary.notes) == (700, [700], [])
    assert summary.output == str(tmp_path / "out.csv")


@pytest.mark.parametrize("count", [1, 2, 7, 50, 333])
@pytest.mark.parametrize("batch_size", [1, 7, None])
def test_output_is_equal_byte_for_byte_for_any_number_of_workers(tmp_path, run, count, batch_size):
    source = write_rows(tmp_path / "in.csv", rows(count))
    outputs, shares = [], []
    for workers in (1, 2, 3):
        target = tmp_path / f"out{workers}.csv"
        summary = predict(run, source, target, workers, batch_size=batch_size)
        outputs.append(target.read_bytes())
        shares.append(summary.shares)
        assert summary.rows == sum(summary.shares) == count
        assert len(summary.shares) == workers
    assert outputs[0] == outputs[1] == outputs[2]
    assert len(read(tmp_path / "out1.csv")) == count
    if count == 333 and batch_size == 7:
        assert min(shares[2]) > 50, "every worker has a share"


def test_output_does_not_depend_on_how_many_rows_a_turn_takes(tmp_path, run, monkeypatch):
    source = write_rows(tmp_path / "in.csv", rows(333))
    predict(run, source, tmp_path / "out1.csv", batch_size=10)
    monkeypatch.setattr(score_module, "TURN_BYTES", 1)
    predict(run, source, tmp_path / "out2.csv", 2, batch_size=10)
    assert (tmp_path / "out1.csv").read_bytes() == (tmp_path / "out2.csv").read_bytes()


def test_workers_as_processes_write_the_same_bytes(tmp_path, run):
    source = write_rows(tmp_path / "in.csv", rows(1007))
    predict(run, source, tmp_path / "out1.csv", batch_size=100)
    summary = launch_local(
        functools.partial(predict_file, run, source, tmp_path / "out2.csv", batch_size=100), 2
    )
    assert sum(summary.shares) == 1007
    assert min(summary.shares) >= 400
    assert (tmp_path / "out1.csv").read_bytes() == (tmp_path / "out2.csv").read_bytes()


@pytest.mark.parametrize("workers", [1, 2])
def test_a_bad_row_ends_worker_processes_with_its_message(tmp_path, run, workers):
    source = write_rows(tmp_path / "in.csv", rows(300))
    with open(source, "a") as file:
        file.write("1,2,x,4\n")
    work = functools.partial(predict_file, run, source, tmp_path / "out.csv", batch_size=50)
    with pytest.raises(UserError, match="row 302, column 'c': received the text 'x'"):
        launch_local(work, workers)
    assert not (tmp_path / "out.csv").exists()
    assert not left_over(tmp_path)


def test_kept_columns_come_after_the_predictions_in_order(tmp_path, run):
    text = 'note,d,c,b,a,id\n"two\nlines, ""q""",1,2,3,4,x_1\nlone\rreturn,5,6,7,8,x_2\n'
    text = text.replace("lone\rreturn", '"lone\rreturn"')
    (tmp_path / "in.csv").write_bytes(text.encode())
    for workers in (1, 2):
        target = tmp_path / f"out{workers}.csv"
        predict(run, tmp_path / "in.csv", target, workers, keep=["id", "note"], batch_size=1)
        found = read(target)
        assert list(found[0]) == ["prediction", "confidence", "id", "note"]
        assert [row["id"] for row in found] == ["x_1", "x_2"]
        assert [row["note"] for row in found] == ['two\nlines, "q"', "lone\rreturn"]


def test_a_kept_column_must_not_hide_an_answer(tmp_path, run):
    (tmp_path / "in.csv").write_text("a,b,c,d,prediction\n1,2,3,4,x\n")
    with pytest.raises(DataError, match="--keep prediction: the output has a column of that name"):
        predict(run, tmp_path / "in.csv", tmp_path / "out.csv", 2, keep=["prediction"])
    assert not left_over(tmp_path)


@pytest.mark.parametrize(
    ("outputs", "names"),
    [(1, ["prediction"]), (3, ["prediction_0", "prediction_1", "prediction_2"])],
)
def test_without_classes_the_values_are_written_so_that_they_read_back_equal(
    tmp_path, outputs, names
):
    run = make_run(tmp_path, outputs=outputs, classes=False)
    numbers = rows(20)
    predict(run, write_rows(tmp_path / "in.csv", numbers), tmp_path / "out.csv", 2)
    found = read(tmp_path / "out.csv")
    assert list(found[0]) == names
    with torch.no_grad():
        wanted = open_run(run).model.eval()(numbers)
    values = torch.tensor([[float(row[name]) for name in names] for row in found])
    assert torch.allclose(values, wanted, atol=1e-6)
    shortest = min(len(row[names[0]]) for row in found)
    assert shortest < 12, "no digits that float32 does not have"


FORWARDS = {
    "an object with logits": (
        "forward=lambda m, b: type('Out', (), {'logits': m(b[0])})(),",
        None,
    ),
    "one value each": ("forward=lambda m, b: m(b[0])[:, 0], ", "1 values for each row and the job"),
    "no tensor": ("forward=lambda m, b: {'x': m(b[0])},", "the model gives a dict; allowed"),
    "three dims": ("forward=lambda m, b: m(b[0])[None],", r"a tensor \(1, 30, 3\) for 30 rows"),
    "lost rows": ("forward=lambda m, b: m(b[0])[1:],", r"a tensor \(29, 3\) for 30 rows"),
    "another batch": ("forward=lambda m, b: m(b['x']),", r"rows 2 to 31: TypeError: .* \(x,\)"),
    "another width": ("forward=lambda m, b: m(b[0][:, 1:]),", "rows 2 to 31: RuntimeError: .*Job"),
}


@pytest.mark.parametrize("case", FORWARDS)
def test_outputs_that_are_no_table_are_refused(tmp_path, case):
    extra, message = FORWARDS[case]
    run = make_run(tmp_path, extra=extra)
    source = write_rows(tmp_path / "in.csv", rows(30))
    if message is None:
        predict(run, source, tmp_path / "out.csv", 2)
        assert len(read(tmp_path / "out.csv")) == 30
        return
    with pytest.raises(JobError, match=message):
        predict(run, source, tmp_path / "out.csv", 2)
    assert not (tmp_path / "out.csv").exists()
    assert not left_over(tmp_path)


def test_bf16_jobs_predict_in_bf16(tmp_path):
    run = make_run(tmp_path, precision="bf16", classes=False)
    predict(run, write_rows(tmp_path / "in.csv", rows(5)), tmp_path / "out.csv")
    value = torch.tensor(float(read(tmp_path / "out.csv")[0]["prediction_0"]))
    assert value == value.bfloat16().float()


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_all_ranks_name_the_lowest_bad_row(tmp_path, run, workers):
    lines = write_rows(tmp_path / "in.csv", rows(40)).read_text().splitlines()
    lines[33], lines[21], lines[14] = "1,2,3", "1,nan,3,4", "1,2,3,soft"
    (tmp_path / "in.csv").write_text("\n".join(lines))
    work = functools.partial(
        predict_file, run, tmp_path / "in.csv", tmp_path / "out.csv", batch_size=4
    )
    results = launch_threads(work, workers)
    assert {type(result).__name__ for result in results} == {"BadRow"}
    assert {str(result) for result in results} == {
        f"{tmp_path}/in.csv row 15, column 'd': received the text 'soft'; allowed: a finite number"
    }
    assert not (tmp_path / "out.csv").exists()
    assert not left_over(tmp_path)


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_rows_that_the_model_breaks_on_are_named_by_all_ranks(tmp_path, workers):
    extra = "forward=lambda m, b: m(b[0]) + (0 / (b[0][:, :1] != 7)),"
    run = make_run(tmp_path, extra=extra)
    lines = write_rows(tmp_path / "in.csv", rows(40)).read_text().splitlines()
    lines[18] = lines[30] = "7,2,3,4"
    (tmp_path / "in.csv").write_text("\n".join(lines))
    work = functools.partial(
        predict_file, run, tmp_path / "in.csv", tmp_path / "out.csv", batch_size=4
    )
    results = launch_threads(work, workers)
    assert {type(result).__name__ for result in results} == {"BadRow"}
    assert all("row 19: the model gives NaN or infinity" in str(result) for result in results)


INPUTS = {
    "": "is empty",
    "a,b,c,d\n": "has a header and no rows",
    "a,b,c\n1,2,3\n": "missing column 'd'",
    "a,b,c,d,e\n1,2,3,4,5\n": "received column 'e' too",
    'a,b,c,d\n1,2,3,4\n1,2,3,"4\n': "row 3: a quote",
}


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("content", INPUTS)
def test_all_ranks_refuse_a_bad_file_with_the_same_error(tmp_path, run, content, workers):
    (tmp_path / "in.csv").write_text(content)
    work = functools.partial(predict_file, run, tmp_path / "in.csv", tmp_path / "out.csv")
    results = launch_threads(work, workers)
    assert all(isinstance(result, DataError) for result in results), results
    assert len({str(result) for result in results}) == 1
    assert INPUTS[content] in str(results[0])
    assert not (tmp_path / "out.csv").exists()
    assert not left_over(tmp_path)


def test_names_and_sizes_are_refused_before_anything_is_read(tmp_path, run):
    with pytest.raises(DataError, match=r"--input rows\.jsonl: allowed: a CSV file"):
        predict_file(run, "rows.jsonl", tmp_path / "out.csv")
    with pytest.raises(DataError, match=r"--output out: allowed: a CSV file"):
        predict_file(run, "rows.csv", "out")
    with pytest.raises(UserError, match="--batch-size 0: allowed: a whole number from 1"):
        predict_file(run, "rows.csv", "out.csv", batch_size=0)


def test_a_job_without_inputs_is_told_what_to_add(tmp_path):
    run = make_run(tmp_path, inputs=False)
    with pytest.raises(JobError, match=r"next: give Job\(inputs=\[\.\.\.\]\) their names"):
        predict(run, write_rows(tmp_path / "in.csv", rows(3)), tmp_path / "out.csv")


def test_an_existing_output_stays_unless_it_may_be_replaced(tmp_path, run):
    source, target = write_rows(tmp_path / "in.csv", rows(3)), tmp_path / "out.csv"
    target.write_text("precious")
    with pytest.raises(DataError, match="exists already; allowed: a new name; next: --overwrite"):
        predict(run, source, target, 2)
    assert target.read_text() == "precious"
    predict(run, source, target, 2, overwrite=True)
    assert len(read(target)) == 3


def test_an_output_that_cannot_be_is_refused(tmp_path, run):
    source = write_rows(tmp_path / "in.csv", rows(3))
    with pytest.raises(DataError, match=r"there is no folder .*nowhere; .*next: mkdir -p"):
        predict(run, source, tmp_path / "nowhere" / "out.csv", 2)
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(DataError, match="is a folder; allowed: a file name"):
        predict(run, source, tmp_path / "folder.csv")


class Full:
    """A file on a disk that has no room for what is written or synced."""

    def __init__(self, file, method):
        self.file, self.method = file, method

    def __getattr__(self, name):
        if name == self.method:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return getattr(self.file, name)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("where", ["open", "write", "flush", "fsync", "replace"])
def test_a_full_disk_leaves_nothing_behind(tmp_path, run, monkeypatch, where, workers):
    source = write_rows(tmp_path / "in.csv", rows(300))

    def refuse(*arguments, **keywords):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def open_full(path, mode):
        return refuse() if where == "open" else Full(open(path, mode), where)

    if where == "fsync":
        monkeypatch.setattr(output_module.os, "fsync", refuse)
    elif where == "replace":
        monkeypatch.setattr(output_module, "replace_file", refuse)
    else:
        monkeypatch.setattr(output_module, "open", open_full, raising=False)
        monkeypatch.setattr(output_module.fcntl, "flock", lambda *a: None)
    with pytest.raises(
        DataError, match=r"the disk is full \(No space left on device\): .*out\.csv"
    ):
        predict(run, source, tmp_path / "out.csv", workers, batch_size=10)
    assert not (tmp_path / "out.csv").exists()
    assert not left_over(tmp_path)


def test_what_a_killed_process_left_is_removed_and_what_is_being_written_is_not(tmp_path, run):
    source = write_rows(tmp_path / "in.csv", rows(3))
    (tmp_path / ".partial-out.csv-dead").write_text("half")
    (tmp_path / ".partial-other.csv-dead").write_text("half")
    other = output_module.OutputFile(tmp_path / "out.csv")
    predict(run, source, tmp_path / "out.csv")
    assert left_over(tmp_path) == sorted([".partial-other.csv-dead", other.partial.name])
    with pytest.raises(DataError, match="exists already"):
        other.commit()
    other.close()
    assert left_over(tmp_path) == [".partial-other.csv-dead"]


def test_the_loss_of_a_worker_is_told_and_leaves_nothing(tmp_path, run):
    source = write_rows(tmp_path / "in.csv", rows(300))
    work = functools.partial(predict_file, run, source, tmp_path / "out.csv", batch_size=10)
    for operation in range(4):
        results = launch_threads(work, 3, script=Script(kill={(1, operation)}), timeout_s=10)
        assert isinstance(results[1], Killed)
        assert all(isinstance(results[rank], PeerLost) for rank in (0, 2)), results
        assert not (tmp_path / "out.csv").exists()
        assert not left_over(tmp_path)


def test_an_interrupt_on_one_rank_ends_all_and_leaves_nothing(tmp_path):
    extra = "forward=lambda m, b: interrupt(b[0]) or m(b[0]),"
    run = make_run(tmp_path, extra=extra)
    job = run / "job.py"
    job.write_text(
        job.read_text()
        + "def interrupt(x):\n    if (x == 7).any():\n        raise KeyboardInterrupt\n"
    )
    numbers = rows(300)
    numbers[250] = 7
    source = write_rows(tmp_path / "in.csv", numbers)
    work = functools.partial(predict_file, run, source, tmp_path / "out.csv", batch_size=10)
    for workers in (1, 3):
        results = launch_threads(work, workers)
        told = [result for result in results if isinstance(result, Interrupted)]
        assert [str(error) for error in told] == [
            f"the prediction was interrupted; {tmp_path}/out.csv was not written"
        ]
        assert sum(isinstance(result, PeerLost) for result in results) == workers - 1
        assert not (tmp_path / "out.csv").exists()
        assert not left_over(tmp_path)


def test_ranks_that_see_different_files_stop(tmp_path, run):
    write_rows(tmp_path / "in0.csv", rows(30))
    write_rows(tmp_path / "in1.csv", rows(29))

    def work():
        source = tmp_path / f"in{current_world().rank}.csv"
        return predict_file(run, source, tmp_path / "out.csv")

    results = launch_threads(work, 2)
    assert all("the ranks read different rows" in str(result) for result in results), results


def test_a_run_that_only_one_rank_can_open_hangs_nobody(tmp_path, run):
    source = write_rows(tmp_path / "in.csv", rows(30))

    def work():
        path = run if current_world().rank else tmp_path / "nothing"
        return predict_file(path, source, tmp_path / "out.csv")

    results = launch_threads(work, 3)
    assert isinstance(results[0], RunError)
    assert all(isinstance(result, PeerLost) and result.peer == 0 for result in results[1:])


def test_progress_is_told_on_rank_0_and_ends_with_all_rows(tmp_path, run, monkeypatch):
    from allfuse.prediction import progress

    monkeypatch.setattr(progress, "EVERY_S", 0.0)
    source = write_rows(tmp_path / "in.csv", rows(300))
    told = []
    predict(
        run,
        source,
        tmp_path / "out.csv",
        2,
        batch_size=10,
        on_event=lambda name, **data: told.append((name, data)),
    )
    assert {name for name, _ in told} == {"scored"}
    counts = [data["rows"] for _, data in told]
    assert counts == sorted(counts)
    assert counts[-1] == told[-1][1]["total_rows"] == sum(told[-1][1]["shares"]) == 300
    assert told[-1][1]["seconds_left"] == 0
    assert all(abs(data["total_rows"] - 300) <= 30 for _, data in told), "an estimate by bytes"


def test_threads_of_torch_are_given_back(tmp_path, run):
    source = write_rows(tmp_path / "in.csv", rows(3))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        predict_file(run, source, tmp_path / "out.csv")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("parts", [1, 2, 3, 5])
def test_batches_are_dealt_once_in_runs_and_the_first_part_is_never_empty(parts):
    for count in range(60):
        dealt = [list(batch_starts(count, 7, parts, index)) for index in range(parts)]
        assert [start for one in dealt for start in one] == list(range(0, count, 7))
        assert count == 0 or dealt[0]
        assert max(map(len, dealt)) - min(map(len, dealt)) <= 1


def test_ctrl_c_ends_worker_processes_and_leaves_nothing(tmp_path):
    run = make_run(tmp_path, extra="forward=lambda m, b: (time.sleep(0.05), m(b[0]))[1],")
    job = run / "job.py"
    job.write_text("import time\n" + job.read_text())
    source = write_rows(tmp_path / "in.csv", rows(4000))

    def interrupt_when_the_output_is_open():
        while not any(tmp_path.glob(".partial-*")):
            time.sleep(0.01)  # polls for a file
        os.kill(os.getpid(), signal.SIGINT)

    watcher = threading.Thread(target=interrupt_when_the_output_is_open, daemon=True)
    watcher.start()
    work = functools.partial(predict_file, run, source, tmp_path / "out.csv", batch_size=4)
    with pytest.raises(Interrupted, match="was not written"):
        launch_local(work, 2)
    assert not (tmp_path / "out.csv").exists()
    assert not left_over(tmp_path)
