"""Tied weights under other names: one tensor that several names of a model stand for.

Some files hold such a tensor under all names, some under one of them, and it differs under which:
torch.save writes all, files of transformers have one and their configuration says the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from allfuse.merge.source import Source


def with_ties_of(first: Source, other: Source) -> Source:
    """A model in which the names of one tensor are those of another model, where both have it under
    one of them at least. Names that stand for tensors of their own stay."""
    entries, tied = dict(other.entries), dict(other.tied)
    for kept, names in _classes(first.tied).items():
        present = [name for name in names if name in entries]
        if len({tied.get(name, name) for name in present}) == 1:
            entries |= dict.fromkeys(names, entries[present[0]])
            tied = {name: where for name, where in tied.items() if name not in names}
            tied |= {name: kept for name in names if name != kept}
    for names in _classes(tied).values():
        own = [name for name in names if name in first.entries]
        if own:
            for name in names:
                tied.pop(name, None)
                if name not in own:
                    del entries[name]
            tied |= dict.fromkeys(own[1:], own[0])
    return replace(other, entries=entries, tied=tied)


def _classes(tied: Mapping[str, str]) -> dict[str, list[str]]:
    """The names of each tensor that has several, that under which it is kept first."""
    found: dict[str, list[str]] = {}
    for name, kept in tied.items():
        found.setdefault(kept, [kept]).append(name)
    return found
