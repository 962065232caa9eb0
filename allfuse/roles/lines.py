"""How a server reaches the scheduler, the other servers, and those who call at its desk."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from allfuse.link.letter import Letter
from allfuse.link.post import Caller, Desk, Malformed, Post, wait_any
from allfuse.roles.messages import SCHEDULER, Mail, Message, open_letter


class Lines:
    """A desk, a caller to the scheduler, and one to each other server that it has something for.

    Args:
        name: the server's own, at other desks.
    """

    def __init__(self, post: Post, desk: Desk, scheduler: Caller, name: str) -> None:
        self._post, self.desk, self._scheduler, self.name = post, desk, scheduler, name
        self._servers: dict[str, Caller] = {}

    def send(self, mail: Iterable[Mail], places: Sequence[str]) -> None:
        """places: of the servers; all other names are of those who call here."""
        for name, message in mail:
            if name == SCHEDULER:
                self._scheduler.send(message.letter())
            elif name in places:
                self._server(name).send(message.letter())
            else:
                self.desk.send(name, message.letter())

    def _server(self, place: str) -> Caller:
        if place not in self._servers:
            self._servers[place] = self._post.call(place, self.name)
        return self._servers[place]

    def receive(self, timeout_s: float) -> Iterator[tuple[str, Message]]:
        """Who said what; what is no message is counted at the desk and left."""
        wait_any([self.desk, self._scheduler, *self._servers.values()], timeout_s)
        yield from self._open(SCHEDULER, self._scheduler.receive(0))
        for place, caller in list(self._servers.items()):
            yield from self._open(place, caller.receive(0))
        for sender, letter in self.desk.receive(0):
            yield from self._open(sender, [letter])

    def _open(self, sender: str, letters: Iterable[Letter]) -> Iterator[tuple[str, Message]]:
        for letter in letters:
            try:
                message = open_letter(letter)
            except Malformed:
                self.desk.refused["malformed"] += 1
                continue
            yield sender, message

    def leave(self, places: Sequence[str]) -> None:
        """Close what leads to servers that are not at these places any more."""
        for place in [each for each in self._servers if each not in places]:
            self._servers.pop(place).close()

    def close(self) -> None:
        self.leave([])
