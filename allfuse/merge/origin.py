"""What goes with weights that are made of those of runs: the job that they were trained by."""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from allfuse.store.run import RunFolder, is_run, versions, write_record

KEPT = ("arguments", "job_file")
"""What of a run's record says how to build its model and read its data."""


def carry_job(models: Iterable[Path], folder: Path, merged: Mapping[str, Any]) -> None:
    """Give a folder the job of the first of some models that is a run with one, so that it can be
    predicted and evaluated with, as a run can; none where none is.

    Args:
        merged: of what the weights are made, which is recorded too.
    """
    for path in models:
        run = RunFolder.open(path) if is_run(path) else None
        if run is not None and run.job_path.is_file():
            shutil.copyfile(run.job_path, folder / run.job_path.name)
            kept = {name: run.record[name] for name in KEPT if name in run.record}
            about = {"command": shlex.join(sys.argv), "versions": versions()}
            write_record(folder, {**about, **kept, "merged": dict(merged)})
            return
