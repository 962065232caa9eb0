"""The command line: bad input ends with one clear message and exit code 2, nothing half-written."""

from __future__ import annotations

import contextlib
import io
import json
import runpy
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from allfuse.base.errors import CheckpointError
from allfuse.cli import main

ROOT = Path(__file__).parent.parent

JOB = """
import torch
import allfuse as af

def job(lr=0.1, samples=64, batch_size=8, epochs=1):
    x = torch.arange(samples * 3, dtype=torch.float32).reshape(samples, 3) / (samples * 3)
    y = x.sum(1, keepdim=True)
    return af.Job(
        model=lambda: torch.nn.Linear(3, 1),
        train=(x, y),
        validation=(x, y),
        test=(x[:10], y[:10]),
        loss=lambda outputs, batch: torch.nn.functional.mse_loss(outputs, batch[1]),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=lr),
        batch_size=batch_size,
        stop=af.Stop(epochs=epochs),
        inputs=["a", "b", "c"],
    )
"""


@dataclass
class Done:
    returncode: int
    stdout: str
    stderr: str


def allfuse(*arguments: object, cwd: Path, ok: bool | None = None) -> Done:
    """The command in this process, which saves the seconds that loading torch takes each time."""
    out, err = io.StringIO(), io.StringIO()
    code: object = 0
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RANK", "WORLD_SIZE"):
            patch.delenv(name, raising=False)
        patch.chdir(cwd)
        patch.setattr(sys, "argv", ["allfuse", *map(str, arguments)])
        patch.setattr(sys, "path", list(sys.path))
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                main()
            except SystemExit as stop:
                code = stop.code
    done = Done(code if isinstance(code, int) else int(code is not None), *_texts(out, err))
    if ok is not None:
        assert (done.returncode == 0) is ok, done.stdout + done.stderr
    return done


def _texts(*streams: io.StringIO) -> list[str]:
    return [stream.getvalue() for stream in streams]


