from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from allfuse.base.errors import JobError, RunError
from allfuse.store.run import RunFolder, source_fingerprint, versions

RECORD = {"plan": "data(2)", "seed": 0, "arguments": {"lr": 0.003}}


def test_a_run_is_read_as_it_was_created(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path / "runs" / "x", RECORD) as run:
        run.update(seed=1)
        run.add_choice("bucket_bytes", 1 << 20)
        run.add_choice("balance", [0.5, 0.5])
    opened = RunFolder.open(tmp_path / "runs" / "x")
    choices = {"bucket_bytes": 1 << 20, "balance": [0.5, 0.5]}
    assert opened.record == {**RECORD, "seed": 1, "choices": choices}
    assert opened.checkpoints.parent == opened.path


def test_an_existing_run_is_refused_and_left_alone(tmp_path: Path) -> None:
    RunFolder.create(tmp_path, RECORD).close()
    before = (tmp_path / "run.json").read_bytes()
    with pytest.raises(RunError, match=r"exists already; allowed: a new path, or --resume"):
        RunFolder.create(tmp_path, {})
    assert (tmp_path / "run.json").read_bytes() == before


def test_nothing_is_written_when_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("x")
    with pytest.raises(RunError, match=r"holds other files \(thesis.txt"):
        RunFolder.create(tmp_path, RECORD)
    with pytest.raises(RunError, match="is a file"):
        RunFolder.create(tmp_path / "thesis.txt", RECORD)
    with pytest.raises(RunError, match="plain data"):
        RunFolder.create(tmp_path / "new", {"x": object()})
    with pytest.raises(RunError, match="there is no run in"):
        RunFolder.open(tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_an_empty_folder_is_fine_and_so_is_one_where_creating_was_killed(tmp_path: Path) -> None:
    (tmp_path / ".lock").touch()
    (tmp_path / ".partial-run.json").touch()
    with RunFolder.create(tmp_path, RECORD) as run:
        assert run.record == RECORD


@pytest.mark.parametrize("content", ["", "[]", '{"format": 99}', '{"format": ' + "[" * 10000])
def test_a_damaged_record_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(RunError, match=r"run\.json is"):
        RunFolder.open(tmp_path)


def test_a_record_that_cannot_be_written_stays_what_it_was(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path, RECORD) as run:
        with pytest.raises(RunError, match="plain data"):
            run.update(seed=object())
        (tmp_path / ".partial-run.json").mkdir()
        with pytest.raises(RunError, match="cannot read or write"):
            run.update(seed=5)
        assert run.record == RECORD
    assert RunFolder.open(tmp_path).record == RECORD


def test_two_runs_cannot_hold_one_folder(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path, RECORD):
        with pytest.raises(RunError, match=r"process \d+ on .* is writing to the run folder"):
            RunFolder.open(tmp_path, lock=True)
        RunFolder.open(tmp_path)  # reading is always possible
    RunFolder.open(tmp_path, lock=True).close()


def test_a_killed_run_holds_nothing(tmp_path: Path) -> None:
    program = (
        "import sys; from allfuse.store.run import RunFolder\n"
        f"run = RunFolder.create({str(tmp_path / 'x')!r}, {{}})\n"
        "assert 'torch' not in sys.modules\n"
        "print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "held\n"
        with pytest.raises(RunError, match=f"process {child.pid} on"):
            RunFolder.open(tmp_path / "x", lock=True)
        child.kill()
    RunFolder.open(tmp_path / "x", lock=True).close()


def test_the_job_is_copied(tmp_path: Path) -> None:
    (tmp_path / "digits.py").write_text("def job(): ...\n")
    with RunFolder.create(tmp_path / "x", RECORD) as run:
        run.copy_job(tmp_path / "digits.py")
        assert run.job_path.read_text() == "def job(): ...\n"
        with pytest.raises(RunError, match="cannot read or write"):
            run.copy_job(tmp_path / "absent.py")


SOURCE = '''
"""A module."""
def job(lr=1e-3, name=None):
    """A function."""
    x = f"{lr:.2f} a"   # a comment
    return [x, None, ()]
class Net:
    """A class."""
'''


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ("# a comment", "# another", True),
        ('"""A module."""', "", True),
        ('"""A function."""', '"""Said differently."""', True),
        ("    x = ", "\n    x  =  ", True),
        ("[x, None, ()]", "[\n        x,\n        None,\n        (),\n    ]", True),
        ("1e-3", "0.001", True),
        ("1e-3", "1e-2", False),
        ("name=None", "name=0", False),
        ("[x, None, ()]", "[x, None, []]", False),
        ("[x, None, ()]", "[x, ()]", False),
        (".2f", ".3f", False),
        ("return", "yield", False),
    ],
)
def test_a_fingerprint_changes_with_what_the_code_does(
    tmp_path: Path, old: str, new: str, same: bool
) -> None:
    one, other = tmp_path / "one.py", tmp_path / "other.py"
    one.write_text(SOURCE)
    assert old in SOURCE
    other.write_text(SOURCE.replace(old, new))
    assert (source_fingerprint(one) == source_fingerprint(other)) is same


def test_a_fingerprint_is_the_same_under_every_python(tmp_path: Path) -> None:
    (tmp_path / "job.py").write_text(SOURCE)
    assert source_fingerprint(tmp_path / "job.py") == "17d606c12963b888"


def test_a_file_that_is_not_python_has_no_fingerprint(tmp_path: Path) -> None:
    (tmp_path / "job.py").write_text("def (")
    for name in ("job.py", "absent.py"):
        with pytest.raises(JobError, match=name):
            source_fingerprint(tmp_path / name)


def test_versions_are_found_without_importing_the_packages() -> None:
    program = (
        "import sys, json; from allfuse.store.run import versions\n"
        "print(json.dumps(versions())); assert not {'torch', 'numpy'} & set(sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout) == versions()
    assert list(versions()) == ["python", "allfuse", "torch", "numpy"]
    assert versions()["torch"][0].isdigit()


@pytest.mark.parametrize("is_new", [False, True])
def test_a_run_that_cannot_be_created_leaves_nothing(tmp_path: Path, is_new: bool) -> None:
    path = tmp_path / "runs" / "x"
    path.parent.mkdir()
    if not is_new:
        path.mkdir()
    with pytest.raises(RunError, match=r"job\.py"):
        RunFolder.create(path, RECORD, tmp_path / "absent.py")
    assert path.exists() != is_new
    assert is_new or not list(path.iterdir())
    (tmp_path / "job.py").write_text("x = 1")
    with RunFolder.create(path, RECORD, tmp_path / "job.py") as run:
        assert run.job_path.read_text() == "x = 1"
