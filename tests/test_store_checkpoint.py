from __future__ import annotations

import builtins
import errno
import json
import math
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from allfuse.base.errors import CheckpointError
from allfuse.store import saving, shelf, tensorfile
from allfuse.store.checkpoint import Checkpoints, NotSaved, Saved


class DictBoard:
    """A board in one process."""

    def __init__(self) -> None:
        self._values: dict[str, bytes] = {}
        self._changed = threading.Condition()

    def set(self, key: str, value: bytes) -> None:
        with self._changed:
            self._values[key] = value
            self._changed.notify_all()

    def get(self, key: str) -> bytes | None:
        return self._values.get(key)

    def wait(self, key: str, timeout_s: float) -> bytes:
        with self._changed:
            if not self._changed.wait_for(lambda: key in self._values, timeout_s):
                raise TimeoutError(key)
            return self._values[key]


def state_of(value: int, size: int = 1000) -> dict[str, Any]:
    return {"weight": torch.full((size,), float(value)), "step": value}


def value_of(state: dict[str, Any]) -> int:
    assert state["weight"].eq(state["step"]).all()
    return int(state["step"])


def save(checkpoints: Checkpoints, step: int, **options: Any) -> Saved | NotSaved:
    checkpoints.start(step, state_of(step), **options)
    checkpoints.wait()
    (outcome,) = checkpoints.poll()
    return outcome


