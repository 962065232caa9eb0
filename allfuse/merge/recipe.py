"""What is to be fused how: models, weights, a rule, and in what type it is written."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import lru_cache
from pathlib import Path

from allfuse.base.choice import build
from allfuse.base.errors import MergeError, PlanError, nearest
from allfuse.merge.header import FLOATS
from allfuse.merge.settings import (
    SIZES,
    WEIGHT,
    Settings,
    Value,
    find_value,
    is_held,
    tell_values,
)
from allfuse.rule import Rule, SumRule

SIFTS = ("density", "gamma", "epsilon")
"""Parameters that say what is left out of a model."""


@dataclass(frozen=True)
class Part:
    """What a slice takes of one model.

    Attributes:
        model: its place among the recipe's models; None: the base.
        layers: which of its layers; None: all of it.
        settings: parameters of this model here.
    """

    model: int | None
    layers: range | None = None
    settings: Settings = field(default_factory=dict)


@dataclass(frozen=True)
class Slice:
    """Parts that are fused with each other; slices are stacked. `settings`: of all its parts."""

    parts: tuple[Part, ...]
    settings: Settings = field(default_factory=dict)

    @property
    def fused(self) -> tuple[Part, ...]:
        """Those that are not the base's."""
        return tuple(part for part in self.parts if part.model is not None)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What is to be fused how.

    Attributes:
        models: where they are. weights: of each, in that order, where no setting says another.
        base: what their changes are counted from, for rules of changes.
        dtype: of the floating-point tensors that are written, by a name of safetensors; None: that
            of the base, or of the first model.
        seed: of what a rule draws at random.
        allow_nan: whether a source may hold numbers that are not finite.
        settings: parameters of the rule, and weights, that differ by tensor, for all models.
        slices: which layers of which models are fused and stacked; none: all of all models.
        pad_vocabulary: whether tables of words may have different numbers of rows.
        shard_bytes: how large the files are; None: as those of the first model or the base.
        tokenizer: the model whose tokenizer is carried over; None: the first one's or the base's.

    Raises:
        MergeError: the rule has no meaning for these models.
    """

    models: Sequence[Path]
    rule: Rule
    weights: Sequence[float]
    base: Path | None = None
    dtype: str | None = None
    seed: int = 0
    allow_nan: bool = False
    settings: Settings = field(default_factory=dict)
    slices: Sequence[Slice] = ()
    pad_vocabulary: bool = False
    shard_bytes: int | None = None
    tokenizer: Path | None = None

    def __post_init__(self) -> None:
        n, name = len(self.models), self.rule.name
        if not n:
            raise MergeError(f"{name} fuses models, and there is none beside the base")
        if len(self.weights) != n:
            raise MergeError(f"{len(self.weights)} weights for {n} models; allowed: one for each")
        if self.rule.of_changes and self.base is None:
            raise MergeError(
                f"{name} fuses what models learned since a base, and there is none; next: --base"
            )
        if self.base is not None and not (self.rule.of_changes or self.rule.base_optional):
            raise MergeError(
                f"{name} fuses models as they are, and would not look at the base {self.base}; "
                "next: leave it out, or name it among the models"
            )
        if self.dtype is not None and self.dtype not in FLOATS:
            raise MergeError(f"dtype {self.dtype}; allowed: {', '.join(FLOATS)}")
        if self.shard_bytes is not None and self.shard_bytes < 1:
            raise MergeError(f"files of {self.shard_bytes} bytes; allowed: 1 or more")
        self._check_slices()
        for said in self.cuts:
            self._check_settings(said.settings)
            for part in said.parts:
                self._check_settings(part.settings, of_a_model=True)
        self._check_settings(self.settings)
        self._check_numbers()

    def _check_slices(self) -> None:
        name, takes = self.rule.name, self.rule.models
        for number, said in enumerate(self.cuts, start=1):
            own, where = len(said.fused), f" in slice {number}" if self.is_stacked else ""
            based = len(said.parts) - own
            if takes not in (None, own) and not (based and not own):
                raise MergeError(f"{name} fuses {takes} models, received {own}{where}")
            if based != (self.base is not None):
                raise MergeError(
                    f"slice {number} has {based} ranges of layers of the base; allowed: one, in "
                    "each slice, where there is a base; next: list the base among its sources"
                )
            counts = [None if part.layers is None else len(part.layers) for part in said.parts]
            if (len(self.slices) > 1 and None in counts) or len(set(counts)) > 1:
                ranges = ", ".join("all" if count is None else str(count) for count in counts)
                raise MergeError(f"slice {number} takes {ranges} layers; allowed: as many of each")

    def _check_numbers(self) -> None:
        for spec in fields(self.rule):
            value = getattr(self.rule, spec.name)
            if isinstance(value, (int, float)) and not is_held(value):
                raise MergeError(f"{self.rule}: {spec.name} is {value}; allowed: 0, or {SIZES}")
        given = "--weights " + ",".join(f"{weight:g}" for weight in self.weights)
        if not all(map(is_held, self.weights)):
            raise MergeError(f"{given}: allowed: 0, or numbers of {SIZES}")
        if not self.slices and WEIGHT not in self.settings:
            _check_sum(self.rule, self.weights, f"{given}:")

    def _check_settings(self, settings: Settings, of_a_model: bool = False) -> None:
        known = [WEIGHT, *(spec.name for spec in fields(self.rule))]
        if of_a_model:
            known = list(names_of_models(self.rule))
        for name in settings:
            if name not in known:
                what = "for each model" if of_a_model else "as a parameter"
                raise MergeError(
                    f"{self.rule.name} has no {name!r} {what}{nearest(name, known)}; allowed: "
                    f"{', '.join(known)}"
                )

    @property
    def first(self) -> Path:
        """Whose names, types and other files are carried over."""
        return self.models[0] if self.base is None else self.base

    @property
    def is_stacked(self) -> bool:
        """Whether layers are chosen and stacked."""
        return any(part.layers is not None for said in self.slices for part in said.parts)

    @property
    def cuts(self) -> Sequence[Slice]:
        """The slices: a single one of all models, where nothing else is said."""
        if self.slices:
            return self.slices
        places: Iterable[int | None] = range(len(self.models))
        return [Slice(tuple(Part(n) for n in [*places, *([] if self.base is None else [None])]))]

    def key(self, tensor: str, model: int) -> int:
        """128 bits for what is drawn at random for one tensor of one model."""
        text = f"{self.seed}/{model}/{tensor}".encode()
        return int.from_bytes(hashlib.blake2b(text, digest_size=16).digest(), "little")

    def settle(
        self, said: Slice, tensor: str, place: float
    ) -> tuple[tuple[Rule, ...], tuple[float, ...]]:
        """The rule and the weight of each model of a slice, for one tensor.

        Args:
            tensor: its name in the model of the slice's first part.
            place: how far along the slice's layers it lies, from 0 to 1.

        Raises:
            MergeError: a parameter is not what the rule takes, or no weight is left.
        """
        own = [spec.name for spec in fields(self.rule)]
        rules: list[Rule] = []
        weights: list[float] = []
        told: list[str] = []
        for part in said.fused:
            levels = [part.settings, said.settings, self.settings]
            changes = _values(own, levels, tensor, place)
            weight = find_value(levels, WEIGHT, tensor, place)
            told += tell_values(levels, [WEIGHT], tensor, place)
            assert part.model is not None
            weights.append(float(self.weights[part.model] if weight is None else weight))
            try:
                rules.append(_build(self.rule, tuple(changes.items())))
            except PlanError as error:
                model = self.models[part.model]
                places = "; ".join(tell_values(levels, changes, tensor, place))
                begin = f"{places}, for " if places else ""
                raise MergeError(f"{begin}{tensor} of {model}: {error}") from error
        if rules:
            listed = ", ".join(f"{weight:g}" for weight in weights)
            begin = "".join(f"{each}; " for each in dict.fromkeys(told))
            _check_sum(rules[0], weights, f"{begin}the weights of {tensor} are {listed}, and")
        return tuple(rules), tuple(weights)


def names_of_models(rule: Rule) -> tuple[str, ...]:
    """The parameters that each model has its own of: what is left out of it, and how much the rest
    weighs; all, where there is one model. Others are of the whole merge."""
    names = [spec.name for spec in fields(rule)]
    if rule.models != 1:
        sifts = type(rule).sift is not Rule.sift
        names = [name for name in names if sifts and name in SIFTS]
    return (WEIGHT, *names)


def _check_sum(rule: Rule, weights: Sequence[float], begin: str) -> None:
    """Refuse weights by whose sum a rule cannot divide."""
    divides = getattr(rule, "normalize", True) and (
        isinstance(rule, SumRule) or not rule.of_changes
    )
    total = sum(weights)
    if rule.weighted and divides and not (total and is_held(total)):
        raise MergeError(
            f"{begin} {rule.name} divides by their sum, {total:g}; allowed: a sum of {SIZES}; "
            "next: other weights"
        )


def _values(
    names: Iterable[str], levels: Sequence[Settings], tensor: str, place: float
) -> dict[str, Value]:
    found = {name: find_value(levels, name, tensor, place) for name in names}
    return {name: value for name, value in found.items() if value is not None}


@lru_cache(maxsize=4096)
def _build(rule: Rule, changes: tuple[tuple[str, Value], ...]) -> Rule:
    """A rule with other arguments. Raises PlanError."""
    said: Mapping[str, Value] = {spec.name: getattr(rule, spec.name) for spec in fields(rule)}
    return build("rule", {rule.name: type(rule)}, rule.name, [], {**said, **dict(changes)})
