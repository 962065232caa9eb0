"""The state of a replica from those of the ranks that share its model, and a rank's part of it.

Whatever is kept of a parameter or buffer (values, an optimizer's moments, residuals of codecs, what
sites agreed on) is cut as that is, by its name; some of it lies flat.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from typing import Any

from torch import Tensor

from allfuse.base.errors import CheckpointError
from allfuse.split.piece import Piece, join

State = dict[str, Any]
Path = tuple[Any, ...]

NOTHING_CUT: Mapping[str, Piece | None] = {}
EVERYTHING = Piece((), (), ())  # in place of the piece of what is needed whole


def join_states(states: list[State], needed: Mapping[str, Piece | None] = NOTHING_CUT) -> State:
    """The whole state of one replica, as a rank that has all of the model would have it.

    Args:
        states: of its ranks, the first first.
        needed: of parameters and buffers of which only a piece is needed, or nothing: no more than
            one of them is whole at a time, and what is not needed stays in pieces.

    Raises:
        CheckpointError: something of it is missing.
    """
    if len(states) == 1 and not states[0].get("pieces"):
        return states[0]
    whole = states[0]
    found: dict[Path, list[tuple[Piece | None, Tensor]]] = {}
    names: dict[Path, str] = {}
    for state in states:
        told = state.get("pieces", {}).items()
        pieces = {name: Piece.of(plain) for name, plain in told if plain is not None}
        for path, name, value in tied(state):
            piece = pieces.get(name)
            if piece is not None and not _fits(value, piece.own):
                piece = None
            found.setdefault(path, []).append((piece, value))
            names[path] = name
    for path, parts in found.items():
        piece = needed.get(names[path], EVERYTHING)
        if piece is None:
            continue
        try:
            value = _joined(parts)
            if piece is not EVERYTHING and _fits(value, piece.whole):
                value = piece.take(value)
            _put(whole, path, value)
        except ValueError as error:
            raise CheckpointError(
                f"the checkpoint does not hold all of {'.'.join(map(str, path))}: {error}"
            ) from None
    for kept in _fusions(whole):
        kept["kept"] = {}  # what codecs remember of pieces means nothing for the whole
    _add_the_rest(whole, states[1:])
    return {**whole, "pieces": {}}


def _add_the_rest(whole: State, others: list[State]) -> None:
    """What is of parameters that the first rank has not, and no tensor."""
    for state in others:
        trained = whole.setdefault("trained", [])
        trained += [name for name in state.get("trained", ()) if name not in trained]
        for number, kept in enumerate(state.get("optimizers", ())):
            slots = whole["optimizers"][number]["state"]
            for index, found in kept["state"].items():
                own = slots.setdefault(index, {})
                own |= {kind: value for kind, value in found.items() if kind not in own}


def _joined(parts: list[tuple[Piece | None, Tensor]]) -> Tensor:
    """Of fewer rows than ranks some have all, and others nothing."""
    whole = next((value for piece, value in parts if piece is None), None)
    if whole is not None:
        return whole
    return join([(piece, value) for piece, value in parts if piece is not None])


def cut_state(state: State, pieces: Mapping[str, Piece | None]) -> State:
    """A rank's part of a whole state, which is changed.

    Args:
        pieces: what the rank has of those that it has not whole.
    """
    for path, name, value in list(tied(state)):
        if name not in pieces:
            continue
        piece = pieces[name]
        if piece is None:
            _drop(state, path)
        elif _fits(value, piece.whole):
            _put(state, path, piece.take(value))
    for number, names in enumerate(state.get("optimized", ())):
        slots = state["optimizers"][number]["state"]
        for index in [index for index in slots if _is_elsewhere(names[int(index)], pieces)]:
            del slots[index]
    if pieces:
        for kept in _fusions(state):
            kept["kept"] = {}
    return state


def _is_elsewhere(name: str, pieces: Mapping[str, Piece | None]) -> bool:
    return name in pieces and pieces[name] is None


def tied(state: State) -> Iterator[tuple[Path, str, Tensor]]:
    """What is kept of parameters and buffers: its path in the state, and their names."""
    for model, values in state.get("models", {}).items():
        yield from _named(("models", model), values)
    for model, values in ((state.get("average") or {}).get("models", {})).items():
        yield from _named(("average", "models", model), values)
    for number, names in enumerate(state.get("optimized", ())):
        slots = state["optimizers"][number]["state"]
        for index, kept in slots.items():
            for kind, value in kept.items():
                if isinstance(value, Tensor):
                    path = ("optimizers", number, "state", index, kind)
                    yield path, names[int(index)], value
    for number, kept in enumerate(state.get("fusions", ())):
        if kept is not None:
            yield from _named(("fusions", number, "residuals"), kept["residuals"])
    rounds = state.get("rounds", {})
    for kind in ("agreed", "momentum", "residuals") if rounds.get("fusion") else ():
        yield from _named(("rounds", "fusion", kind), rounds["fusion"][kind])
    for number, departed in enumerate(rounds.get("departed", ())):
        for kind in ("values", "unsent"):
            yield from _named(("rounds", "departed", number, kind), departed[kind])


def _named(path: Path, values: Mapping[str, Any]) -> Iterator[tuple[Path, str, Tensor]]:
    for name, value in values.items():
        if isinstance(value, Tensor):
            yield (*path, name), name, value


def _fusions(state: State) -> list[dict[str, Any]]:
    found = [*state.get("fusions", ()), state.get("rounds", {}).get("fusion")]
    return [kept for kept in found if kept is not None]


def _fits(value: Tensor, shape: tuple[int, ...]) -> bool:
    """Whether a tensor has that shape, or as many numbers laid flat. Counters of steps have not."""
    flat = value.dim() == 1 and value.numel() == prod(shape)
    return tuple(value.shape) == shape or flat


def _put(state: Any, path: Path, value: Tensor) -> None:
    for key in path[:-1]:
        state = state.setdefault(key, {}) if isinstance(state, dict) else state[key]
    state[path[-1]] = value


def _drop(state: Any, path: Path) -> None:
    for key in path[:-1]:
        state = state[key]
    state.pop(path[-1], None)
