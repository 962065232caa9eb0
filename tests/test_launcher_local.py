"""Workers as processes of this machine: what they are given, return, and how they fail."""

from __future__ import annotations

import ctypes
import importlib
import io
import multiprocessing.util
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from allfuse.base.errors import PlanError, UserError, WorkerFailed
from allfuse.launcher import watch, zygotes
from allfuse.launcher.base import World, current_world
from allfuse.launcher.local import count_cores, launch_local
from allfuse.launcher.scratch import use_scratch


def world() -> World:
    found = current_world()
    assert found is not None
    return found


def rank() -> int:
    return world().rank


def all_tell(value: object) -> list[str] | None:
    """What every rank says, gathered on rank 0 through the board."""
    board = world().board
    board.set(f"said/{rank()}", str(value).encode())
    if rank() != 0:
        return None
    return [board.wait(f"said/{other}", 60).decode() for other in range(world().size)]


def test_launch_returns_what_rank_0_returned() -> None:
    shift = 40  # a captured value

    class Local:
        def __init__(self, number: int) -> None:
            self.number = number

    def work() -> Any:
        values = all_tell(rank() + shift)
        return values, Local(shift), torch.arange(3)

    values, made, tensor = launch_local(work, 2)
    assert values == ["40", "41"]
    assert type(made) is Local  # a class of this function, back as itself
    assert made.number == 40
    assert tensor.tolist() == [0, 1, 2]
    assert launch_local(lambda: None, 1) is None


def test_the_public_launch_passes_arguments_and_the_plan() -> None:
    import allfuse as af

    def work(number: int, *, shift: int) -> Any:
        return number + shift, world().plan

    assert af.launch(work, 3, workers=2, shift=4) == (7, "data(2)")
    assert af.launch(work, 3, workers=1, plan="data(1)", shift=4) == (7, "data(1)")


def test_each_worker_knows_its_place() -> None:
    def work() -> Any:
        w = world()
        return w.kind, w.rank, w.size, w.local_rank, w.local_size, w.plan, w.timeout_s

    got = launch_local(work, 2, plan="data(2)", timeout_s=17.0)
    assert got == ("local", 0, 2, 0, 2, "data(2)", 17.0)


