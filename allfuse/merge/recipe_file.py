"""A recipe in a file: mergekit's YAML as it is, and what is only ours in the same form.

Its form is documented at https://github.com/arcee-ai/mergekit#merge-configuration.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from allfuse.base.choice import build
from allfuse.base.errors import MergeError, PlanError, nearest
from allfuse.base.units import parse_bytes
from allfuse.merge import OF_DATA
from allfuse.merge.header import FLOATS
from allfuse.merge.parameters import KNOWN, Parameters, shown
from allfuse.merge.recipe import Part, Recipe, Slice
from allfuse.merge.settings import Settings
from allfuse.merge.vocabulary import find_union, refuse_other_tokens
from allfuse.merge.yaml_file import load_yaml
from allfuse.plan.parse import read_call
from allfuse.rule import METHODS, Rule

SUFFIXES = (".yml", ".yaml")
MOST_LAYERS = 1_000_000
TYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16",
    **{name: name for name in FLOATS},
}  # fmt: skip
OURS: dict[str, tuple[str, type]] = {
    "seed": ("seed", int),
    "allow_nan": ("allow_nan", bool),
    "pad_vocabulary": ("pad_vocabulary", bool),
    "shard_size": ("shard_bytes", str),
}
"""Keys that mergekit does not have: which field of a recipe they are, and what they take."""
KEYS = (
    "merge_method", "models", "slices", "base_model", "parameters", "dtype", "out_dtype",
    "tokenizer_source", "tokenizer", *OURS,
)  # fmt: skip
REFUSED = {
    "modules": "parts of a model are not merged each on its own; next: a file for each",
    "input_model_parameters": "next: say them as parameters of each model",
    "chat_template": "a template is carried over with its tokenizer, not changed; next: leave it "
    "out, and change tokenizer_config.json of the result",
    "name": "the stages of mergekit-multi are not chained; next: a file for each, and its result "
    "among the models of the next one",
}
"""Keys of mergekit that are not done, and what to do."""


@dataclass(frozen=True)
class Said:
    """A recipe and what whoever wrote it should know."""

    recipe: Recipe
    notes: tuple[str, ...]


def is_recipe(path: Path) -> bool:
    """Whether a path names a recipe's file, not a model."""
    return path.suffix in SUFFIXES and not path.is_dir()


def read_recipe(path: Path, **ours: Any) -> Said:
    """The recipe in a file.

    Args:
        ours: fields of `Recipe` that count before what the file says, where they are not None.

    Raises:
        MergeError: it cannot be read, or says what cannot be done, with the place of it.
    """
    said = load_yaml(path)
    if not isinstance(said, dict):
        raise MergeError(f"{path}: allowed: keys with values, got {shown(said)}")
    return _File(path, said).read({name: own for name, own in ours.items() if own is not None})


@dataclass(frozen=True)
class Taken:
    """What a slice takes of a model: layers, or None for all of it."""

    model: Path
    layers: range | None
    settings: Settings


Piece = tuple[list[Taken], Settings]


