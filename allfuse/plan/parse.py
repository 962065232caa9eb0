"""The text form of a plan: a Python expression that is read with `ast` and never evaluated.

Text becomes calls, a name with arguments; what a name means is looked up later, in the table of
its place (axes at the top, topologies after `topology=`, and so on).
"""

from __future__ import annotations

import ast
import math
import re
import threading
from dataclasses import dataclass, field

from allfuse.base.choice import write
from allfuse.base.errors import PlanError

MAX_CHARACTERS = 10_000
MAX_DEPTH = 16  # brackets inside brackets; the deepest plan of the documentation has 2
MAX_INTEGER = 10**18  # Python refuses to print whole numbers beyond some thousand digits

DIGIT_FIRST = re.compile(r"""(?<![\w.'"])(1f1b)(?![\w.'"])""")
"""A name that Python would take for a broken number where no quotes stand around it."""

TRUTH = {"true": True, "false": False}  # beside True and False, as YAML has them

EXAMPLE = "data(4)"
EXAMPLES = {"plan": EXAMPLE, "rule": "ties(density=0.2)"}
ALLOWED = "is read, never evaluated: it holds names, calls, numbers, quoted text and *"


@dataclass(frozen=True, repr=False)
class Call:
    """A name with arguments, not yet looked up. A bare name is a call without arguments."""

    name: str
    args: list[object] = field(default_factory=list)
    kwargs: dict[str, object] = field(default_factory=dict)

    def __repr__(self) -> str:
        """The text that says it."""
        parts = [write(value) for value in self.args]
        parts += [f"{key}={write(value)}" for key, value in self.kwargs.items()]
        return f"{self.name}({', '.join(parts)})" if parts else self.name


# Python 3.11 fails now and then ("AST constructor recursion depth mismatch") where threads parse at
# the same time, as ranks that are threads do.
_parsing = threading.Lock()


def read_product(text: str) -> list[Call]:
    """The factors of `a(...) * b(...)`, left to right.

    Raises:
        PlanError: the text is not a product of calls.
    """
    return Reader(text).factors()


def read_call(text: str, kind: str = "plan") -> Call:
    """The one call that a text holds: `ring`, `topk(0.01)`.

    Args:
        kind: what errors call it, such as "rule".

    Raises:
        PlanError: the text is not one call.
    """
    reader = Reader(text, kind)
    return reader.call(reader.body)


def clip(text: str, characters: int = 80) -> str:
    """Text on one line of bounded length, for messages."""
    line = " ".join(text.encode(errors="backslashreplace").decode().split())
    return line if len(line) <= characters else line[: characters - 3] + "..."


def check_number(value: float) -> None:
    """Refuse numbers that no argument can mean and that cannot be written back."""
    if isinstance(value, int) and abs(value) > MAX_INTEGER:
        raise PlanError(clip(hex(value)), "the number is too large", f"at most {MAX_INTEGER}")
    if not math.isfinite(value):
        raise PlanError(str(value), "the number is not finite", "a finite number")


class Reader:
    """Walks the syntax tree of one text and admits only what a plan may hold."""

    def __init__(self, text: str, kind: str = "plan") -> None:
        self.example, self.allowed = EXAMPLES[kind], f"a {kind} {ALLOWED}"
        if len(text) > MAX_CHARACTERS:
            raise PlanError(
                clip(text),
                f"has {len(text):,} characters, at most {MAX_CHARACTERS:,}",
                self.example,
            )
        lines = " ".join(text.splitlines()).strip()  # lines, as YAML folds them, mean nothing
        self.text = DIGIT_FIRST.sub(r"'\1'", lines)
        if not self.text:
            why = "a plan names at least one axis" if kind == "plan" else f"a {kind} has a name"
            raise PlanError("an empty text", why, "data(1)" if kind == "plan" else self.example)
        self.check_depth()
        try:
            with _parsing:
                self.body = ast.parse(self.text, mode="eval").body
        except SyntaxError as error:
            why = f"is not a {kind}: {error.msg}"
            raise PlanError(clip(text), why, self.repaired()) from None
        except (ValueError, RecursionError, MemoryError):  # not text, or chains of operators
            why = f"is not a {kind}: it cannot be read"
            raise PlanError(clip(text), why, self.example) from None

    def repaired(self) -> str:
        """The text with the brackets closed that it left open, if that makes it an expression."""
        closed = self.text + ")" * (self.text.count("(") - self.text.count(")"))
        try:
            with _parsing:
                ast.parse(closed, mode="eval")
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return self.example
        return clip(closed)

    def check_depth(self) -> None:
        """Refuse deep nesting before the parser sees it, which would use up its stack."""
        depth = 0
        for character in self.text:
            depth += (character in "([{") - (character in ")]}")
            if depth > MAX_DEPTH:
                raise PlanError(
                    clip(self.text), f"is nested more than {MAX_DEPTH} levels deep", self.example
                )

    def factors(self) -> list[Call]:
        """The operands of `*`, left to right. A loop, so that long chains use no stack."""
        pending, found = [self.body], []
        while pending:
            node = pending.pop()
            if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
                pending += [node.right, node.left]
            else:
                found.append(self.factor(node))
        return found

    def factor(self, node: ast.expr) -> Call:
        """A call where an axis stands, with better advice than `call` has."""
        if isinstance(node, ast.Constant) and type(node.value) is int:
            raise self.refusal(node, "is a number, not an axis", f"data({self.source(node)})")
        if isinstance(node, ast.BinOp):
            sides = [self.source(side) for side in (node.left, node.right)]
            simple = isinstance(node.left, ast.Call) and isinstance(node.right, ast.Call)
            nearest = " * ".join(sides) if simple else EXAMPLE
            raise self.refusal(node, "axes are joined by * only", nearest)
        return self.call(node)

    def call(self, node: ast.expr) -> Call:
        if isinstance(node, ast.Name):
            return Call(node.id)
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
            raise self.refusal(node)
        kwargs: dict[str, object] = {}
        for item in node.keywords:
            if item.arg is None:  # **mapping
                raise self.refusal(node)
            if item.arg in kwargs:
                raise self.refusal(node, f"has {item.arg!r} twice")
            kwargs[item.arg] = self.value(item.value)
        return Call(node.func.id, [self.value(item) for item in node.args], kwargs)

    def value(self, node: ast.expr) -> object:
        """What an argument holds: a number, a truth value, text or a call. Other names are text."""
        if isinstance(node, ast.Name):
            return TRUTH.get(node.id, node.id)
        if isinstance(node, ast.Call):
            return self.call(node)
        negative = isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub)
        constant = node.operand if isinstance(node, ast.UnaryOp) and negative else node
        if not isinstance(constant, ast.Constant):
            raise self.refusal(node)
        value = constant.value
        if isinstance(value, bool | str) and not negative:
            return value
        if isinstance(value, int | float) and not isinstance(value, bool):
            check_number(value)
            return -value if negative else value
        raise self.refusal(node, nearest="auto" if value is None else self.example)

    def source(self, node: ast.AST) -> str:
        return ast.get_source_segment(self.text, node) or self.text

    def refusal(self, node: ast.expr, why: str = "", nearest: str = "") -> PlanError:
        """Says why this part cannot stand in a plan, and what could stand there."""
        given, nearest = clip(self.source(node)), clip(nearest or self.example)
        return PlanError(given, why or self.allowed, nearest)
