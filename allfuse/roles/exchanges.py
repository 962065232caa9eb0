"""What workers and servers send each other. `messages` draws the course of a clock."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from allfuse.roles.message import Message


@dataclass(frozen=True, kw_only=True)
class Give(Message):
    """The first weights of a shard, in pieces, by the worker that the scheduler chose."""

    kind: ClassVar[str] = "give"
    piece: int
    pieces: int


@dataclass(frozen=True, kw_only=True)
class Push(Message):
    """A piece of an update's shard, as values or encoded.

    sequence: the version that it was made from. options: those of the optimizer that changed, by
    group. fragment: of the weights, that the update is of; -1 is all.
    """

    kind: ClassVar[str] = "push"
    lease: int
    sequence: int
    piece: int
    pieces: int
    options: list[dict[str, Any]]
    fragment: int = -1


@dataclass(frozen=True, kw_only=True)
class Ask(Message):
    """To a server that did not say `Staged`: what does it lack? lease -1: of the first weights."""

    kind: ClassVar[str] = "ask"
    lease: int


@dataclass(frozen=True, kw_only=True)
class Staged(Message):
    """A server holds all pieces but these; lease -1: of the first weights.

    It is said when the last one came, and in answer to what comes twice and to `Ask`.
    """

    kind: ClassVar[str] = "staged"
    lease: int
    birth: int
    missing: list[int] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Weights(Message):
    """A piece of a shard's weights of one version.

    base: the version to which the encoded differences are to be added; -1 where they are weights.
    """

    kind: ClassVar[str] = "weights"
    sequence: int
    piece: int
    pieces: int
    base: int = -1