def allfuse_outside(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The command as a process of its own, as a person starts it."""
    return subprocess.run(
        [sys.executable, "-m", "allfuse", *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture
def job(tmp_path: Path) -> Path:
    path = tmp_path / "job.py"
    path.write_text(JOB)
    return path


def refused(done: Done, *words: str) -> None:
    """One message of a line or two on standard error, exit code 2, no traceback."""
    assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr, done.stderr
    assert len(done.stderr.strip().splitlines()) <= 3, done.stderr


def test_help_explains_every_command() -> None:
    for verb in ("train", "run", "verify", "evaluate", "predict", "plan"):
        done = allfuse(verb, "--help", cwd=ROOT, ok=True)
        assert "--json" in done.stdout
        assert "allfuse " + verb in done.stdout


def test_help_loads_no_torch() -> None:
    code = "import sys; from allfuse.cli.app import app; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        ("data(0)", ("data(0)", "nearest")),
        ("data(2", ("data(2",)),
        ("ring(2)", ("ring", "data")),
        ("data(2) * site(2)", ("site(2) * data(2)",)),
        ("data(2, topology=rong)", ("rong", "native")),
        ("member(2)", ("member", "data(2)")),
        ("__import__('os')", ("__import__",)),
    ],
)
def test_a_plan_that_cannot_be_is_refused_with_the_nearest(
    plan: str, words: tuple[str, ...], tmp_path: Path, job: Path
) -> None:
    refused(allfuse("train", job, "--plan", plan, "--out", "out", cwd=tmp_path), *words)
    assert not (tmp_path / "out").exists()


def test_plan_and_workers_exclude_each_other(tmp_path: Path, job: Path) -> None:
    done = allfuse("train", job, "--plan", "data(2)", "--workers", 2, cwd=tmp_path)
    refused(done, "one of the two")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, ("no such file",)),
        ("x = 1\n", ("job()",)),
        ("def job():\n    return 3\n", ("int", "af.Job")),
        ("def job(lr=1.0):\n    return 3\n", ()),
    ],
)
def test_a_file_that_is_no_job_is_refused(
    text: str | None, words: tuple[str, ...], tmp_path: Path
) -> None:
    path = tmp_path / "bad.py"
    if text is not None:
        path.write_text(text)
    refused(allfuse("train", path, "--out", "out", cwd=tmp_path), *words)
    assert not (tmp_path / "out").exists()


def test_a_job_that_raises_on_import_shows_its_own_traceback(tmp_path: Path) -> None:
    path = tmp_path / "bad.py"
    path.write_text("import math\nvalue = math.sqrt(-1)\n")
    done = allfuse("train", path, "--workers", 2, "--out", "out", cwd=tmp_path)
    assert done.returncode == 2
    assert "line 2" in done.stderr
    assert "ValueError" in done.stderr
    assert done.stderr.count("math.sqrt(-1)") == 1
    assert "launcher" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_an_unknown_setting_suggests_the_nearest(tmp_path: Path, job: Path) -> None:
    done = allfuse("train", job, "--set", "epoch=3", "--workers", 2, cwd=tmp_path)
    refused(done, "epoch", "epochs")
    refused(allfuse("train", job, "--set", "lr", cwd=tmp_path), "NAME=VALUE")
    refused(allfuse("train", job, "--set", "lr=fast", cwd=tmp_path), "lr=fast", "float")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (("--set", "samples=0"), ("empty",)),
        (("--set", "batch_size=1", "--workers", "2"), ("batch_size=1", "2 shares")),
        (("--epochs", "0"), ("epochs",)),
        (("--device", "tpu"), ("tpu",)),
        (("--timeout", "0"), ("timeout",)),
        (("--timeout", "nan"), ("timeout",)),
        (("--threads", "100000"), ("threads", "1024")),
        (("--set", "=3"), ("received no name",)),
        (("--out", "x" * 300), ("name too long",)),
        (("--threads", "0", "--workers", "2"), ("threads",)),
        (("--tensorboard",), ("--out",)),
        (("--auto-resume",), ("--out",)),
    ],
)
def test_settings_that_cannot_be_are_refused(
    settings: tuple[str, ...], words: tuple[str, ...], tmp_path: Path, job: Path
) -> None:
    refused(allfuse("train", job, *settings, cwd=tmp_path), *words)


def test_train_evaluate_predict_and_resume(tmp_path: Path, job: Path) -> None:
    begin = ("train", job, "--out", "out", "--auto-resume", "--json")
    done = allfuse(*begin, "--workers", 2, cwd=tmp_path, ok=True)
    last = json.loads(done.stdout.splitlines()[-1])
    assert last["ok"]
    assert last["steps"] == 8
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["plan"] == "data(2)"
    assert record["arguments"]["lr"] == 0.1
    assert "train" in record["command"]

    refused(allfuse("train", job, "--out", "out", cwd=tmp_path), "exists already", "--resume")
    more = allfuse("train", job, "--resume", "out", "--epochs", 2, "--json", cwd=tmp_path, ok=True)
    assert json.loads(more.stdout.splitlines()[-1])["steps"] == 16
    more = allfuse(*begin, "--epochs", 3, cwd=tmp_path, ok=True)
    assert json.loads(more.stdout.splitlines()[-1])["steps"] == 24
    assert json.loads(more.stdout.splitlines()[-1])["plan"] == "data(2)"

    best = allfuse("evaluate", "out", "--weights", "best", cwd=tmp_path, ok=True)
    assert "the best of the run" in best.stdout
    one = allfuse("evaluate", "out", "--json", cwd=tmp_path, ok=True)
    two = allfuse("evaluate", "out", "--workers", 2, "--json", cwd=tmp_path, ok=True)
    figures = [json.loads(d.stdout.splitlines()[-1])["metrics"]["loss"] for d in (one, two)]
    assert figures[0] == pytest.approx(figures[1], rel=1e-6)

    rows = tmp_path / "rows.csv"
    rows.write_text("a,b,c\n" + "".join(f"{i},{i + 1},{i + 2}\n" for i in range(20)))
    options = ("--input", rows, "--output", "answers.csv")
    allfuse("predict", "out", *options, "--workers", 2, cwd=tmp_path, ok=True)
    assert len((tmp_path / "answers.csv").read_text().splitlines()) == 21
    onto_itself = ("--input", rows, "--output", rows, "--overwrite")
    refused(allfuse("predict", "out", *onto_itself, cwd=tmp_path), "is the input")
    allfuse("predict", "out", *options, "--overwrite", "--weights", "best", cwd=tmp_path, ok=True)

    job.write_text(JOB.replace("lr=0.1", "lr=0.2"))
    refused(allfuse("train", job, "--resume", "out", cwd=tmp_path), "fingerprint of the job")


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ("a,b\n1,2\n", ("c",)),
        ("a,b,c,d\n1,2,3,4\n", ("d",)),
        ("a,b,c\n1,2,3\n1,two,3\n", ("row 3", "two")),
        ("a,b,c\n1,nan,3\n", ("row 2", "nan")),
    ],
)
def test_a_table_that_does_not_fit_is_refused_by_row(
    table: str, words: tuple[str, ...], tmp_path: Path, trained: Path
) -> None:
    rows = tmp_path / "rows.csv"
    rows.write_text(table)
    done = allfuse("predict", trained, "--input", rows, "--output", "answers.csv", cwd=tmp_path)
    refused(done, *words)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.csv"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    (folder / "job.py").write_text(JOB)
    allfuse("train", folder / "job.py", "--out", "out", "--quiet", cwd=folder, ok=True)
    return folder / "out"


def test_run_gives_a_script_its_plan_and_its_arguments(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\nimport allfuse as af\n"
        "with af.session(quiet=True) as s:\n"
        "    s.print('plan', s.plan, 'rank', s.rank, sys.argv[1:], __name__)\n"
    )
    line = "plan data(2) rank 0 ['--epochs', '3'] __main__"
    done = allfuse_outside("run", script, "--plan", "data(2)", "--", "--epochs", 3, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert line in done.stdout
    with pytest.MonkeyPatch.context() as patch:  # as `python script.py --epochs 3`
        patch.setattr(sys, "argv", [str(script), "--epochs", "3"])
        runpy.run_path(str(script), run_name="__main__")
    assert line.replace("data(2)", "data(1)") in capsys.readouterr().out


def test_plan_says_what_it_would_do_without_starting_anything(tmp_path: Path, job: Path) -> None:
    done = allfuse("plan", job, "--plan", "data(2)", cwd=tmp_path, ok=True)
    assert "exact" in done.stdout
    assert "4 + 4 samples" in done.stdout
    refused(allfuse("plan", job, "--plan", "data(9)", cwd=tmp_path), "batch_size=8")
    done = allfuse("plan", "data(2) * member(2)", cwd=tmp_path)
    refused(done, "member")


def test_the_version_is_told() -> None:
    assert allfuse("--version", cwd=ROOT, ok=True).stdout.startswith("allfuse 0.")


def test_a_plan_twice_is_refused(tmp_path: Path) -> None:
    for other in (("--workers", 3), ("--plan", "data(3)")):
        refused(allfuse("plan", "data(2)", *other, cwd=tmp_path), "one plan")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("torch.nn.Linear(3, 1)", "torch.nn.LazyLinear(1)"), ("weight", "lazy")),
        (("torch.optim.SGD(parameters, lr=lr)", "torch.optim.LBFGS(parameters)"), ("LBFGS",)),
        (("stop=af.Stop(epochs=epochs)", "epochs=epochs"), ("no such field", "af.Stop(epochs=")),
        (("stop=af.Stop", "stoop=af.Stop"), ("no such field", "'stop'")),
        (("batch[1])", "batch[1]) * (1 + 1j)"), ("complex64",)),
    ],
)
def test_jobs_that_cannot_be_trained_are_refused(
    change: tuple[str, str], words: tuple[str, ...], tmp_path: Path
) -> None:
    (tmp_path / "odd.py").write_text(JOB.replace(*change))
    refused(allfuse("train", "odd.py", "--out", "out", cwd=tmp_path), *words)
    assert change[0].startswith("batch") or not (tmp_path / "out").exists()


def test_models_that_differ_between_ranks_are_refused(tmp_path: Path) -> None:
    odd = JOB.replace("torch.nn.Linear(3, 1)", "torch.nn.Linear(3, 1 + int(os.environ['RANK']))")
    (tmp_path / "odd.py").write_text("import os\n" + odd)
    refused(allfuse("train", "odd.py", "-w", 2, cwd=tmp_path), "the model of rank 1 is not that")


def test_a_quiet_run_says_what_went_wrong(tmp_path: Path, job: Path) -> None:
    job.write_text(JOB.replace("import torch", "import shutil, torch", 1) + SHUT)
    done = allfuse("train", job, "--out", "out", "-q", cwd=tmp_path, ok=True)
    assert "was removed or renamed" in done.stderr


SHUT = """
make = job
def job():
    from dataclasses import replace
    def remove(session, event):
        shutil.rmtree("out", ignore_errors=True)
    return replace(make(), hooks=[af.on("step", remove)])
"""


def test_an_output_that_cannot_be_written_is_one_message() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "allfuse", "plan", "data(2)"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 1
    assert done.stderr.startswith("allfuse: the output cannot be written")
    assert "Traceback" not in done.stderr


def test_plan_refuses_what_train_would_refuse(tmp_path: Path, job: Path) -> None:
    layers = "Linear(3, 4)", "BatchNorm1d(4)", "Linear(4, 1)"
    model = f"torch.nn.Sequential({', '.join(f'torch.nn.{layer}' for layer in layers)})"
    job.write_text(JOB.replace("torch.nn.Linear(3, 1)", model))
    refused(allfuse("plan", job, "--plan", "pipe(2)", cwd=tmp_path), "BatchNorm over the whole")
    job.write_text(JOB.replace("torch.nn.Linear(3, 1)", model.replace("BatchNorm1d", "LayerNorm")))
    allfuse("plan", job, "--plan", "pipe(2)", cwd=tmp_path, ok=True)
    done = allfuse("plan", job, "--plan", "pipe(2, microbatches=9)", cwd=tmp_path)
    refused(done, "from 1 to 8 microbatches")
    for verb in ("plan", "train"):  # nobody waits for microbatches of the one stage there is
        allfuse(verb, job, "--plan", "pipe(1, microbatches=9)", cwd=tmp_path, ok=True)
    done = allfuse("plan", job, "--plan", "tensor(2)", "--set", "samples=2", cwd=tmp_path)
    refused(done, "is found out on its first 3 samples")


def test_a_job_whose_model_cannot_be_written_fails(
    tmp_path: Path, job: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise CheckpointError("the disk is full")

    monkeypatch.setattr("allfuse.training.keeper.write_model", fail)
    done = allfuse("train", job, "--out", "run", "-q", cwd=tmp_path)
    assert done.returncode == 1
    assert "its model was not written to run/model.safetensors" in done.stderr
    monkeypatch.undo()
    allfuse("train", job, "--resume", "run", "-q", cwd=tmp_path, ok=True)
    assert (tmp_path / "run" / "model.safetensors").exists()


def test_a_topology_that_is_named_is_drawn(tmp_path: Path) -> None:
    drawn = allfuse("plan", "site(2) * data(3, topology=ring)", cwd=tmp_path, ok=True).stdout
    assert "data: ring, 3 peers: 4 phases, 3 chunks; the busiest peer sends 1.33 x" in drawn
    assert "  4 copy   0.333 x  0>1 [0]  1>2 [1]  2>0 [2]" in drawn
    assert "site:" not in drawn.split("rank", 1)[1]  # it names none
    drawn = allfuse("plan", "data(4, topology=hierarchy)", "--hosts", "2", cwd=tmp_path).stdout
    assert "hierarchy, 4 peers on 2 hosts" in drawn


def test_hosts_are_those_of_ranks_as_many_as_were_said(tmp_path: Path) -> None:
    hosts = ("--hosts", "3")
    drawn = allfuse("plan", "data(4, topology=hierarchy)", *hosts, cwd=tmp_path, ok=True).stdout
    assert "hierarchy, 4 peers on 3 hosts" in drawn
    plan = "site(3, topology=ring) * data(2, topology=tree)"
    drawn = allfuse("plan", plan, *hosts, cwd=tmp_path, ok=True).stdout
    assert "site: ring, 3 peers on 3 hosts" in drawn
    assert "data: tree, 2 peers: " in drawn
    refused = allfuse("plan", "data(2)", *hosts, cwd=tmp_path)
    assert refused.returncode == 2
    assert "data(2) has 2 workers; allowed: from 1 to 2 hosts" in refused.stderr


def test_a_plan_tells_the_bytes_of_a_codec(tmp_path: Path) -> None:
    job = str(ROOT / "examples/digits.py")
    told = allfuse("plan", job, "--plan", "data(4, codec=int8)", cwd=tmp_path, ok=True).stdout
    assert "int8 makes 10 kB of 39.5 kB, 25.4%" in told
    assert "a fusion over central sends 15 kB from the busiest worker" in told
