"""A keyword of an axis whose value is a choice from a table: `codec=topk(0.01)`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Generic, TypeVar, cast

from allfuse.base.choice import Choice, build, signature
from allfuse.base.errors import PlanError, nearest
from allfuse.plan.parse import Call, clip, read_call

V = TypeVar("V", bound=Choice | None)
C = TypeVar("C", bound=Choice)


class Option(Generic[V]):
    """A dataclass field that takes a choice, its class or its text, and always holds the choice.

    A descriptor, so that type checkers know both: what may be given and what is held.

    Args:
        table: the choices there are, by name. Read when a value is set, so that additions count.
        default: the value when none is given. None is "derived", in text `auto`.
    """

    def __init__(self, table: Mapping[str, type[Choice]], default: V) -> None:
        self.table, self.default = table, default

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, holder: object | None, owner: type) -> V:
        # dataclasses ask the class for the default of a field
        return self.default if holder is None else cast(V, holder.__dict__[self.name])

    def __set__(self, holder: object, value: V | type[V] | str) -> None:
        holder.__dict__[self.name] = self.choice(value)

    def choice(self, value: object) -> Choice | None:
        """The choice that a value names.

        Raises:
            PlanError: it names none of the table.
        """
        auto = ["auto"] if self.default is None else []
        if auto and (value is None or (isinstance(value, str) and value == "auto")):
            return None
        if isinstance(value, str):
            value = Call(value) if value in self.table else read_call(value)
        listed = None
        if isinstance(value, Call | Choice | type):
            listed = self.table.get(getattr(value, "name", ""))
        if listed is not None:
            if isinstance(value, Call):
                return make(self.name, self.table, value)
            if value is listed:
                return make(self.name, self.table, Call(listed.name))
            if isinstance(value, Choice) and type(value) is listed:
                return value
        names = [*auto, *self.table]
        hint = nearest(value.name, names) if isinstance(value, Call) else ""
        raise PlanError(
            f"{self.name}={clip(repr(value))}",
            f"there is no such {self.name}{hint}",
            allowed=", ".join(names),
        )


def make(kind: str, table: Mapping[str, type[C]], call: Call) -> C:
    """The choice of `table` that a call names.

    Raises:
        PlanError: there is no such name, or the arguments are not its own.
    """
    made = build(kind, table, call.name, call.args, call.kwargs)
    for spec in fields(made):
        value = getattr(made, spec.name)
        if isinstance(value, Call):  # an option would have made it a choice
            raise PlanError(
                f"{kind} {clip(str(call))}",
                f"{spec.name!r} takes a value, not {value.name}(...)",
                signature(type(made)),
            )
    return made
