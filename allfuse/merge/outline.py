"""All that will be done, known and checked before the first number is read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from allfuse.base.errors import MergeError
from allfuse.merge.header import Entry
from allfuse.merge.layout import Layout, lay_out
from allfuse.merge.recipe import Recipe
from allfuse.merge.source import Source, open_source
from allfuse.rule import Rule

BLOCK = 1 << 18
"""Numbers that are fused at once, in whole rows. What comes out does not depend on what is done at
the same time, so nothing else cuts a tensor."""
SHOWN = 10


@dataclass(frozen=True)
class Task:
    """One tensor: where it is in each model and in the base, where it goes, and what is done.

    Attributes:
        rules: one for each model, all of one class: they differ in what is left out of a model.
        weights: one for each model.
    """

    number: int
    target: Entry
    inputs: tuple[Entry, ...]
    base: Entry | None
    rules: tuple[Rule, ...]
    weights: tuple[float, ...]

    @property
    def rule(self) -> Rule:
        """That of the first model, which says what is the same for all."""
        return self.rules[0]

    @property
    def block(self) -> int:
        """Numbers in a block."""
        row = self.target.shape[-1] if self.target.shape else 1
        return max(1, BLOCK // max(row, 1)) * max(row, 1)

    def blocks(self) -> list[tuple[int, int]]:
        """The first number of each block, and how many it has."""
        count = self.target.count
        return [(begin, min(self.block, count - begin)) for begin in range(0, count, self.block)]

    @property
    def sources(self) -> list[Entry]:
        return [*self.inputs, *([] if self.base is None else [self.base])]


@dataclass(frozen=True)
class Outline:
    """All that will be done."""

    recipe: Recipe
    sources: tuple[Source, ...]
    base: Source | None
    layout: Layout
    tasks: tuple[Task, ...]
    copied: tuple[str, ...]  # tensors that are no floating-point numbers: those of the first model

    @property
    def first(self) -> Source:
        return self.sources[0] if self.base is None else self.base

    @property
    def read_bytes(self) -> int:
        return sum(entry.bytes for task in self.tasks for entry in task.sources)

    @property
    def written_bytes(self) -> int:
        return self.layout.bytes


def outline(recipe: Recipe) -> Outline:
    """Check that models can be fused, from their headers alone.

    Raises:
        MergeError: a file is missing or damaged, or models differ in names or shapes.
    """
    sources = tuple(open_source(Path(path)) for path in recipe.models)
    base = None if recipe.base is None else open_source(Path(recipe.base))
    first = sources[0] if base is None else base
    for other in sources:
        if other is not first:
            refuse_unlike(first, other)
    kept = {name: entry for name, entry in first.entries.items() if name not in first.tied}
    refuse_untied(first, sources)
    dtypes = {
        name: recipe.dtype if recipe.dtype and entry.is_float else entry.dtype
        for name, entry in kept.items()
    }
    layout = lay_out(first, dtypes)
    tasks, copied = [], []
    for number, (name, target) in enumerate(layout.entries.items()):
        own = tuple(source.entries[name] for source in sources)
        start = None if base is None else base.entries[name]
        if not target.is_float:
            copied.append(name)
            own, start = (first.entries[name],), None
        rules, weights = (recipe.rule,) * len(own), tuple(recipe.weights[: len(own)])
        tasks.append(Task(number, target, own, start, rules, weights))
    return Outline(recipe, sources, base, layout, tuple(tasks), tuple(copied))


def refuse_unlike(first: Source, other: Source) -> None:
    """Refuse models with tensors of other names or shapes. Raises MergeError."""
    missing = [name for name in first.entries if name not in other.entries]
    extra = [name for name in other.entries if name not in first.entries]
    shaped = [
        f"{name} {list(first.entries[name].shape)} and {list(other.entries[name].shape)}"
        for name in first.entries
        if name in other.entries and first.entries[name].shape != other.entries[name].shape
    ]
    said = []
    for what, names in (("not in the second", missing), ("not in the first", extra)):
        if names:
            said.append(f"{len(names)} {what}: {_some(names)}")
    if shaped:
        said.append(f"{len(shaped)} of other shapes: {_some(shaped)}{_rows(first, other)}")
    if said:
        raise MergeError(
            f"{first.path} and {other.path} are not models of one kind, of their tensors are "
            + "; ".join(said)
        )


def _rows(first: Source, other: Source) -> str:
    """How many words more one of them has, where only tables of words differ."""
    pairs = [
        (first.entries[name].shape, other.entries[name].shape)
        for name in first.entries
        if name in other.entries and first.entries[name].shape != other.entries[name].shape
    ]
    rows = {(one[0], two[0]) for one, two in pairs if one[1:] == two[1:] and one and two}
    if len(rows) == 1 and all(one[1:] == two[1:] for one, two in pairs):
        ((one, two),) = rows
        return f"; their vocabularies differ by {abs(one - two)} rows"
    return ""


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


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (" ..." if len(names) > SHOWN else "")
