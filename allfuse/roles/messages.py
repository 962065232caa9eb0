"""What workers, servers and the scheduler say to each other.

One dataclass for each message; its fields are plain values, checked when a letter is opened. The
course of one clock:

      worker                     servers                     scheduler
        |                           |                            |
        |<-- Lease(sequence=n) ---------------------------------- |   what to work on, and
        |<-- Weights(sequence=n) -- |                             |   with weights of which version
     computes                       |                             |
        |--- Push(lease) ---------> |                             |   a piece of the update
        |<-- Staged(lease) -------- |                             |   all pieces are here
        |--- Finished(lease) ------------------------------------>|   on all servers
        |                           |<-- Orders(n + 1, ...) ----- |   written to the book first
        |<-- Lease(sequence=n+1) -------------------------------- |
        |<-- Weights(sequence=n+1)--|                             |

An update is ordered only when all servers hold it, and servers carry out orders by their sequence,
each once: it is applied on all servers or none, and sequence n names one version of all weights.
Whoever hears nothing says its last message again; every message may come twice, late, or never.

The first order has no leases: it only sends the weights that were given, and names their version 0.
Where updates are fused in step, several leases of one block may fall to one worker, and a lease may
name the version that its worker holds already: then no weights come, and the worker goes back to
those. It keeps what it pushed until a lease of a later clock comes.
"""

from __future__ import annotations

import types
import typing
from dataclasses import fields
from functools import lru_cache
from typing import Any, TypeAlias

from allfuse.link.post import Letter, Malformed
from allfuse.roles.copying import COPYING, Copied, Copy, Fetch, Part
from allfuse.roles.decisions import (
    About,
    Found,
    Lease,
    Measure,
    Orders,
    Partners,
    Refused,
    Repush,
    Welcome,
)
from allfuse.roles.encounters import ENCOUNTERS
from allfuse.roles.exchanges import Ask, Give, Push, Staged, Weights
from allfuse.roles.message import Message
from allfuse.roles.reports import (
    Again,
    Applied,
    Beat,
    Finished,
    Hello,
    Join,
    Leave,
    Measured,
    Note,
    Save,
    Serve,
    Stop,
    Tell,
)

__all__ = [
    "About",
    "Again",
    "Applied",
    "Ask",
    "Beat",
    "Copied",
    "Copy",
    "Fetch",
    "Finished",
    "Found",
    "Give",
    "Hello",
    "Join",
    "Lease",
    "Leave",
    "MESSAGES",
    "Mail",
    "Measure",
    "Measured",
    "Message",
    "Note",
    "Orders",
    "Part",
    "Partners",
    "Push",
    "Refused",
    "Repush",
    "SCHEDULER",
    "Save",
    "Serve",
    "Staged",
    "Stop",
    "Tell",
    "Weights",
    "Welcome",
    "open_letter",
]

SCHEDULER = "scheduler"
"""Its name among those that it sends to; no worker may have it."""

INTERRUPTED = "interrupted"
"""The reason of an end that somebody asked for by Ctrl-C."""

MESSAGES: dict[str, type[Message]] = {
    cls.kind: cls
    for cls in (
        Join,
        Hello,
        Finished,
        Again,
        Beat,
        Leave,
        Stop,
        Note,
        Save,
        Tell,
        Serve,
        Applied,
        Measured,
        About,
        Welcome,
        Refused,
        Lease,
        Repush,
        Orders,
        Measure,
        Found,
        Partners,
        Give,
        Push,
        Ask,
        Staged,
        Weights,
    )
} | {cls.kind: cls for cls in (*COPYING, *ENCOUNTERS)}

Mail: TypeAlias = tuple[str, Message]
"""A receiver and what it is told."""


def open_letter(letter: Letter) -> Message:
    """The message in a letter.

    Raises:
        Malformed: there is no such message, or its fields are not what they should be.
    """
    cls = MESSAGES.get(letter.kind)
    if cls is None:
        raise Malformed(f"a message of kind {letter.kind!r}")
    hints = _hints(letter.kind)
    if letter.fields.keys() != hints.keys():
        raise Malformed(f"a {letter.kind} with fields {sorted(letter.fields)}")
    for name, value in letter.fields.items():
        if not _fits(value, hints[name]):
            raise Malformed(f"a {letter.kind} whose {name} is a {type(value).__name__}")
    return cls(tensors=letter.tensors, **letter.fields)


@lru_cache
def _hints(kind: str) -> dict[str, Any]:
    """What each field of a message may be."""
    cls = MESSAGES[kind]
    hints = typing.get_type_hints(cls)
    return {spec.name: hints[spec.name] for spec in fields(cls) if spec.name != "tensors"}


def _fits(value: object, hint: Any) -> bool:
    """Whether a plain value is of the kind that a field says."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return any(_fits(value, each) for each in inner)
    if origin is list:
        return isinstance(value, list) and all(_fits(each, inner[0]) for each in value)
    if origin is dict:
        return isinstance(value, dict) and all(isinstance(key, str) for key in value)
    if hint is Any:
        return True
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)
