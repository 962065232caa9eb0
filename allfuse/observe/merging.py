"""How far a merge is: bytes, speed and time left."""

from __future__ import annotations

from allfuse.base.events import Event
from allfuse.base.units import format_bytes
from allfuse.observe.bar import Bar


class MergeProgress(Bar):
    """A sink that draws a bar of the bytes that are written; where it is no terminal a line at the
    start."""

    def __call__(self, event: Event) -> None:
        data = event.data
        if event.name == "merging":
            self.show("merging", total=data["total"], completed=data["bytes"])
            again = f", going on after {data['resumed']:,} blocks" if data["resumed"] else ""
            self.log(f"merging: {format_bytes(data['total'])} to write{again}")
        elif event.name == "merged":
            self.advance(data["bytes"])
        elif event.name == "aligning":
            text = f"aligning model {data['model'] + 1} of {data['models']}"
            self.show(text)
            self.log(text)
        elif event.name == "note":
            self.note(data["text"])
