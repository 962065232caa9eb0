"""Reads pickles from strangers: plain data, and stand-ins for the few classes that are known.

Whatever a pickle names is looked up in a table that its reader gives; what is not there is refused,
so nothing is imported and no code of others runs. This is the way that Python's documentation shows
(pickle, "Restricting Globals"). The unpickler is the one written in Python, whose memory stays in
proportion to the file; loads no torch.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

from allfuse.base.errors import MergeError

Known = Mapping[tuple[str, str], Any]


class Record:
    """Stands for an object of a known class: what it was made of, and its state."""

    kind = ""

    def __new__(cls, *args: Any, **kwargs: Any) -> Record:
        made = object.__new__(cls)
        made.args, made.state = args, None
        return made

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args: tuple[Any, ...]
        self.state: Any

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def field(self, name: str) -> Any:
        """Raises ValueError: the object has none of this name."""
        if not isinstance(self.state, dict) or name not in self.state:
            raise ValueError(f"a {self.kind} has no {name}")
        return self.state[name]


class Ordered(dict[Any, Any]):
    """Stands for an OrderedDict; what else is said of it is left out."""

    def __setstate__(self, state: Any) -> None:
        pass


def record(kind: str) -> type[Record]:
    """A class whose objects stand for those of another one."""
    return type(kind, (Record,), {"kind": kind})


PLAIN: dict[tuple[str, str], Any] = {
    **{
        place: record(place[1])
        for place in [
            ("argparse", "Namespace"),
            ("types", "SimpleNamespace"),
            ("pathlib", "PosixPath"),
            ("pathlib", "WindowsPath"),
            ("pathlib", "PurePosixPath"),
            ("pathlib._local", "PosixPath"),
            ("pathlib._local", "WindowsPath"),
            ("datetime", "datetime"),
            ("datetime", "timedelta"),
            ("numpy", "dtype"),
            ("numpy", "ndarray"),
            ("numpy.core.multiarray", "scalar"),
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy._core.multiarray", "scalar"),
            ("numpy._core.multiarray", "_reconstruct"),
            ("collections", "Counter"),
            ("builtins", "bytearray"),
            ("_codecs", "encode"),
        ]
    },
    ("collections", "OrderedDict"): Ordered,
    ("builtins", "set"): set,
    ("builtins", "frozenset"): frozenset,
    ("builtins", "complex"): complex,
}
"""What checkpoints often hold beside tensors, and what nobody here looks at."""


class Reader(pickle._Unpickler):
    """Args: known: what names in the pickle stand for. persistent: gives what is kept elsewhere."""

    dispatch: ClassVar[dict[int, Callable[..., Any]]] = dict(pickle._Unpickler.dispatch)

    def __init__(
        self, file: BinaryIO, path: Path, known: Known, persistent: Callable[[Any], Any]
    ) -> None:
        super().__init__(file, encoding="utf-8")
        self.path, self.known, self.persistent = path, known, persistent

    def find_class(self, module: str, name: str) -> Any:
        """Raises MergeError: a name that is not known."""
        place = (module.replace("__builtin__", "builtins"), name)
        for table in (self.known, PLAIN):
            if place in table:
                return table[place]
        raise MergeError(
            f"{self.path} holds a {module}.{name}: to read it would run code, which is never done "
            "with a file; allowed: tensors, numbers and texts in dicts and lists; next: save the "
            "model's state_dict() alone, as safetensors, where its code is trusted"
        )

    def persistent_load(self, key: Any) -> Any:
        return self.persistent(key)

    def set_state(self) -> None:
        """Only what was just made has a state: what the table holds stays as it is."""
        inner: Any = self
        if not isinstance(inner.stack[-2], Record | Ordered):
            raise ValueError("a state of something that has none")
        inner.load_build()

    dispatch[pickle.BUILD[0]] = set_state


def unpickle(
    file: BinaryIO, path: Path, known: Known, persistent: Callable[[Any], Any] = lambda key: key
) -> Any:
    """The next object in a file. `path` is what errors call it.

    Raises:
        MergeError: it is damaged, or names something that is not known.
    """
    try:
        return Reader(file, path, known, persistent).load()
    except MergeError:
        raise
    except Exception as error:  # whatever damaged bytes lead to
        said = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        raise damaged(path, f"what it holds cannot be read ({said[:200]})") from error


def damaged(path: Path, why: str) -> MergeError:
    return MergeError(
        f"{path} is damaged or no PyTorch checkpoint: {why}; next: copy it again from where it is "
        "whole"
    )
