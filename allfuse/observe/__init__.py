"""L6: sinks of events. Code that does work emits events; only this package shows or keeps them.

A sink is called with each `allfuse.base.events.Event`: `bus.subscribe(Console())`.

The vocabulary. Every event has `name`, `time`, `rank` and `step` (optimizer steps done so far); the
rest is its data. "or None" means not known; sinks also bear with keys that are missing.

    start       plan, promise (texts), workers, device ("cpu", "cuda:0"), link ("gloo", ...),
                threads (per worker), samples (of the training data, or None), batch_size,
                steps_per_epoch (or None), total_steps (or None), parameters (count),
                resumed_step (0 when fresh), out (path or None),
                choices (name -> text: what was derived, and why)
    step        epoch (from 0), loss, grad_norm (or None), lr, samples (of the whole batch),
                seconds (wall time of this step), shares (samples per worker),
                busy (per worker, the part of the step it computed rather than waited; or None),
                fused_bytes (that this worker sent in fusions this step)
    round       axis, bytes, seconds                           a fusion of weights
    evaluated   split ("validation", "test"), metrics (name -> number), samples, seconds, best
    saved       step, path, seconds, stalled_seconds, bytes
    not_saved   step, reason
    note        text
    warning     text
    lost        text                                           a worker that is gone
    stop        reason                                         why training is going to end
    end         reason, steps, seconds, samples, samples_per_s, fused_bytes, loss
    scored      rows, total_rows (or None), rows_per_s, seconds_left, shares
    compared    step, steps, loss_difference, grad_norm_difference, weight_difference, tensor
"""

from allfuse.observe.console import Console
from allfuse.observe.jsonl import JsonLines, read_events
from allfuse.observe.profile import Profile, parse_steps
from allfuse.observe.progress import Progress
from allfuse.observe.report import final_rows, final_table, final_text
from allfuse.observe.tensorboard import TensorBoard

__all__ = [
    "Console",
    "JsonLines",
    "read_events",
    "TensorBoard",
    "Profile",
    "parse_steps",
    "Progress",
    "final_rows",
    "final_table",
    "final_text",
]
