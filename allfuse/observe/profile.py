"""A torch profiler trace of chosen steps, for `--profile 10:15`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from allfuse.base.errors import UserError

if TYPE_CHECKING:
    import os

    from torch.profiler import profile, record_function


def parse_steps(text: str) -> tuple[int, int]:
    """First and last step of `FIRST:LAST`, both counted from 1 and both included.

    >>> parse_steps("10:15")
    (10, 15)

    Raises:
        UserError: the text is something else.
    """
    found = re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*", text)
    if found:
        first, last = int(found[1]), int(found[2])
        if 1 <= first <= last:
            return first, last
    raise UserError(
        f"--profile {text!r}: not a range of steps; write FIRST:LAST with 1 <= FIRST <= LAST, for"
        " example 10:15 for steps 10 to 15, or 10:10 for one step"
    )


class Profile:
    """Traces chosen steps of one rank and writes them to `FOLDER/trace-rank0.json`.

    The file opens in https://ui.perfetto.dev and chrome://tracing; every step is a bar "step 12".
    Steps count from 1: `before_step(1)` comes before the first. Steps outside the range cost
    nothing; traced ones are slower, and the trace stays in memory until the last of them.

    >>> import tempfile
    >>> profile = Profile("2:2", tempfile.mkdtemp())
    >>> for step in (1, 2, 3):
    ...     profile.before_step(step)
    ...     if path := profile.after_step(step):
    ...         print(path.name)
    trace-rank0.json

    Args:
        steps: `FIRST:LAST`, see `parse_steps`.
        folder: where the trace goes; made with it.
        rank: whose steps these are, for the name of the file.

    Raises:
        UserError: `steps` is not a range.
    """

    def __init__(self, steps: str, folder: str | os.PathLike[str], rank: int = 0) -> None:
        self.first, self.last = parse_steps(steps)
        self.path = Path(folder) / f"trace-rank{rank}.json"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._profile: profile | None = None
        self._range: record_function | None = None

    def before_step(self, step: int) -> None:
        """Start tracing if this step is in the range; a run may be resumed in the middle of it."""
        if not self.first <= step <= self.last:
            return
        from torch.profiler import record_function

        if self._profile is None:
            self._profile = _started()
        self._range = record_function(f"step {step}")
        self._range.__enter__()

    def after_step(self, step: int) -> Path | None:
        """The trace's path when this step was the last of the range and it has been written."""
        if self._range is not None:
            self._range.__exit__(None, None, None)
            self._range = None
        return self._write() if step >= self.last else None

    def close(self) -> Path | None:
        """Write what was traced when training ended within the range; None: nothing to write."""
        if self._range is not None:
            self._range.__exit__(None, None, None)
            self._range = None
        return self._write()

    def _write(self) -> Path | None:
        trace, self._profile = self._profile, None
        if trace is None:
            return None
        trace.stop()
        trace.export_chrome_trace(str(self.path))
        return self.path


def _started() -> profile:
    import torch
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    trace = profile(activities=activities)
    trace.start()
    return trace