def test_threads_are_those_asked_for_or_a_share_of_the_cores() -> None:
    assert launch_local(torch.get_num_threads, 1, threads=3) == 3
    assert launch_local(torch.get_num_threads, 2) == max(1, count_cores() // 2)


def test_many_workers_on_few_cores() -> None:
    assert launch_local(lambda: all_tell(rank()), 8) == [str(number) for number in range(8)]


@pytest.mark.parametrize("size", [2_000_000, pytest.param(100_000_000, marks=pytest.mark.slow)])
def test_large_functions_and_results_pass(size: int) -> None:
    payload = os.urandom(1000) * (size // 1000)

    def work() -> bytes:
        return payload if rank() == 0 else b""

    assert launch_local(work, 3) == payload


def test_a_worker_that_dies_while_it_is_sent_a_large_function_holds_up_nobody() -> None:
    payload = bytes(20_000_000)

    class Deadly:
        def __reduce__(self) -> Any:
            return os._exit, (5,)

    deadly = Deadly()
    with pytest.raises(WorkerFailed, match="ended with exit code 5"):
        launch_local(lambda: (deadly, payload), 2)


def test_workers_start_in_the_callers_folder_environment_and_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work() -> Any:
        made = importlib.import_module("made_later")
        return os.getcwd(), os.environ.get("ALLFUSE_TEST_WORD"), sys.argv, made.VALUE

    for number in range(2):  # the second time in other places, from the same zygote
        folder = tmp_path / f"folder {number}"
        folder.mkdir()
        (folder / "made_later.py").write_text(f"VALUE = {number}")
        monkeypatch.chdir(folder)
        monkeypatch.setenv("ALLFUSE_TEST_WORD", f"wörd {number}\udcff")
        monkeypatch.setattr(sys, "argv", ["script.py", str(number)])
        monkeypatch.setattr(sys, "path", [str(folder), *sys.path])
        got = launch_local(work, 1)
        assert got == (str(folder), f"wörd {number}\udcff", ["script.py", str(number)], number)
    monkeypatch.delenv("ALLFUSE_TEST_WORD")
    assert launch_local(lambda: os.environ.get("ALLFUSE_TEST_WORD"), 1) is None


def test_an_environment_of_megabytes_arrives_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    launch_local(os.getpid, 1)  # the system itself would refuse to start a program with this much
    for number in range(30):
        monkeypatch.setenv(f"ALLFUSE_TEST_{number}", str(number) * 100_000)
    monkeypatch.setattr(sys, "path", [*sys.path, *(f"/nowhere/{'x' * 200}" for _ in range(5000))])

    def work() -> Any:
        return all_tell((len(os.environ["ALLFUSE_TEST_29"]), len(sys.path)))

    assert launch_local(work, 2) == [str((200_000, len(sys.path)))] * 2


def test_a_folder_that_is_gone_is_a_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()
    monkeypatch.chdir(folder)
    folder.rmdir()
    with pytest.raises(UserError, match="current folder is gone"):
        launch_local(os.getpid, 1)


def test_workers_have_no_input_and_print_where_the_caller_does(
    capfd: pytest.CaptureFixture[str],
) -> None:
    def work() -> None:
        assert sys.stdin.read() == ""
        for line in range(50):
            print(f"rank {rank()} line {line}")
        print("warned", file=sys.stderr)

    launch_local(work, 2)
    out, err = capfd.readouterr()
    for number in range(2):
        lines = [line for line in out.splitlines() if line.startswith(f"rank {number} ")]
        assert lines == [f"rank {number} line {line}" for line in range(50)]
    assert err.count("warned") == 2


@pytest.mark.slow
def test_lines_stay_whole_under_an_unbuffered_python(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from allfuse.launcher.base import current_world\n"
        "from allfuse.launcher.local import launch_local\n"
        "class Meeting:\n"
        "    def __init__(self, line):\n"
        "        self.line = line\n"
        "    def __str__(self):\n"
        "        world = current_world()  # both ranks are in the middle of a line now\n"
        "        world.board.set(f'{self.line}/{world.rank}', b'')\n"
        "        world.board.wait(f'{self.line}/{1 - world.rank}', 60)\n"
        "        return 'word'\n"
        "def work():\n"
        "    for line in range(20):\n"
        "        print('a', Meeting(line))\n"
        "launch_local(work, 2)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-u", str(script)], capture_output=True, text=True, timeout=120, check=True
    )
    assert ended.stdout.splitlines() == ["a word"] * 40


def test_a_thread_that_user_code_left_does_not_hold_up_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(watch, "LINGER_S", 0.3)

    def work() -> int:
        threading.Thread(target=time.sleep, args=(1000,)).start()
        return rank() + 7

    assert launch_local(work, 2) == 7


def test_a_zygote_that_stands_still_does_not_hold_up_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(watch, "LINGER_S", 0.3)
    monkeypatch.setattr(watch, "GRACE_S", 0.3)

    def work() -> int:
        os.kill(os.getppid(), signal.SIGSTOP)
        return 7

    assert launch_local(work, 1) == 7
    assert launch_local(os.getpid, 1)  # another zygote


def test_nothing_is_left_of_the_sockets_of_loader_processes(tmp_path: Path) -> None:
    def work() -> None:
        use_scratch()
        folder = Path(multiprocessing.util.get_temp_dir())
        (folder / "listener").write_text("")
        (tmp_path / "where").write_text(str(folder))
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(WorkerFailed):
        launch_local(work, 1)
    assert "allfuse-" in (tmp_path / "where").read_text()
    assert not Path((tmp_path / "where").read_text()).exists()


def test_workers_do_not_draw_the_same_random_numbers() -> None:
    def work() -> Any:
        return all_tell((random.random(), float(np.random.rand())))

    draws = [text for _ in range(2) for text in launch_local(work, 2)]
    parts = [part for text in draws for part in text.strip("()").split(", ")]
    assert len(set(parts)) == 8


def test_threads_of_a_worker_belong_to_its_rank_and_may_finish(tmp_path: Path) -> None:
    def work() -> None:
        def later() -> None:
            w = current_world()
            time.sleep(0.2)  # emulated work that outlasts the function
            Path(tmp_path, f"{w.rank if w is not None else 'alone'}").touch()

        number = rank()
        threading.Thread(
            target=lambda: (time.sleep(0.2), Path(tmp_path, f"{number}").touch())
        ).start()
        thread = threading.Thread(target=later)
        thread.start()
        thread.join()
        import atexit

        atexit.register(lambda: Path(tmp_path, f"exit {number}").touch())

    launch_local(work, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1", "exit 0", "exit 1"]


def zygote_of_worker() -> int:
    return os.getppid()


def test_launches_that_follow_each_other_share_a_zygote() -> None:
    assert launch_local(zygote_of_worker, 1) == launch_local(zygote_of_worker, 1)
    assert len(zygotes._idle) == 1


def test_launches_at_the_same_time_do_not_mix() -> None:
    meet = threading.Barrier(2, timeout=60)
    results: list[Any] = [None, None]

    def launch(number: int) -> None:
        def work() -> Any:
            return number, all_tell(f"{number}.{rank()}"), os.getppid()

        meet.wait()
        results[number] = [launch_local(work, 2) for _ in range(2)]

    threads = [threading.Thread(target=launch, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, outcome in enumerate(results):
        for got in outcome:
            assert got[:2] == (number, [f"{number}.0", f"{number}.1"])
    assert len(zygotes._idle) == 1
    assert not zygotes._busy


@pytest.mark.slow
def test_a_zygote_that_died_while_idle_is_replaced() -> None:
    first = launch_local(zygote_of_worker, 1)
    os.kill(first, signal.SIGKILL)
    zygotes._idle[-1].process.wait()
    assert launch_local(zygote_of_worker, 1) != first


@pytest.mark.slow
def test_a_fork_of_the_launcher_starts_its_own_zygote() -> None:
    launch_local(os.getpid, 1)
    mine = zygotes._idle[-1].process.pid

    def work() -> Any:  # itself forks, as multiprocessing would, and launches in the fork
        launch_local(os.getpid, 1)
        own = launch_local(zygote_of_worker, 1)
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.write(writing, str(launch_local(zygote_of_worker, 1)).encode())
            zygotes._end_all()
            os._exit(0)
        other = int(os.read(reading, 100))
        os.waitpid(pid, 0)
        return own, other, launch_local(zygote_of_worker, 1)

    own, other, again = launch_local(work, 1)
    assert own == again
    assert len({mine, own, other}) == 3


def test_no_workers_are_refused() -> None:
    with pytest.raises(UserError, match="workers: received 0; allowed: 1 or more"):
        launch_local(os.getpid, 0)


def test_a_function_that_cannot_be_sent_is_bad_input() -> None:
    lock = threading.Lock()
    with pytest.raises(UserError, match="cannot be sent to worker processes") as caught:
        launch_local(lambda: lock, 2)
    assert caught.value.exit_code == 2
    assert "next: create locks" in str(caught.value)


def test_a_function_that_cannot_be_read_there_is_told_with_its_trace() -> None:
    class Unreadable:
        def __reduce__(self) -> Any:
            return importlib.import_module, ("no_such_module_there",)

    made = Unreadable()
    with pytest.raises(WorkerFailed, match="No module named 'no_such_module_there'"):
        launch_local(lambda: made, 2)


def test_a_result_that_cannot_be_sent_is_bad_input() -> None:
    def work() -> Any:
        return threading.Lock()

    with pytest.raises(UserError, match="returned a lock on rank 0 that cannot be sent back"):
        launch_local(work, 2)


def test_bad_input_found_by_a_worker_keeps_its_class() -> None:
    def work() -> None:
        raise PlanError("data(9)", "there are 2 ranks", "data(2)")

    with pytest.raises(PlanError) as caught:
        launch_local(work, 2)
    assert caught.value.nearest == "data(2)"


def failing(work: Callable[[], Any], workers: int = 2) -> tuple[WorkerFailed, float]:
    begin = time.monotonic()
    with pytest.raises(WorkerFailed) as caught:
        launch_local(work, workers)
    return caught.value, time.monotonic() - begin


def test_an_exception_is_shown_once_with_its_rank_step_and_traceback(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(watch, "GRACE_S", 0.5)

    def inner() -> None:
        raise ZeroDivisionError("by design")

    def work() -> None:
        if rank() == 1:
            world().step = 12
            inner()
        world().board.wait("never", 600)

    error, seconds = failing(work, 3)
    assert str(error) == "rank 1 failed at step 12: ZeroDivisionError: by design"
    assert (error.rank, error.exit_code) == (1, 1)
    first, *rest = error.trace.splitlines()
    assert first == "Traceback (most recent call last):"
    assert "in work" in rest[0]  # nothing of the launcher's own
    assert error.trace.count("ZeroDivisionError: by design") == 1
    assert seconds < watch.GRACE_S + 20  # of the 600 that it would wait


@pytest.mark.parametrize("kind", ["python", pytest.param("held", marks=pytest.mark.slow)])
def test_a_worker_that_ignores_everything_is_killed_soon_after_another_failed(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "python":  # one with the real grace, one with a short one
        monkeypatch.setattr(watch, "GRACE_S", 0.5)

    def work() -> None:
        if rank() == 1:
            world().board.wait("deaf", 60)
            raise ValueError("first")
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        world().board.set("deaf", b"")
        if kind == "held":
            ctypes.PyDLL(None).sleep(600)  # C code that keeps the interpreter's lock
        while True:
            pass

    error, seconds = failing(work)
    assert str(error) == "rank 1 failed before the first step: ValueError: first"
    assert seconds < watch.GRACE_S + 20  # of the 600 that it would wait


@pytest.mark.parametrize(
    ("end", "text"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "rank 1 was killed by SIGKILL"),
        (lambda: ctypes.string_at(0), "rank 1 was killed by SIGSEGV"),
        (lambda: os._exit(0), "rank 1 ended with exit code 0 and no word why"),
    ],
    ids=["kill", "segfault", "exit"],
)
def test_a_worker_that_ends_without_a_word_is_named(
    end: Callable[[], Any], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "GRACE_S", 0.2)

    def work() -> None:
        if rank() == 1:
            end()
        world().board.wait("never", 600)

    error, _ = failing(work)
    assert str(error).startswith(text)
    assert error.rank == 1


def test_the_traceback_of_a_crash_in_native_code_is_shown(
    capfd: pytest.CaptureFixture[str],
) -> None:
    failing(lambda: ctypes.string_at(0), 1)
    assert "Fatal Python error: Segmentation fault" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("code", "text", "exit_code"),
    [(3, "exit(3)", 3), ("no luck", "exit(no luck)", 1)],
)
def test_a_function_that_calls_exit_fails_with_its_code(
    code: Any, text: str, exit_code: int
) -> None:
    error, _ = failing(lambda: sys.exit(code), 1)
    assert f"SystemExit: the function called {text}" in str(error)
    assert error.exit_code == exit_code


def test_a_function_that_exits_well_returns_nothing() -> None:
    assert launch_local(lambda: sys.exit(0), 2) is None


def test_exceptions_that_cannot_be_sent_or_shown_are_told_all_the_same() -> None:
    class Mute(Exception):
        def __init__(self, stream: object) -> None:
            self.stream = stream

        def __str__(self) -> str:
            raise RuntimeError("no text")

        def __reduce__(self) -> Any:
            raise RuntimeError("no bytes")

    def work() -> None:
        raise Mute(io.BytesIO())

    error, _ = failing(work)
    assert "Mute: (its text cannot be shown: RuntimeError)" in str(error)


def test_a_zygote_that_is_killed_takes_its_workers_along_and_the_launch_says_so(
    tmp_path: Path,
) -> None:
    def work() -> None:
        Path(tmp_path, str(rank())).write_text(str(os.getpid()))
        if rank() == 0:
            while len(list(tmp_path.iterdir())) < 2:
                time.sleep(0.01)
            os.kill(os.getppid(), signal.SIGKILL)
        world().board.wait("never", 600)

    error, _ = failing(work)
    assert "the process that starts workers was killed by SIGKILL" in str(error)
    wait_until_gone([int(path.read_text()) for path in tmp_path.iterdir()])
    assert launch_local(rank, 2) == 0


def test_what_workers_started_ends_with_them(tmp_path: Path) -> None:
    def work() -> None:
        child = subprocess.Popen(["sleep", "600"])
        Path(tmp_path, str(rank())).write_text(str(child.pid))

    launch_local(work, 2)
    wait_until_gone([int(path.read_text()) for path in tmp_path.iterdir()])


def wait_until_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + 20
    while left := [pid for pid in pids if runs(pid)]:
        assert time.monotonic() < deadline, f"still there: {left}"
        time.sleep(0.01)


def runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"  # a zombie whose new parent has not looked yet


@pytest.mark.slow
def test_a_script_without_a_guard_is_not_run_again(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        "from allfuse.launcher.local import launch_local\n"
        "from allfuse.launcher.base import current_world\n"
        "print('top')\n"
        "FACTOR = 3\n"
        "class Made:\n"
        "    value = 0\n"
        "def work(number):\n"
        "    made = Made(); made.value = number * FACTOR + current_world().size\n"
        "    print('in rank', current_world().rank)\n"
        "    return made\n"
        "made = launch_local(lambda: work(5), 2)\n"
        "assert type(made) is Made\n"
        "print('got', made.value)\n"
        "sys.stdout.flush()\n"
    )
    here = tmp_path / "here"
    here.mkdir()
    (here / "numpy.py").write_text("raise SystemExit('a module in the current folder was loaded')")
    ended = subprocess.run(
        [sys.executable, "-W", "error", str(script)],
        cwd=here,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr == ""
    lines = ended.stdout.splitlines()
    assert lines[0] == "top"
    assert sorted(lines[1:3]) == ["in rank 0", "in rank 1"]
    assert lines[3:] == ["got 17"]


def test_a_launch_from_another_thread_works() -> None:
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(launch_local(rank, 2)))
    thread.start()
    thread.join()
    assert results == [0]
