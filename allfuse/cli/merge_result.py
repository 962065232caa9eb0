"""Where the result of a merge goes, and how the command tells of it, whatever kind it is."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from allfuse.cli.options import print_json

Tell = Callable[..., None]
Sink = Callable[[TextIO], AbstractContextManager[Any]]


@dataclass(frozen=True, kw_only=True)
class Result:
    """What all kinds of merges are told of theirs; the options of the command."""

    out: Path
    overwrite: bool
    dry_run: bool
    quiet: bool
    as_json: bool

    @contextmanager
    def watched(self, sink: Sink) -> Iterator[Tell]:
        """What is to be told while the work goes on; the sink draws it, on rank 0, unless all is to
        be quiet."""
        from allfuse.base.events import Bus
        from allfuse.launcher import current_world

        world = current_world()
        bus = Bus(0 if world is None else world.rank)
        if self.quiet or bus.rank != 0:
            yield bus.emit
            return
        with sink(sys.stderr if self.as_json else sys.stdout) as progress:
            bus.subscribe(progress)
            yield bus.emit

    def tell(self, told: Mapping[str, Any], text: str) -> None:
        """Say what was done, or would be: `told` to programs, or `text` and its notes to people."""
        if self.as_json:
            print_json({"ok": True, "command": "merge", **told})
            return
        print(text)
        for note in told["notes"]:
            print(f"  note: {note}")
