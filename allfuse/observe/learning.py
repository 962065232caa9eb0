"""How far a merge is that looks at data: what it does, for which model, samples and time left."""

from __future__ import annotations

from allfuse.base.events import Event
from allfuse.observe.bar import COUNTS, Bar


class LearnProgress(Bar):
    """A sink that draws a bar for what goes on, and prints notes; on what is no terminal a line for
    each beginning."""

    columns = COUNTS

    def __call__(self, event: Event) -> None:
        data = event.data
        if event.name == "learning":
            number = data["model"]
            of = "" if number is None else f", model {number + 1} of {data['models']}"
            self.show(f"{data['what']}{of}", total=data["total"], completed=0)
            self.log(f"{data['what']}{of}")
        elif event.name == "learned":
            self.advance(data["count"])
        elif event.name == "note":
            self.note(data["text"])
