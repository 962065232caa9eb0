"""What all tests share: workers that need not load what training loads, each by itself."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from importlib.util import find_spec

import pytest

from allfuse.cli.options import PRELOAD
from allfuse.launcher import zygotes

# torch's optimizers and DistributedDataParallel load torch._dynamo where they are first used: 1.4 s
# of each worker. Forked from a zygote that has it, they find it there.
TRAINING = (*PRELOAD, "torch._dynamo")
PRELOADS = {
    "test_cli": TRAINING,
    "test_docs": (*TRAINING, "sklearn.datasets"),
    "test_examples": (*TRAINING, "sklearn.datasets"),
    "test_fusion_hook": TRAINING,
    "test_launcher_loss": TRAINING,
    "test_training_killed": TRAINING,
}

_ready: zygotes.Zygote | None = None


@pytest.fixture(autouse=True)
def _workers_have_loaded_what_they_need(request: pytest.FixtureRequest) -> None:
    """Modules whose workers train get a zygote that has loaded it once for all of them."""
    global _ready
    needed = PRELOADS.get(request.module.__name__)
    if needed is None or (_ready in zygotes._idle and _ready.alive):
        return
    zygotes._end_all()
    zygotes.warm_up([name for name in needed if find_spec(name.partition(".")[0]) is not None])
    (_ready,) = zygotes._idle


@pytest.fixture(autouse=True, scope="session")
def _nothing_waits_for_the_disk() -> Iterator[None]:
    """No test pulls the plug: what is written is read back from memory, kill -9 or not.

    A disk takes 2 to 10 ms each time, a third of the seconds of tests that save. Workers are
    processes of their own and wait for it as ever.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", os.fstat)  # which also refuses what is no file
        yield


if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in the background of a shell: tests send it
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # under nohup
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
