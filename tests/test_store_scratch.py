from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from allfuse.store.scratch import scratch_folder

HOLDS = """
import sys, time
from pathlib import Path
from allfuse.store.scratch import scratch_folder
with scratch_folder("held-", Path(sys.argv[1])) as folder:
    (folder / "weights").touch()
    print(folder, flush=True)
    time.sleep(60)
"""


def test_a_folder_is_there_until_the_end_and_no_longer(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="own"), scratch_folder("own-", tmp_path) as folder:
        (folder / "weights").touch()
        raise ValueError("own")
    assert not list(tmp_path.iterdir())


def test_what_a_killed_process_left_is_removed_and_what_others_hold_is_not(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        held = Path(process.stdout.readline().strip())
        with scratch_folder("held-", tmp_path), scratch_folder("held-", tmp_path):
            assert (held / "weights").exists()
            assert len(list(tmp_path.iterdir())) == 3
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.communicate(timeout=30)
    assert held.exists()
    with scratch_folder("held-", tmp_path) as own:
        assert list(tmp_path.iterdir()) == [own]
