"""Which layer of a model a tensor belongs to, by its name."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from allfuse.merge.sums import Sums


@dataclass(frozen=True)
class Group:
    """Some tensors together."""

    name: str
    tensors: int
    sums: Sums


def place_of(name: str) -> tuple[str, str]:
    """The layer of a tensor and which part of it it is: the layer ends with the first number in
    the name, or, without one, before the last word. Further numbers (of experts) are left open.

    >>> place_of("model.layers.3.mlp.up_proj.weight"), place_of("lm_head.weight")
    (('model.layers.3', 'mlp.up_proj.weight'), ('lm_head', 'weight'))
    >>> place_of("h.0.experts.17.w1"), place_of("scale")
    (('h.0', 'experts.*.w1'), ('scale', 'scale'))
    """
    words = name.split(".")
    numbers = [at for at, word in enumerate(words) if word.isdecimal()]
    at = numbers[0] + 1 if numbers else max(len(words) - 1, 1)
    kind = words[at:] or words[-1:]
    return ".".join(words[:at]), ".".join("*" if word.isdecimal() else word for word in kind)


def group_by(named: Iterable[tuple[str, Sums]]) -> list[Group]:
    """The sums under each name together, in the order in which names come first."""
    found: dict[str, Group] = {}
    for name, sums in named:
        before = found.get(name, Group(name, 0, Sums()))
        found[name] = Group(name, before.tensors + 1, before.sums + sums)
    return list(found.values())
