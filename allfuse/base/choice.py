"""A named choice with arguments, as it stands in a plan: `ring`, `topk(0.01)`, `site(4, every=50)`.

Topologies, rules, codecs, sync policies and axes are all choices. Each folder has one table from
name to class; `build` makes a choice from such a table and explains what is allowed when it cannot.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, fields
from keyword import iskeyword
from typing import Any, ClassVar, TypeVar

from allfuse.base.errors import PlanError, nearest


@dataclass(frozen=True)
class Choice:
    """Base of everything that a plan names. Subclasses are frozen dataclasses.

    Fields without a default come first and are written without their name.
    """

    name: ClassVar[str]

    def arguments(self) -> tuple[list[Any], dict[str, Any]]:
        """Positional and keyword arguments that make this choice again, defaults left out."""
        positional: list[Any] = []
        keyword: dict[str, Any] = {}
        for spec in arguments_of(type(self)):
            value = getattr(self, spec.name)
            default = (
                spec.default_factory() if spec.default_factory is not MISSING else spec.default
            )
            if default is MISSING:
                positional.append(value)
            elif value != default:
                keyword[spec.name] = value
        return positional, keyword

    def __str__(self) -> str:
        positional, keyword = self.arguments()
        parts = [write(value) for value in positional]
        parts += [f"{key}={write(value)}" for key, value in keyword.items()]
        return f"{self.name}({', '.join(parts)})" if parts else self.name


C = TypeVar("C", bound=Choice)


def arguments_of(cls: type[Choice]) -> list[Field[Any]]:
    """The fields as they are written: those by name only, which a base may have, come last."""
    return sorted(fields(cls), key=lambda spec: bool(spec.kw_only))


def write(value: object) -> str:
    """A value as it stands in the text of a plan. None is what is derived: `auto`.

    >>> write("end"), write("1f1b"), write(0.5), write(None), write(True)
    ('end', "'1f1b'", '0.5', 'auto', 'true')
    """
    if value is None:
        return "auto"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        bare = value.isidentifier() and not iskeyword(value) and value not in ("true", "false")
        return value if bare else repr(value)
    return str(value)


def build(
    kind: str, table: Mapping[str, type[C]], name: str, args: list[Any], kwargs: dict[str, Any]
) -> C:
    """The choice called `name` in `table`.

    Raises:
        PlanError: the name is not in the table, or the arguments are not its own.
    """
    cls = table.get(name)
    call = f"{kind} {name}"
    if cls is None:
        hint = nearest(name, table)
        why = f"there is no {kind} of that name{hint}"
        raise PlanError(call, why, allowed=", ".join(table))
    specs = arguments_of(cls)
    names = [spec.name for spec in specs]
    positional = [spec.name for spec in specs if not spec.kw_only]
    if len(args) > len(positional):
        raise PlanError(
            call,
            f"takes at most {len(positional)} arguments without a name, got {len(args)}",
            allowed=signature(cls),
        )
    values = dict(zip(positional, args, strict=False))
    for key, value in kwargs.items():
        if key not in names:
            hint = nearest(key, names) or _who_has(key, table)
            raise PlanError(call, f"has no argument {key!r}{hint}", allowed=signature(cls))
        if key in values:
            raise PlanError(call, f"got {key!r} twice", allowed=signature(cls))
        values[key] = value
    for spec in specs:
        required = spec.default is MISSING and spec.default_factory is MISSING
        if required and spec.name not in values:
            raise PlanError(call, f"needs its argument {spec.name!r}", allowed=signature(cls))
        if spec.default is None and values.get(spec.name) == "auto":
            values[spec.name] = None
    try:
        made = cls(**values)
    except (TypeError, ValueError) as error:  # a value of a wrong kind is bad input, not a bug
        _refuse_kinds(call, cls, values)
        why = f"does not take these arguments: {error}"
        raise PlanError(call, why, allowed=signature(cls)) from error
    _refuse_kinds(call, cls, values)
    return made


KINDS: dict[str, tuple[str, tuple[type, ...]]] = {
    "bool": ("true or false", (bool,)),
    "int": ("a whole number", (int,)),
    "float": ("a number", (int, float)),
    "str": ("a name", (str,)),
}
"""What an argument takes whose annotation is that: for messages, and for checks."""


def _refuse_kinds(call: str, cls: type[Choice], values: Mapping[str, object]) -> None:
    """Refuse values of another kind than a field says, which would break later or mean nothing."""
    for spec in fields(cls):
        said = spec.type if isinstance(spec.type, str) else getattr(spec.type, "__name__", "")
        kind = said.removesuffix(" | None")
        if kind not in KINDS or spec.name not in values:
            continue
        value, (word, types) = values[spec.name], KINDS[kind]
        derived = value is None and kind != said
        if derived or (isinstance(value, types) and isinstance(value, bool) == (kind == "bool")):
            continue
        why = f"{spec.name!r} is {word}, got {write(value)}"
        raise PlanError(call, why, allowed=signature(cls))


def _who_has(key: str, table: Mapping[str, type[C]]) -> str:
    """Which other choices take an argument of that name, for messages."""
    found = [name for name, cls in table.items() if key in (spec.name for spec in fields(cls))]
    return f" ({', '.join(found)} {'has' if len(found) == 1 else 'have'} one)" if found else ""


def signature(cls: type[Choice]) -> str:
    """How a choice is written, for messages: `site(n, every=1)`."""
    parts = []
    for spec in arguments_of(cls):
        default = spec.default_factory() if spec.default_factory is not MISSING else spec.default
        parts.append(spec.name if default is MISSING else f"{spec.name}={write(default)}")
    return f"{cls.name}({', '.join(parts)})" if parts else cls.name
