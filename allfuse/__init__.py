"""allfuse: train one PyTorch model on all the machines you have, and fuse what they learn.

    import allfuse as af

Names load what they need when they are first used, so that `allfuse --help` loads no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from allfuse.api import launch as launch
    from allfuse.api import session as session
    from allfuse.api import train as train
    from allfuse.base import errors as errors
    from allfuse.fusion.fuse import fuse_ as fuse_
    from allfuse.fusion.hook import comm_hook as comm_hook
    from allfuse.job import Hook as Hook
    from allfuse.job import Job as Job
    from allfuse.job import Metric as Metric
    from allfuse.job import Stop as Stop
    from allfuse.job import on as on
    from allfuse.plan import Plan as Plan
    from allfuse.plan import data as data
    from allfuse.plan import member as member
    from allfuse.plan import pipe as pipe
    from allfuse.plan import shard as shard
    from allfuse.plan import site as site
    from allfuse.plan import tensor as tensor
    from allfuse.sync.averaging import EMA as EMA
    from allfuse.sync.averaging import SWA as SWA
    from allfuse.training.loop import Result as Result
    from allfuse.training.measure import accuracy as accuracy
    from allfuse.training.session import Session as Session

__version__ = "0.1.0"

_HOMES = {
    "launch": "allfuse.api",
    "session": "allfuse.api",
    "train": "allfuse.api",
    "comm_hook": "allfuse.fusion.hook",
    "fuse_": "allfuse.fusion.fuse",
    "Hook": "allfuse.job",
    "Job": "allfuse.job",
    "Metric": "allfuse.job",
    "Stop": "allfuse.job",
    "on": "allfuse.job",
    "Plan": "allfuse.plan",
    "data": "allfuse.plan",
    "member": "allfuse.plan",
    "pipe": "allfuse.plan",
    "shard": "allfuse.plan",
    "site": "allfuse.plan",
    "tensor": "allfuse.plan",
    "EMA": "allfuse.sync.averaging",
    "SWA": "allfuse.sync.averaging",
    "Result": "allfuse.training.loop",
    "Session": "allfuse.training.session",
    "accuracy": "allfuse.training.measure",
    "errors": "allfuse.base",
}

__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'allfuse' has no attribute {name!r}")
    module = importlib.import_module(home)
    return importlib.import_module(f"{home}.{name}") if name == "errors" else getattr(module, name)


def __dir__() -> list[str]:
    return __all__
