"""All that will be done, known and checked before the first number is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from allfuse.merge.arrangement import Place, arrange, one_stack
from allfuse.merge.configuration import CONFIG, TOKENIZER, Changes, adapt_config
from allfuse.merge.header import Entry
from allfuse.merge.layout import Layout, lay_out
from allfuse.merge.likeness import (
    refuse_unlike,
    refuse_unlike_layers,
    refuse_unlike_places,
    refuse_untied,
)
from allfuse.merge.padding import Padded, pad
from allfuse.merge.recipe import Recipe
from allfuse.merge.settings import Settings
from allfuse.merge.source import Source, open_source
from allfuse.merge.tying import with_ties_of
from allfuse.merge.vocabulary import refuse_other_tokens
from allfuse.rule import METHODS, Rule

BLOCK = 1 << 18
"""Numbers that are fused at once, in whole rows. What comes out does not depend on what is done at
the same time, so nothing else cuts a tensor."""


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
    """All that will be done.

    Attributes:
        copied: tensors that are no floating-point numbers: those of the first model or the base.
        padded: tables of words that are longer than those of some models.
        config: what config.json says, where that is not what the first model's says.
        notes: what whoever starts it should know.
    """

    recipe: Recipe
    sources: tuple[Source, ...]
    base: Source | None
    layout: Layout
    tasks: tuple[Task, ...]
    copied: tuple[str, ...]
    padded: tuple[str, ...] = ()
    config: bytes | None = None
    notes: tuple[str, ...] = ()

    @property
    def first(self) -> Source:
        return self.sources[0] if self.base is None else self.base

    @property
    def read_bytes(self) -> int:
        return sum(entry.bytes for task in self.tasks for entry in task.sources)

    @property
    def written_bytes(self) -> int:
        return self.layout.bytes

    def side_files(self) -> list[Path]:
        """Files beside the weights that are carried over as they are."""
        files, tokenizer = self.first.side_files(), self.recipe.tokenizer
        if tokenizer is not None:
            own = [tokenizer / name for name in TOKENIZER if (tokenizer / name).is_file()]
            if own:
                files = [file for file in files if file.name not in TOKENIZER] + own
        return [file for file in files if self.config is None or file.name != CONFIG]

    def write_config(self, folder: Path) -> None:
        """Write the config.json that differs from the first model's."""
        if self.config is not None:
            (folder / CONFIG).write_bytes(self.config)


def outline(recipe: Recipe) -> Outline:
    """Check that models can be fused, from their headers alone.

    Raises:
        MergeError: a file is missing or damaged, or models differ in names or shapes.
    """
    sources = tuple(open_source(Path(path)) for path in recipe.models)
    base = None if recipe.base is None else open_source(Path(recipe.base))
    first = sources[0] if base is None else base
    sources = tuple(with_ties_of(first, source) for source in sources)
    refuse_untied(first, sources)
    if recipe.is_stacked:
        refuse_unlike_layers(recipe, sources, base)
        places = arrange(recipe, sources, base)
        refuse_unlike_places(places, recipe, sources, base)
    else:
        for other in sources:
            if other is not first:
                refuse_unlike(first, other, recipe.pad_vocabulary)
        places = arrange(recipe, sources, base)
    drafts = {place.name: _draft(place, recipe, sources, base) for place in places}
    padded = tuple(name for name, draft in drafts.items() if draft.is_padded)
    like = _like(first, drafts, recipe.is_stacked)
    dtypes = {
        name: recipe.dtype if recipe.dtype and draft.is_float else like.entries[name].dtype
        for name, draft in drafts.items()
    }
    shard_bytes = recipe.shard_bytes
    if recipe.is_stacked and shard_bytes is None and len(first.files) > 1:
        shard_bytes = max(
            sum(first.entries[name].bytes for name in names) for names in first.files.values()
        )
    layout = lay_out(like, dtypes, shard_bytes)
    tasks = tuple(
        drafts[name].task(number, target)
        for number, (name, target) in enumerate(layout.entries.items())
    )
    copied = tuple(name for name in layout.entries if not drafts[name].is_float)
    config, notes = adapt_config(first, _changes(recipe, first, drafts, padded))
    notes += _idle_filters(recipe, [place for place in places if drafts[place.name].is_float])
    if padded:
        notes += _compare_tokens(recipe)
    return Outline(recipe, sources, base, layout, tasks, copied, padded, config, tuple(notes))