def none_damaged(message: str) -> None:
    raise AssertionError(message)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_saved_state_and_note_come_back(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    model = nn.Linear(3, 2)
    state = {"model": model.state_dict(), "cursor": (1, 2)}
    begin = time.perf_counter()
    checkpoints.start(120, state, score=0.5, note={"loss": math.inf})
    checkpoints.close()
    (outcome,) = checkpoints.poll()
    seconds = time.perf_counter() - begin
    assert isinstance(outcome, Saved)
    assert (outcome.step, outcome.path.name) == (120, "step-00000120")
    assert outcome.bytes == (outcome.path / "rank-0.safetensors").stat().st_size
    assert 0 < outcome.stalled_seconds <= seconds
    assert 0 < outcome.seconds <= seconds
    again = Checkpoints(tmp_path / "checkpoints", rank=3)
    assert again.newest(none_damaged) == 120
    found, note = again.read(120)
    torch.testing.assert_close(found["model"], dict(state["model"]), rtol=0, atol=0)
    assert (found["cursor"], note) == ((1, 2), {"loss": math.inf})
    assert again.writers(120) == (0,)
    assert json.loads((outcome.path / "manifest.json").read_text())["score"] == 0.5


GPU = pytest.param(
    "cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    ],
)


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_what_changes_after_settle_is_saved_as_it_was(tmp_path: Path, device: str) -> None:
    checkpoints = Checkpoints(tmp_path)
    weight = torch.zeros(300_000, device=device)
    turned = torch.zeros(300, 200, device=device).t()
    for step in range(1, 6):
        checkpoints.start(step, {"weight": weight, "turned": turned, "step": step})
        checkpoints.settle()
        weight += 1
        turned += 1
    checkpoints.close()
    assert [type(outcome) for outcome in checkpoints.poll()] == [Saved] * 5
    for step in checkpoints.steps():
        state, _ = checkpoints.read(step)
        assert state["weight"].eq(step - 1).all()
        assert state["turned"].eq(step - 1).all()
        assert state["turned"].shape == (200, 300)


def test_what_changes_sooner_is_copied_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here the thread does not copy before the buffer and the plain values have changed."""
    changed = threading.Event()
    copy = saving.Staging.copy
    monkeypatch.setattr(saving.Staging, "copy", lambda self: changed.wait() and copy(self))
    model, history, array = nn.BatchNorm1d(2), [1], torch.zeros(2).numpy()
    checkpoints = Checkpoints(tmp_path)
    state = {"model": model.state_dict(), "history": history, "array": array}
    checkpoints.start(1, state, sooner=model.buffers())
    for tensor in model.buffers():
        tensor.fill_(7)
    history.append(2)
    array[:] = 7
    changed.set()
    checkpoints.close()
    found, _ = checkpoints.read(1)
    assert found["model"]["running_mean"].tolist() == [0, 0]
    assert found["model"]["running_var"].tolist() == [1, 1]
    assert found["model"]["num_batches_tracked"] == 0
    assert found["history"] == [1]
    assert found["array"].tolist() == [0, 0]


def test_a_save_waits_for_the_one_before_it(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=10)
    weight = torch.zeros(200_000)
    for step in range(5):
        weight.fill_(step)
        checkpoints.start(step, {"weight": weight})
        checkpoints.settle()
    checkpoints.close()
    assert [outcome.step for outcome in checkpoints.poll()] == [0, 1, 2, 3, 4]
    assert checkpoints.poll() == []
    for step in range(5):
        assert checkpoints.read(step)[0]["weight"].eq(step).all()


def test_only_the_writing_gives_way_to_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    niceness: dict[str, int] = {}

    def note(place: Any, name: str) -> None:
        original = getattr(place, name)

        def noted(*arguments: Any) -> Any:
            thread = threading.get_native_id()
            niceness[name] = os.getpriority(os.PRIO_PROCESS, thread)
            return original(*arguments)

        monkeypatch.setattr(place, name, noted)

    note(saving.Staging, "copy")  # a caller may wait for it
    note(saving, "write_tensors")
    checkpoints = Checkpoints(tmp_path)
    checkpoints.start(1, {"weight": torch.zeros(10)})
    checkpoints.close()
    own = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    assert niceness == {"copy": own, "write_tensors": saving.NICENESS}


def test_memory_for_copies_is_used_again(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    state = {"weight": torch.zeros(1000)}
    checkpoints.start(1, state)
    checkpoints.wait()
    place = checkpoints._staging._later._block.data_ptr()
    checkpoints.start(2, state)
    checkpoints.wait()
    assert checkpoints._staging._later._block.data_ptr() == place


def test_no_thread_is_left(tmp_path: Path) -> None:
    before = threading.active_count()
    checkpoints = Checkpoints(tmp_path)
    checkpoints.start(1, state_of(1))
    checkpoints.close()
    assert threading.active_count() == before


def test_the_last_and_the_best_are_kept(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step, score in enumerate([0.1, 0.9, math.nan, None, 0.5, 0.3]):
        save(checkpoints, step, score=score)
    assert checkpoints.steps() == [5, 4, 1]
    assert checkpoints.best() == 1
    save(checkpoints, 6, score=0.9)
    assert checkpoints.steps() == [6, 5]
    assert names(tmp_path) == ["step-00000005", "step-00000006"]


def test_a_step_saved_again_replaces_the_one_before(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    save(checkpoints, 1)
    save(checkpoints, 2)
    for value in (20, 200):
        checkpoints.start(2, state_of(value))
        checkpoints.close()
        assert value_of(checkpoints.read(2)[0]) == value
        assert checkpoints.steps() == [2, 1]
    assert len(names(tmp_path)) == 2


def test_a_history_that_was_left_is_dropped_by_the_next_save(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    save(checkpoints, 100)
    save(Checkpoints(tmp_path, keep=3), 120, score=1.0)
    save(checkpoints, 110)
    assert checkpoints.steps() == [110]


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def rewrite(**changes: Any) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        manifest = json.loads(path.read_text())
        path.write_text(json.dumps({**manifest, **changes}))

    return change


def record(**changes: Any) -> Callable[[Path], None]:
    entry = {"name": "rank-0.safetensors", "bytes": 1, "digest": "crc32:00000000", **changes}
    return rewrite(files={"0": entry})


DAMAGE: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "flipped": ("rank-0.safetensors", flip, "its bytes give"),
    "truncated": ("rank-0.safetensors", lambda p: os.truncate(p, 300), "it has 300 bytes"),
    "missing": ("rank-0.safetensors", Path.unlink, "No such file"),
    "no manifest": ("manifest.json", Path.unlink, "No such file"),
    "no json": ("manifest.json", lambda p: p.write_text("{"), "is damaged"),
    "deep": ("manifest.json", lambda p: p.write_text("[" * 99999), "nested too deeply"),
    "list": ("manifest.json", lambda p: p.write_text("[]"), "wrong type"),
    "huge": ("manifest.json", lambda p: os.truncate(p, 1 << 40), "larger than"),
    "newer": ("manifest.json", rewrite(format=2), "update allfuse"),
    "text": ("manifest.json", rewrite(step="1"), "wrong type"),
    "no files": ("manifest.json", rewrite(files={}), "wrong type"),
    "elsewhere": ("manifest.json", record(name="../../secret"), "cannot be"),
    "absurd": ("manifest.json", record(bytes=10**30), "were written"),
    "negative": ("manifest.json", record(bytes=-1), "no file has"),
    "digest": ("manifest.json", record(digest="x"), "no file has"),
    "odd rank": ("manifest.json", rewrite(files={"../0": {}}), "is no rank"),
    "odd entry": ("manifest.json", rewrite(files={"0": 3}), "has no name"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_falls_back_to_the_one_before_and_says_so(
    tmp_path: Path, damage: str
) -> None:
    name, change, what = DAMAGE[damage]
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 1)
    save(checkpoints, 2)
    change(tmp_path / "step-00000002" / name)
    messages: list[str] = []
    assert checkpoints.newest(messages.append) == 1
    assert len(messages) == 1
    assert re.search(f"step 2 cannot be used.*{what}", messages[0]), messages
    with pytest.raises(CheckpointError, match=what):
        checkpoints.read(2)
    assert value_of(checkpoints.read(1)[0]) == 1
    save(checkpoints, 2)
    assert checkpoints.newest(none_damaged) == 2


def test_an_empty_or_absent_folder_has_no_checkpoint(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "absent")
    assert (checkpoints.steps(), checkpoints.newest(none_damaged)) == ([], None)
    with pytest.raises(CheckpointError, match="no checkpoint of step 5"):
        checkpoints.read(5)
    assert not (tmp_path / "absent").exists()


def test_reading_leaves_what_another_run_is_writing_alone(tmp_path: Path) -> None:
    save(Checkpoints(tmp_path), 1)
    partial = shelf.open_partial(tmp_path, 2)
    reader = Checkpoints(tmp_path)
    assert reader.steps() == [1]
    assert partial.exists()
    save(reader, 3)
    assert names(tmp_path) == ["step-00000001", "step-00000003"]


def test_a_tensor_file_without_a_state_is_refused(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    outcome = save(checkpoints, 1)
    assert isinstance(outcome, Saved)
    file = outcome.path / "rank-0.safetensors"
    for metadata in ({}, {"skeleton": "{"}, {"skeleton": '{"tensor": "absent"}'}):
        written = tensorfile.write_tensors(file, {"x": torch.zeros(1)}, metadata)
        record(bytes=written.bytes, digest=written.digest)(outcome.path / "manifest.json")
        with pytest.raises(CheckpointError, match="holds no training state"):
            checkpoints.read(1)


def test_a_state_that_cannot_be_saved_is_refused_at_once(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(CheckpointError, match="at 'extra' is a set"):
        checkpoints.start(1, {"extra": set()})
    with pytest.raises(CheckpointError, match="note"):
        checkpoints.start(1, {}, note={"x": object()})
    assert checkpoints.poll() == []
    assert isinstance(save(checkpoints, 1), Saved)


# --- disks that are full, and other trouble while saving


def full_after(count: int) -> type:
    """An `open` for writing whose files are full after some bytes."""

    class Limited:
        def __init__(self, *arguments: Any) -> None:
            self.file = builtins.open(*arguments)  # noqa: SIM115
            self.left = count

        def __enter__(self) -> Limited:
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()

        def write(self, content: Any) -> int:
            self.left -= len(content)
            if self.left < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return int(self.file.write(content))

        def flush(self) -> None:
            self.file.flush()

        def fileno(self) -> int:
            return self.file.fileno()

    return Limited


@pytest.mark.parametrize("count", [0, 100, 2000])
def test_a_full_disk_keeps_the_checkpoint_before_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 1)
    monkeypatch.setattr(tensorfile, "open", full_after(count), raising=False)
    outcome = save(checkpoints, 2)
    assert isinstance(outcome, NotSaved)
    assert "the disk is full" in outcome.reason
    assert outcome.reason.endswith("the checkpoint of step 1 is still there")
    assert names(tmp_path) == ["step-00000001"]
    monkeypatch.undo()
    assert checkpoints.newest(none_damaged) == 1
    assert isinstance(save(checkpoints, 3), Saved)


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_really_full_keeps_the_checkpoint_before(tiny_disk: Path) -> None:
    checkpoints = Checkpoints(tiny_disk / "checkpoints", keep=1)
    for step, size, kind in [(1, 10_000, Saved), (2, 100_000, NotSaved), (3, 10_000, Saved)]:
        checkpoints.start(step, state_of(step, size))
        checkpoints.wait()
        (outcome,) = checkpoints.poll()
        assert isinstance(outcome, kind)
        if isinstance(outcome, NotSaved):
            assert "the disk is full" in outcome.reason
            assert "step 1 is still there" in outcome.reason
            assert value_of(checkpoints.read(1)[0]) == 1
            assert names(tiny_disk / "checkpoints") == ["step-00000001"]
    assert checkpoints.newest(none_damaged) == 3


def test_trouble_in_the_thread_is_an_outcome_and_settle_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise MemoryError("no memory")

    for name in ("begin", "copy", "finish"):
        with monkeypatch.context() as patch:
            patch.setattr(saving.Staging, name, fail)
            checkpoints = Checkpoints(tmp_path / "x")
            checkpoints.start(1, state_of(1))
            checkpoints.settle()
            checkpoints.close()
            (outcome,) = checkpoints.poll()
            assert isinstance(outcome, NotSaved)
            assert outcome.reason == "MemoryError: no memory; there is no earlier checkpoint"


def test_a_folder_that_cannot_be_made_is_an_outcome(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    outcome = save(Checkpoints(tmp_path / "file" / "checkpoints"), 1)
    assert isinstance(outcome, NotSaved)
    assert "Not a directory" in outcome.reason


# --- several writers


def crew(folder: Path, board: Any, count: int = 2, **options: Any) -> list[Checkpoints]:
    writers = tuple(range(count))
    return [
        Checkpoints(folder, rank=rank, writers=writers, board=board, timeout_s=20, **options)
        for rank in range(count + 1)
    ]


@pytest.fixture(params=["dict", "store"])
def board(request: pytest.FixtureRequest) -> Any:
    if request.param == "dict":
        return DictBoard()
    store = torch.distributed.HashStore()

    class StoreBoard:
        def set(self, key: str, value: bytes) -> None:
            store.set(key, value)

        def get(self, key: str) -> bytes | None:
            return bytes(store.get(key)) if store.check([key]) else None

        def wait(self, key: str, timeout_s: float) -> bytes:
            from datetime import timedelta

            try:
                store.wait([key], timedelta(seconds=timeout_s))
            except RuntimeError as error:
                raise TimeoutError(str(error)) from error
            return bytes(store.get(key))

    return StoreBoard()


def test_each_writer_saves_its_state_and_any_rank_reads_all(tmp_path: Path, board: Any) -> None:
    ranks = crew(tmp_path, board)
    for step in (1, 2, 2):
        for rank, checkpoints in enumerate(ranks):
            checkpoints.start(step, state_of(10 * step + rank), note={"from": rank})
    outcomes = []
    for checkpoints in ranks:
        checkpoints.close()
        outcomes.append(checkpoints.poll())
    assert [[type(o) for o in each] for each in outcomes] == [[Saved] * 3, [Saved] * 3, []]
    assert [o.bytes for o in outcomes[0]] == [o.bytes for o in outcomes[1]]
    assert [o.path for o in outcomes[0]] == [o.path for o in outcomes[1]]
    assert ranks[0].steps() == [2, 1]
    for reader in [*ranks, Checkpoints(tmp_path, rank=9)]:
        assert reader.writers(2) == (0, 1)
        assert reader.newest(none_damaged) == 2
        for rank in (0, 1):
            state, note = reader.read(2, rank)
            assert (value_of(state), note) == (20 + rank, {"from": 0})
    assert [value_of(checkpoints.read(2)[0]) for checkpoints in ranks] == [20, 21, 20]
    with pytest.raises(CheckpointError, match=r"rank 2 wrote nothing.*allowed: 0, 1"):
        ranks[0].read(2, 2)


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_if_one_writer_fails_none_commits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    ranks = crew(tmp_path, DictBoard(), 3)

    def start_all(step: int) -> None:
        for rank, checkpoints in enumerate(ranks):
            checkpoints.start(step, state_of(step + rank))
        for checkpoints in ranks:
            checkpoints.wait()

    start_all(1)
    write = tensorfile.write_tensors

    def full(path: Path, *arguments: Any) -> Any:
        if path.name == f"rank-{failing}.safetensors":
            raise CheckpointError("the disk is full")
        return write(path, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(saving, "write_tensors", full)
        start_all(2)
    for rank, checkpoints in enumerate(ranks[:3]):
        _, outcome = checkpoints.poll()
        assert isinstance(outcome, NotSaved)
        assert "the disk is full" in outcome.reason
        assert (f"rank {failing} could not save" in outcome.reason) == (rank != failing)
    assert ranks[0].steps() == [1]
    start_all(3)
    assert [type(checkpoints.poll()[0]) for checkpoints in ranks[:3]] == [Saved] * 3
    assert names(tmp_path) == ["step-00000001", "step-00000003"]


def test_a_state_refused_on_one_writer_ends_the_wait_of_the_other(tmp_path: Path) -> None:
    first, second, _ = crew(tmp_path, DictBoard())
    first.start(1, state_of(1))
    with pytest.raises(CheckpointError):
        second.start(1, {"extra": set()})
    first.close()
    (outcome,) = first.poll()
    assert isinstance(outcome, NotSaved)
    assert "rank 1 could not save: the state at 'extra'" in outcome.reason


def test_a_silent_writer_costs_the_deadline_and_the_checkpoint(tmp_path: Path) -> None:
    first = Checkpoints(tmp_path, rank=0, writers=(0, 1), board=DictBoard(), timeout_s=0.05)
    outcome = save(first, 1)
    assert isinstance(outcome, NotSaved)
    assert "rank 1 did not finish its part in time" in outcome.reason
    assert names(tmp_path) == []


def test_a_run_that_ends_does_not_wait_for_a_lost_writer(tmp_path: Path) -> None:
    first, _, _ = crew(tmp_path, DictBoard())
    first.start(1, state_of(1))
    first.close(abandon=True)
    (outcome,) = first.poll()
    assert isinstance(outcome, NotSaved)
    assert "the run ended" in outcome.reason
    assert names(tmp_path) == []


def test_a_folder_that_the_other_host_does_not_see_is_explained(tmp_path: Path) -> None:
    board = DictBoard()
    first = crew(tmp_path / "here", board)[0]
    second = crew(tmp_path / "there", board)[1]
    first.start(1, state_of(1))
    second.start(1, state_of(1))
    for checkpoints in (first, second):
        checkpoints.close()
        (outcome,) = checkpoints.poll()
        assert isinstance(outcome, NotSaved)
        assert "file system that all writing ranks share" in outcome.reason


def test_a_file_that_is_not_what_its_rank_reported_is_not_committed(tmp_path: Path) -> None:
    board = DictBoard()
    first = crew(tmp_path, board)[0]
    entry = {"name": "rank-1.safetensors", "bytes": 10, "digest": "crc32:00000000"}
    board.set("saved/1/5/1", json.dumps(entry).encode())
    outcome = save(first, 5)
    assert isinstance(outcome, NotSaved)
    assert names(tmp_path) == []


# --- killed at any moment

KILLED = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from allfuse.store.checkpoint import Checkpoints, Saved

torch.set_num_threads(1)  # its pool of threads does not survive a fork
folder, seed = Path(sys.argv[1]), int(sys.argv[2])
def damaged(message):
    raise SystemExit(message)
def check():
    checkpoints = Checkpoints(folder)
    step = checkpoints.newest(damaged)
    if step is None:
        return 0
    for each in checkpoints.steps():
        state, _ = checkpoints.read(each)
        assert state["step"] == each and state["weight"].eq(each).all(), each
    return step
def save_for_ever(step):
    checkpoints, weight = Checkpoints(folder, keep=2), torch.empty(50_000)
    while True:
        step += 1
        weight.fill_(step)
        checkpoints.start(step, {"weight": weight, "step": step}, score=-step)
        checkpoints.settle()
        assert all(isinstance(outcome, Saved) for outcome in checkpoints.poll())

generator, last, kills = random.Random(seed), 0, 0
while kills < 12 or last < 12:
    child = os.fork()
    if child == 0:
        save_for_ever(last)
    time.sleep(generator.uniform(0.002, 0.06))   # a random moment, nothing waits for it
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL, status
    step, kills = check(), kills + 1
    assert step >= last, (step, last)
    last = step
print(kills, last)
"""


def test_kill_at_any_moment_leaves_a_whole_newest_checkpoint(tmp_path: Path) -> None:
    found = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", KILLED, str(tmp_path), "0"],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert found.returncode == 0, found.stderr
    assert int(found.stdout.split()[1]) >= 12
