"""Whether models are of one kind, by the names and shapes of their tensors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from allfuse.base.errors import MergeError
from allfuse.merge.arrangement import Place, layer_names, one_stack, outer_names
from allfuse.merge.header import Entry
from allfuse.merge.recipe import Recipe
from allfuse.merge.source import Source

SHOWN = 10
Shape = tuple[int, ...]


def refuse_unlike(first: Source, other: Source, pad: bool = False) -> None:
    """Refuse models with tensors of other names or shapes, or of which one is floating-point in one
    of them alone.

    Args:
        pad: whether tables of words may have different numbers of rows.

    Raises:
        MergeError: the first of them, and how many there are.
    """
    missing = [name for name in first.entries if name not in other.entries]
    extra = [name for name in other.entries if name not in first.entries]
    shapes = {
        name: (first.entries[name].shape, other.entries[name].shape)
        for name in first.entries
        if name in other.entries and first.entries[name].shape != other.entries[name].shape
    }
    kinds = {
        name: (first.entries[name].dtype, other.entries[name].dtype)
        for name in first.entries
        if name in other.entries and first.entries[name].is_float != other.entries[name].is_float
    }
    rows = _rows(list(shapes.values()))
    said = []
    for what, names in (("not in the second", missing), ("not in the first", extra)):
        if names:
            said.append(f"{len(names)} {what}: {some(names)}")
    if shapes and not (pad and rows):
        each = [f"{name} {list(one)} and {list(two)}" for name, (one, two) in shapes.items()]
        words = ""
        if rows and not pad:
            words = (
                f"; their vocabularies differ by {abs(rows[0] - rows[1])} rows; next: "
                "--pad-vocabulary, if rows of the same number are the same words"
            )
        said.append(f"{len(shapes)} of other shapes: {some(each)}{words}")
    if kinds:
        each = [f"{name} {one} and {two}" for name, (one, two) in kinds.items()]
        said.append(f"{len(kinds)} floating-point in one of them alone: {some(each)}")
    if said:
        raise MergeError(
            f"{first.path} and {other.path} are not models of one kind, of their tensors are "
            + "; ".join(said)
        )


def _rows(pairs: Sequence[tuple[Shape, Shape]]) -> tuple[int, int] | None:
    """How many words two models have, where only tables of words, and biases of them, differ."""
    rows = {(one[0], two[0]) for one, two in pairs if one and two and one[1:] == two[1:]}
    alike = all(one and two and one[1:] == two[1:] for one, two in pairs)
    has_table = any(len(one) == 2 for one, _ in pairs)
    return rows.pop() if len(rows) == 1 and alike and has_table else None


def refuse_untied(first: Source, sources: Iterable[Source]) -> None:
    """Refuse models of which some have one tensor under two names, and others two tensors.

    Raises:
        MergeError: names the first of them.
    """
    for source in sources:
        apart = sorted(first.tied.items() ^ source.tied.items())
        if apart:
            name, kept = apart[0]
            raise MergeError(
                f"{first.path} and {source.path}: {name} is {kept} (tied weights) in one of them "
                "and a tensor of its own in the other; next: save both alike"
            )


def refuse_unlike_layers(recipe: Recipe, sources: Sequence[Source], base: Source | None) -> None:
    """Refuse models whose layers cannot stand in one stack.

    Raises:
        MergeError: their layers, or the tensors around them, have other names or widths.
    """
    part = recipe.slices[0].parts[0]
    first = sources[part.model] if part.model is not None else base
    assert first is not None
    prefix, _ = one_stack(first)
    own = {rest for rests in layer_names(first, prefix).values() for rest in rests}
    outer = outer_names(first, prefix)
    for other in [*sources, *([] if base is None else [base])]:
        found = {rest for rests in layer_names(other, prefix).values() for rest in rests}
        around = outer_names(other, prefix)
        apart = sorted(own ^ found) or sorted(set(outer) ^ set(around))
        if apart:
            raise MergeError(
                f"{first.path} and {other.path} are not models of one kind, {len(apart)} tensors "
                f"are in one of them alone: {some(apart)}"
            )
        wide = [
            f"{name} {list(first.entries[name].shape)} and {list(other.entries[name].shape)}"
            for name in outer
            if first.entries[name].shape[1:] != other.entries[name].shape[1:]
        ]
        if wide:
            raise MergeError(
                f"{first.path} and {other.path} have layers of other widths: {some(wide)}"
            )


def refuse_unlike_places(
    places: Sequence[Place], recipe: Recipe, sources: Sequence[Source], base: Source | None
) -> None:
    """Refuse layers that are to be fused and have other names or shapes.

    Raises:
        MergeError: the first of them, and how many there are.
    """
    wrong: list[str] = []
    shaped: dict[tuple[int, int], dict[str, tuple[Shape, Shape]]] = {}
    for place in places:
        owners = [base if p.model is None else sources[p.model] for p in place.said.parts]
        found: list[tuple[Source, Entry]] = []
        for owner, name in zip(owners, place.names, strict=True):
            assert owner is not None
            if name in owner.entries:
                found.append((owner, owner.entries[name]))
            else:
                wrong.append(f"{name} is not in {owner.path}")
        for other, entry in found[1:]:
            first, like = found[0]
            if entry.shape != like.shape:
                pair = (like.shape, entry.shape)
                shaped.setdefault((id(first), id(other)), {})[place.name] = pair
            if entry.is_float != like.is_float:
                wrong.append(
                    f"{place.name} is {like.dtype} in {first.path} and {entry.dtype} in "
                    f"{other.path}"
                )
    for pairs in shaped.values():
        if not (recipe.pad_vocabulary and _rows(list(pairs.values()))):
            wrong += [
                f"{name} is {list(one)} in one and {list(two)} in another"
                for name, (one, two) in pairs.items()
            ]
    if wrong:
        raise MergeError(f"{len(wrong)} tensors cannot be fused: {some(wrong)}")


def some(names: Sequence[str]) -> str:
    """The first of them."""
    return ", ".join(names[:SHOWN]) + (" ..." if len(names) > SHOWN else "")