@dataclass(frozen=True)
class Draft:
    """A task of which it is not yet known where it goes."""

    inputs: tuple[Entry, ...]
    base: Entry | None
    rules: tuple[Rule, ...]
    weights: tuple[float, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.inputs[0].shape

    @property
    def dtype(self) -> str:
        return (self.base or self.inputs[0]).dtype

    @property
    def is_float(self) -> bool:
        return self.inputs[0].is_float

    @property
    def is_padded(self) -> bool:
        return any(isinstance(entry, Padded) for entry in [*self.inputs, self.base])

    def task(self, number: int, target: Entry) -> Task:
        return Task(number, target, self.inputs, self.base, self.rules, self.weights)


def _draft(place: Place, recipe: Recipe, sources: Sequence[Source], base: Source | None) -> Draft:
    own: list[Entry] = []
    start: Entry | None = None
    for part, name in zip(place.said.parts, place.names, strict=True):
        if part.model is None:
            assert base is not None
            start = base.entries[name]
        else:
            own.append(sources[part.model].entries[name])
    first = own[0] if start is None else start
    if not first.is_float:
        return Draft((first,), None, (recipe.rule,), (1.0,))
    if not own:  # a slice of the base alone
        return Draft((first,), None, (METHODS["passthrough"](),), (1.0,))
    rules, weights = recipe.settle(place.said, place.names[0], place.at)
    if any(entry.shape != first.shape for entry in own):
        start, padded = pad(start, own, weights)
        return Draft(padded, start, rules, weights)
    return Draft(tuple(own), start, rules, weights)


def _like(first: Source, drafts: Mapping[str, Draft], is_stacked: bool) -> Source:
    """A model with the names and shapes of the result."""
    entries = {
        name: Entry(name, draft.dtype, draft.shape, first.path, 0) for name, draft in drafts.items()
    }
    files = {next(iter(first.files)): list(drafts)} if is_stacked else first.files
    tied = {name: kept for name, kept in first.tied.items() if kept in drafts}
    return replace(first, entries=entries, tied=tied, files=files)


def _changes(
    recipe: Recipe, first: Source, drafts: Mapping[str, Draft], padded: Sequence[str]
) -> Changes:
    layers, count = None, 0
    if recipe.is_stacked:
        chosen = [part.layers for said in recipe.slices for part in said.parts[:1]]
        layers, count = [layer for each in chosen for layer in each or ()], one_stack(first)[1]
    rows, before = None, 0
    if padded:
        rows, before = drafts[padded[0]].shape[0], first.entries[padded[0]].shape[0]
    return Changes(layers, count, rows, before, recipe.dtype)


def _idle_filters(recipe: Recipe, places: Sequence[Place]) -> list[str]:
    """Notes of filters in a file that fit none of the tensors they are for."""
    levels: list[tuple[Settings, list[str]]]
    levels = [(recipe.settings, [place.names[0] for place in places])]
    for said in recipe.slices:
        own = [place.names[0] for place in places if place.said is said]
        levels += [(said.settings, own), *((part.settings, own) for part in said.parts)]
    found = [
        f"{setting.where} has the filter {part!r}, which no tensor that is fused has in its name"
        for settings, names in levels
        for setting in settings.values()
        if setting.where
        for part in setting.idle_filters(names)
    ]
    return list(dict.fromkeys(found))


def _compare_tokens(recipe: Recipe) -> list[str]:
    """Refuse tables whose rows are other words; notes of what cannot be told."""
    models = [*recipe.models, *([] if recipe.base is None else [recipe.base])]
    unread = refuse_other_tokens([Path(model) for model in models])
    return [
        f"{model} has no tokenizer that can be read: that rows of the same number are the same "
        "words is taken for granted"
        for model in unread[:1]
    ]
