"""What `allfuse merge` is asked for: by its options, or by a recipe in a file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from allfuse.base.errors import UserError, nearest
from allfuse.base.units import parse_bytes

if TYPE_CHECKING:
    from allfuse.merge.recipe_file import Said

RULE = "mean"
MOST_NAMED = 10

PadOption = Annotated[
    bool,
    typer.Option(
        "--pad-vocabulary",
        help="Let tables of words have different numbers of rows: a row that a model lacks is the "
        "base's, or the mean of those that have it.",
    ),
]
ShardOption = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="What each file of the result has at most, such as 5GB; by default it is cut like the "
        "first model or the base.",
    ),
]


def read_request(
    models: Sequence[Path],
    *,
    rule: str | None,
    weights: str | None,
    base: Path | None,
    dtype: str | None,
    seed: int | None,
    allow_nan: bool,
    pad_vocabulary: bool,
    shard_size: str | None,
) -> Said:
    """The recipe that options say, or a file; what an option says too counts before the file.

    Raises:
        UserError: they say what cannot be, or an option what the file says.
    """
    from allfuse.merge.recipe import Recipe
    from allfuse.merge.recipe_file import Said, is_recipe, read_recipe

    files = [model for model in models if is_recipe(model)]
    shard_bytes = None if shard_size is None else read_size("--shard-size", shard_size)
    if not files:
        every = find_models(models)
        recipe = Recipe(
            models=every,
            rule=read_rule(rule or RULE),
            weights=read_weights(weights, len(every)),
            base=base,
            dtype=dtype,
            seed=seed or 0,
            allow_nan=allow_nan,
            pad_vocabulary=pad_vocabulary,
            shard_bytes=shard_bytes,
        )
        return Said(recipe, tuple(note_models(models, every)))
    if len(models) > 1:
        raise UserError(f"{files[0]} is a recipe, which names its models; allowed: it alone")
    for option, value in (("--rule", rule), ("--weights", weights), ("--base", base)):
        if value is not None:
            raise UserError(
                f"{option} {value}: {files[0]} says it; next: leave it out, or change the file"
            )
    return read_recipe(
        files[0],
        dtype=dtype,
        seed=seed,
        allow_nan=allow_nan or None,
        pad_vocabulary=pad_vocabulary or None,
        shard_bytes=shard_bytes,
    )


def refuse_recipes(models: Sequence[Path], what: str) -> None:
    """Refuse a recipe where models themselves are asked for. Raises UserError."""
    from allfuse.merge.recipe_file import is_recipe

    for model in models:
        if is_recipe(model):
            raise UserError(f"{what} takes models, and {model} is a recipe; next: name its models")


def find_models(models: Sequence[Path]) -> list[Path]:
    """The models that are named; those in a folder, where it is the only one."""
    from allfuse.store.model_files import find_ingredients

    return find_ingredients(models[0]) if len(models) == 1 else list(models)


def note_models(given: Sequence[Path], found: Sequence[Path]) -> list[str]:
    """Which models one folder stands for, where it stands for several: a note, or none."""
    if len(found) == len(given):
        return []
    names = ["its model" if path == given[0] else path.name for path in found]
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    listed = ", ".join(names[:MOST_NAMED])
    return [f"{given[0]} stands for {len(found)} models: {listed}{more}"]


def read_rule(text: str) -> Any:
    """The rule that a text says. Raises PlanError."""
    from allfuse.merge.recipe_file import read_rule

    return read_rule(text)


def read_type(text: str | None) -> str | None:
    """A type of numbers by its name in safetensors, in capitals or not, or by PyTorch's name.

    Raises:
        UserError: there is no such type.
    """
    from allfuse.merge.recipe_file import TYPES

    if text is None:
        return None
    found = TYPES.get(text.lower()) or TYPES.get(text.upper())
    if found is None:
        raise UserError(
            f"--dtype {text}{nearest(text.lower(), TYPES)}; allowed: {', '.join(TYPES)}"
        )
    return found


def read_weights(text: str | None, models: int) -> list[float]:
    """Raises UserError: not numbers."""
    if text is None:
        return [1.0] * models
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise UserError(
            f"--weights {text}: allowed: numbers with commas between, one for each model, such as "
            f"{','.join(['1'] * models)}"
        ) from error
    return found


def read_size(option: str, text: str) -> int:
    """Bytes, of a text such as 2GB. Raises UserError."""
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise UserError(f"{option} {error}") from error