class _File:
    """One file, while it is read."""

    def __init__(self, path: Path, said: Mapping[Any, Any]) -> None:
        self.path, self.said = path, said
        for key in said:
            if key in REFUSED:
                raise self.refuse(str(key), f"is not done here: {REFUSED[key]}")
        self.check_keys(said, KEYS, "")
        self.rule = self.read_rule()
        self.parameters = Parameters(str(path), self.rule)

    def refuse(self, where: str, why: str) -> MergeError:
        return MergeError(f"{self.path}: {where} {why}")

    def check_keys(self, said: Any, allowed: Sequence[str], where: str) -> None:
        if not isinstance(said, dict):
            raise self.refuse(where, f"takes keys with values, got {shown(said)}")
        for key in said:
            if key not in allowed:
                hint = nearest(str(key), allowed)
                if key in KNOWN:
                    hint = " but a parameter: it belongs under parameters"
                raise self.refuse(
                    f"{where}.{key}" if where else str(key),
                    f"is no key of a recipe{hint}; allowed: {', '.join(allowed)}",
                )

    def read_rule(self) -> Rule:
        text = self.said.get("merge_method")
        if not isinstance(text, str):
            raise self.refuse("merge_method", f"is {shown(text)}; allowed: {', '.join(METHODS)}")
        try:
            return read_rule(text)
        except PlanError as error:
            raise self.refuse("merge_method:", str(error)) from error

    def read(self, ours: dict[str, Any]) -> Said:
        said, rule = self.said, self.rule
        if ("models" in said) == ("slices" in said):
            raise self.refuse("models, slices:", "allowed: one of them")
        named = self.model(said["base_model"], "base_model") if said.get("base_model") else None
        base = named if rule.of_changes or rule.base_optional else None
        pieces = self.read_slices() if "slices" in said else [self.read_models(named, base)]
        if named is not None and rule.models == 2 and base is None:  # it is the first of the two
            pieces = [(sorted(own, key=lambda t: t.model != named), s) for own, s in pieces]
        models = list(dict.fromkeys(t.model for own, _ in pieces for t in own if t.model != base))
        if named in models:
            models.sort(key=lambda model: model != named)
        elif named is not None and base is None:
            self.parameters.notes.append(f"base_model has no effect on {rule.name} here")
        for key, (name, _) in OURS.items():
            if key in said:
                ours.setdefault(name, self.own(key))
        ours.setdefault("dtype", self.read_dtype())
        ours.setdefault("tokenizer", self.read_tokenizer(named, models))
        ours.setdefault("pad_vocabulary", self.tokenizer_source() == "union")
        settings = self.parameters.read(said.get("parameters"), "parameters")
        recipe = Recipe(
            models=models, rule=rule, weights=[1.0] * len(models), base=base,
            slices=_slices(pieces, models), settings=settings, **ours,
        )  # fmt: skip
        return Said(recipe, tuple(self.parameters.notes))

    def own(self, key: str) -> Any:
        """The value of a key that is only ours."""
        value, kind = self.said[key], OURS[key][1]
        if type(value) is not kind:
            word = {int: "a whole number", bool: "true or false", str: "a size such as 2GB"}[kind]
            raise self.refuse(key, f"is {shown(value)}; allowed: {word}")
        try:
            return parse_bytes(str(value)) if kind is str else value
        except ValueError as error:
            raise self.refuse(key, f"is {error}") from error

    def read_models(self, named: Path | None, base: Path | None) -> Piece:
        """One slice of all models. The base is one of them, but for a rule that takes one alone."""
        taken = self.taken(self.said["models"], "models", ("model", "parameters"))
        listed = named in [each.model for each in taken]
        if named is not None and self.rule.models != 1 and not listed:
            taken.append(Taken(named, None, {}))
            if base is None and self.rule.models is None:
                self.parameters.notes.append(
                    f"{self.rule.name} has no base: {named} is fused like the other models"
                )
        return taken, {}

    def read_slices(self) -> list[Piece]:
        pieces: list[Piece] = []
        for number, said in enumerate(self.items(self.said["slices"], "slices")):
            where = f"slices[{number}]"
            self.check_keys(said, ("sources", "parameters"), where)
            allowed = ("model", "layer_range", "parameters")
            taken = self.taken(said.get("sources"), f"{where}.sources", allowed)
            settings = self.parameters.read(said.get("parameters"), f"{where}.parameters")
            pieces.append((taken, settings))
        return pieces

    def taken(self, said: Any, where: str, allowed: Sequence[str]) -> list[Taken]:
        """What is taken of each model in a list."""
        found = []
        for number, each in enumerate(self.items(said, where)):
            place = f"{where}[{number}]"
            self.check_keys(each, allowed, place)
            layers = self.layers(each, place) if "layer_range" in allowed else None
            parameters = each.get("parameters")
            settings = self.parameters.read(parameters, f"{place}.parameters", of_a_model=True)
            found.append(Taken(self.model(each.get("model"), f"{place}.model"), layers, settings))
        return found

    def items(self, said: Any, where: str) -> list[Any]:
        if not isinstance(said, list) or not said:
            raise self.refuse(where, f"is {shown(said)}; allowed: a list of one or more")
        return said

    def layers(self, said: Mapping[str, Any], where: str) -> range:
        found = said.get("layer_range")
        if (
            not isinstance(found, list)
            or len(found) != 2
            or not all(type(number) is int for number in found)
            or not 0 <= found[0] <= found[1] <= MOST_LAYERS
        ):
            raise self.refuse(
                f"{where}.layer_range",
                f"is {shown(found)}; allowed: the first layer and the one after the last, such as "
                "[0, 16]",
            )
        return range(*found)

    def model(self, said: Any, where: str) -> Path:
        """Where a model is: from here, or from the file's own folder."""
        if not isinstance(said, str) or not said:
            raise self.refuse(where, f"is {shown(said)}; allowed: a file or folder")
        for folder in (Path(), self.path.parent):
            if all((folder / part).exists() for part in said.split("+")):
                return Path("+".join(str(folder / part) for part in said.split("+")))
            if (folder / said).exists():
                return folder / said
        raise self.refuse(
            where,
            f"is {said!r}, which is no file or folder here; next: download it, models are read "
            "from the disk",
        )

    def read_dtype(self) -> str | None:
        """That of what is written; all arithmetic is in float32."""
        for key in ("out_dtype", "dtype"):
            name = self.said.get(key)
            if name is None or name == "auto":
                continue
            if not isinstance(name, str) or name not in TYPES:
                hint = nearest(shown(name), TYPES)
                raise self.refuse(key, f"is {shown(name)}{hint}; allowed: {', '.join(TYPES)}")
            return TYPES[name]
        return None

    def tokenizer_source(self) -> Any:
        """What is said of whose tokenizer it is, in either of two forms; None: nothing."""
        if "tokenizer" not in self.said:
            return self.said.get("tokenizer_source")
        full = self.said["tokenizer"]
        if self.said.get("tokenizer_source") is not None:
            raise self.refuse("tokenizer_source", "and tokenizer say the same; allowed: one")
        self.check_keys(full, ("source", "tokens", "pad_to_multiple_of"), "tokenizer")
        for key in ("tokens", "pad_to_multiple_of"):
            if full.get(key):
                raise self.refuse(
                    f"tokenizer.{key}", "is not done here: tables are fused row by row as they are"
                )
        return full.get("source", "union")

    def read_tokenizer(self, named: Path | None, models: Sequence[Path]) -> Path | None:
        """The model whose tokenizer is carried over."""
        said, where = self.tokenizer_source(), "tokenizer_source"
        if said is None:
            return None
        if not isinstance(said, str):
            raise self.refuse(where, f"is {shown(said)}; allowed: base, union, or a model")
        every = list(dict.fromkeys([*([] if named is None else [named]), *models]))
        if said == "union":
            return find_union(every)
        chosen = every[0]
        if said != "base":
            chosen = self.model(said.removeprefix("model:"), where)
        for model in refuse_other_tokens(list(dict.fromkeys([*every, chosen]))):
            self.parameters.notes.append(f"the tokenizer of {model} could not be compared")
        return chosen


def _slices(pieces: Sequence[Piece], models: Sequence[Path]) -> list[Slice]:
    """Slices with each model's place among the models; what is not among them is the base."""
    return [
        Slice(
            tuple(
                Part(models.index(each.model), each.layers, each.settings)
                if each.model in models
                else Part(None, each.layers)
                for each in taken
            ),
            settings,
        )
        for taken, settings in pieces
    ]


def read_rule(text: str) -> Rule:
    """The rule that a text says, such as "ties(density=0.2)". Raises PlanError."""
    name = text.partition("(")[0].strip()
    if name in OF_DATA:
        raise PlanError(
            f"rule {name}",
            "it looks at data, and neither a recipe nor a search does",
            f'allfuse merge MODEL MODEL --rule "{text.strip()}" --job job.py --out FOLDER',
        )
    call = read_call(text, "rule")
    return build("rule", METHODS, call.name, call.args, call.kwargs)
