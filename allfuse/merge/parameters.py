"""Parameters of rules as a recipe file says them: mergekit's names, and our own."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from allfuse.base.choice import KINDS, write
from allfuse.base.errors import MergeError, nearest
from allfuse.merge.recipe import names_of_models
from allfuse.merge.settings import SIZES, WEIGHT, Setting, Value, is_held
from allfuse.rule import Rule

FIXED: dict[str, dict[str, Value]] = {
    "rescale": {
        **dict.fromkeys(("dare_linear", "dare_ties", "della", "della_linear"), True),
        **dict.fromkeys(("ties", "breadcrumbs", "breadcrumbs_ties"), False),
    },
    "normalize_weights": {"multislerp": True},
    "nuslerp_flatten": {"nuslerp": True},
    "nuslerp_row_wise": {"nuslerp": False},
    "filter_wise": {"model_stock": False},
}
"""Parameters of mergekit that can be one value alone here, by the rules that have them."""
IDLE = {"int8_mask": "saves memory in mergekit, and changes no number"}
KNOWN = (
    WEIGHT, "density", "gamma", "epsilon", "normalize", "lambda", "t", "eps", "max_iter", "tol",
    "select_topk", "scale", *FIXED, *IDLE,
)  # fmt: skip
"""All that mergekit documents."""


@dataclass
class Parameters:
    """Reads the `parameters` of a recipe file for one rule.

    Attributes:
        file: for messages. notes: what was read and has no effect.
    """

    file: str
    rule: Rule
    notes: list[str] = field(default_factory=list)

    def read(self, said: Any, where: str, of_a_model: bool = False) -> dict[str, Setting]:
        """The settings in a mapping.

        Args:
            where: the mapping stands, for messages. of_a_model: whether they are one model's.

        Raises:
            MergeError: a name is none, or a value is not what it takes.
        """
        if said is None:
            return {}
        if not isinstance(said, dict):
            raise self.refuse(where, f"takes names with values, got {shown(said)}")
        found = {}
        for name, value in said.items():
            own = self._own_name(name)
            if own is None:
                self._read_foreign(name, value, f"{where}.{name}")
            elif of_a_model and own not in names_of_models(self.rule):
                self._note(f"{name} is of the whole merge: it has no effect as one model's")
            elif own == WEIGHT and not self.rule.weighted:
                self._note(f"{name} has no effect on {self.rule.name}")
            else:
                found[own] = self._setting(value, self._kinds()[own], f"{where}.{name}")
        return found

    def refuse(self, where: str, why: str) -> MergeError:
        return MergeError(f"{self.file}: {where} {why}")

    def _kinds(self) -> dict[str, str]:
        """The kind of value of each parameter."""
        return {WEIGHT: "float", **{spec.name: str(spec.type) for spec in fields(self.rule)}}

    def _own_name(self, name: object) -> str | None:
        kinds = self._kinds()
        for each in (name, _renamed(self.rule).get(str(name))):
            if each in kinds:
                return str(each)
        return None

    def _read_foreign(self, name: object, value: Any, where: str) -> None:
        if name in IDLE:
            self._note(f"{name} {IDLE[str(name)]}")
        elif self.rule.name in FIXED.get(str(name), {}):
            only = FIXED[str(name)][self.rule.name]
            if value != only:
                raise self.refuse(
                    where, f"is {shown(value)}; {self.rule.name} allows {write(only)} alone"
                )
        elif name in KNOWN:
            self._note(f"{name} has no effect on {self.rule.name}")
        else:
            allowed = list(self._kinds())
            raise self.refuse(
                where,
                f"is no parameter of {self.rule.name}{nearest(str(name), [*allowed, *KNOWN])}; "
                f"allowed: {', '.join(allowed)}",
            )

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def _setting(self, said: Any, kind: str, where: str) -> Setting:
        cases = said if isinstance(said, list) and any(isinstance(x, dict) for x in said) else None
        if cases is None:
            return Setting(((None, self._values(said, kind, where)),), f"{self.file}: {where}")
        found = tuple(self._case(case, kind, where) for case in cases)
        return Setting(found, f"{self.file}: {where}")

    def _case(self, said: Any, kind: str, where: str) -> tuple[str | None, tuple[Value, ...]]:
        if not isinstance(said, dict) or "value" not in said or said.keys() - {"filter", "value"}:
            raise self.refuse(
                where, f"has {shown(said)}; allowed in its list: a filter and a value, or a value"
            )
        part = said.get("filter")
        if part is not None and not isinstance(part, str):
            raise self.refuse(where, f"has the filter {shown(part)}; allowed: a part of a name")
        return None if part == "*" else part, self._values(said["value"], kind, where)

    def _values(self, said: Any, kind: str, where: str) -> tuple[Value, ...]:
        many: Sequence[Any] = said if isinstance(said, list) else [said]
        values = tuple(self._value(each, kind, where) for each in many)
        if not values:
            raise self.refuse(where, "is an empty list; allowed: one number or more")
        if len(values) > 1 and kind not in ("float", "int"):
            raise self.refuse(where, f"differs by layer; allowed: one value, such as {values[0]}")
        return values

    def _value(self, said: Any, kind: str, where: str) -> Value:
        if kind == "bool" and type(said) in (int, float) and said in (0, 1):
            return bool(said)
        if isinstance(said, str) and kind in ("float", "int"):
            said = _number(said)  # YAML takes 1e-3 for text, having no point
        if kind == "int" and isinstance(said, float) and said.is_integer():
            said = int(said)
        word, types = KINDS.get(kind, ("a number", (int, float)))
        right = isinstance(said, types) and isinstance(said, bool) == (kind == "bool")
        if not right or (isinstance(said, float) and not math.isfinite(said)):
            raise self.refuse(where, f"is {shown(said)}; allowed: {word}")
        if not isinstance(said, str) and not is_held(said):
            raise self.refuse(where, f"is {shown(said)}; allowed: 0, or numbers of {SIZES}")
        value: Value = said
        return value


def _renamed(rule: Rule) -> dict[str, str]:
    """What mergekit calls otherwise than the rule."""
    return {
        "max_iter": "steps",
        **({"lambda": "scale"} if rule.of_changes else {}),
        **({"select_topk": "density"} if rule.name == "sce" else {}),
    }


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def shown(said: object) -> str:
    """A value from a file, in few characters."""
    text = reprlib.repr(said)
    return text if len(text) <= 80 else text[:77] + "..."
