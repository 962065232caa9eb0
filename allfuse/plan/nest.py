"""The YAML form of a plan: plain lists, dicts, text and numbers.

    - site: {n: 4, every: 50}
    - data: {n: 2, codec: {topk: {fraction: 0.01}}}

A choice without arguments is its name; with arguments it is a dict of one entry, from its name to
its arguments by name. A value that is no dict stands for the first argument: `data: 4`.
"""

from __future__ import annotations

from collections.abc import Mapping

from allfuse.base.choice import Choice, arguments_of
from allfuse.base.errors import PlanError
from allfuse.plan.parse import MAX_DEPTH, Call, check_number, clip, read_call


def read_nest(nest: object) -> list[Call]:
    """The calls of a nest: a list of them, or one alone.

    Raises:
        PlanError: the nest holds something else.
    """
    items = nest if isinstance(nest, list | tuple) else [nest]
    if not items:
        raise PlanError("an empty list", "a plan names at least one axis", "[{data: 1}]")
    return [_read_call(item, MAX_DEPTH) for item in items]


def _read_call(item: object, depth: int) -> Call:
    if depth == 0:  # also ends nests that contain themselves, which YAML's anchors can make
        raise PlanError(clip(repr(item)), f"is nested more than {MAX_DEPTH} levels deep", "data: 4")
    if isinstance(item, str):
        return read_call(item)
    if not isinstance(item, Mapping):
        raise PlanError(clip(repr(item)), "is not a name with its arguments", "data: 4")
    if len(item) != 1:
        raise PlanError(
            clip(repr(item)),
            f"must have one entry, name: arguments, and has {len(item)}",
            "a list with one entry for each axis, outermost first",
        )
    name, arguments = next(iter(item.items()))
    if not isinstance(name, str):
        raise PlanError(clip(repr(item)), "a name must be text", "data: 4")
    if arguments is None:
        return Call(name)
    if not isinstance(arguments, Mapping):
        return Call(name, [_read_value(arguments, depth)])
    kwargs = {}
    for key, value in arguments.items():
        if not isinstance(key, str):
            raise PlanError(clip(repr(item)), "the name of an argument must be text", "n: 4")
        kwargs[key] = _read_value(value, depth)
    return Call(name, [], kwargs)


def _read_value(value: object, depth: int) -> object:
    if isinstance(value, Mapping):
        return _read_call(value, depth - 1)
    if isinstance(value, int | float):
        check_number(value)
    elif not (value is None or isinstance(value, str)):
        raise PlanError(
            clip(repr(value)), "is not an argument", "a number, a truth value, text or a choice"
        )
    return value


def write_nest(choice: Choice) -> dict[str, object] | str:
    """A choice in its YAML form, by the names of all its arguments that are not defaults."""
    positional, keyword = choice.arguments()
    names = [spec.name for spec in arguments_of(type(choice))]  # those without default come first
    arguments = {**dict(zip(names, positional, strict=False)), **keyword}
    if not arguments:
        return choice.name
    return {choice.name: {key: _write_value(value) for key, value in arguments.items()}}


def _write_value(value: object) -> object:
    return write_nest(value) if isinstance(value, Choice) else value
