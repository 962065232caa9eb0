"""allfuse merge by a rule of weights: models go from disk to disk."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from allfuse.base.units import format_bytes
from allfuse.cli.options import print_json

if TYPE_CHECKING:
    from allfuse.merge.recipe_file import Said


def merge_on_disk(
    said: Said,
    out: Path,
    *,
    memory_bytes: int,
    threads: int | None,
    overwrite: bool,
    dry_run: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Fuse models, or say what would be done, and tell of it."""
    from allfuse.merge.merge import choose_workers, describe, merge, refuse_place
    from allfuse.merge.outline import outline

    recipe = said.recipe
    if dry_run:
        plan = outline(recipe)
        refuse_place(plan, out, overwrite)
        told = describe(plan) | {"threads": choose_workers(plan, memory_bytes, threads)}
        told["notes"] = [*said.notes, *told["notes"]]
        if as_json:
            print_json({"ok": True, "command": "merge", **told})
        else:
            _tell_plan(told, out)
        return
    done = _watched(
        lambda tell: merge(
            recipe, out, memory_bytes=memory_bytes, workers=threads, overwrite=overwrite, tell=tell
        ),
        quiet,
        as_json,
    )
    told = asdict(done)
    told["notes"] = [*said.notes, *done.notes]
    if as_json:
        print_json({"ok": True, "command": "merge", "rule": str(recipe.rule), **told})
        return
    speed = format_bytes((done.read_bytes + done.written_bytes) / max(done.seconds, 1e-9))
    print(
        f"{done.out}: {done.parameters:,} parameters in {done.tensors:,} tensors by {recipe.rule}, "
        f"{done.seconds:.2f} s, {speed}/s read and written"
    )
    _tell_notes(told["notes"])


def _watched(work: Callable[[Any], Any], quiet: bool, to_stderr: bool) -> Any:
    if quiet:
        return work(lambda name, **data: None)
    from allfuse.base.events import Bus
    from allfuse.observe.merging import MergeProgress

    bus = Bus()
    with MergeProgress(sys.stderr if to_stderr else sys.stdout) as progress:
        bus.subscribe(progress)
        return work(bus.emit)


def _tell_plan(told: dict[str, Any], out: Path) -> None:
    print(
        f"{out}: would be {told['parameters']:,} parameters in {told['tensors']:,} tensors by "
        f"{told['rule']} of {told['models']} models\n"
        f"  read {format_bytes(told['read_bytes'])}, write {format_bytes(told['written_bytes'])} "
        f"in {told['files']} file{'s' if told['files'] > 1 else ''}, {told['threads']} threads"
    )
    if told["copied"]:
        print(f"  as in the first model, being whole numbers: {', '.join(told['copied'][:10])}")
    if told["padded"]:
        print(f"  with rows that some models lack: {', '.join(told['padded'][:10])}")
    _tell_notes(told["notes"])


def _tell_notes(notes: list[str]) -> None:
    for note in notes:
        print(f"  note: {note}")
