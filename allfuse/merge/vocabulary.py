"""Which token has which number, in the tokenizers beside models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from allfuse.base.errors import MergeError
from allfuse.store.durable import parse_json

Tokens = Mapping[str, int]


def read_tokens(model: Path) -> Tokens | None:
    """The number of each token, of the tokenizer in a model's folder; None: there is none that can
    be read without its library.

    Raises:
        MergeError: a file of it is damaged.
    """
    whole, parts = model / "tokenizer.json", [model / "vocab.json", model / "added_tokens.json"]
    try:
        if whole.is_file():
            return _of_one_file(parse_json(whole.read_bytes()))
        if parts[0].is_file():
            found: dict[str, int] = {}
            for part in parts:
                if part.is_file():
                    found |= _checked(parse_json(part.read_bytes()))
            return found
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise MergeError(
            f"the tokenizer of {model} cannot be read: {error}; next: copy it again"
        ) from error
    return None


def _of_one_file(said: Any) -> Tokens:
    vocabulary = said["model"]["vocab"]
    if isinstance(vocabulary, list):  # of pairs of a token and its score
        vocabulary = {token: number for number, (token, _) in enumerate(vocabulary)}
    added = {token["content"]: token["id"] for token in said.get("added_tokens", [])}
    return _checked({**vocabulary, **added})


def _checked(tokens: Any) -> dict[str, int]:
    if not all(type(number) is int for number in tokens.values()):
        raise ValueError("tokens without a number")
    return dict(tokens)


def refuse_other_tokens(models: Sequence[Path]) -> list[Path]:
    """Refuse models of which one has another token at a number than another one; those whose
    tokenizer cannot be read.

    Raises:
        MergeError: names the token.
    """
    known = {model: read_tokens(model) for model in dict.fromkeys(models)}
    read = {model: tokens for model, tokens in known.items() if tokens is not None}
    numbers: dict[int, tuple[str, Path]] = {}
    places: dict[str, tuple[int, Path]] = {}
    for model, tokens in read.items():
        for token, number in tokens.items():
            other, owner = numbers.setdefault(number, (token, model))
            place, holder = places.setdefault(token, (number, model))
            if other != token or place != number:
                said, where = (
                    (f"{other!r} is {number}", owner)
                    if other != token
                    else (f"{token!r} is {place}", holder)
                )
                raise MergeError(
                    f"tokens have other numbers: {token!r} is {number} in {model}, {said} in "
                    f"{where}; rows of tables of words are fused by their numbers; next: give all "
                    "models one tokenizer first"
                )
    return [model for model, tokens in known.items() if tokens is None]


def find_union(models: Sequence[Path]) -> Path:
    """The model whose tokenizer has the tokens of all.

    Raises:
        MergeError: there is none, or tokenizers cannot be read, or do not agree.
    """
    unread = refuse_other_tokens(models)
    if unread:
        raise MergeError(
            f"{unread[0]} has no tokenizer that can be read (tokenizer.json or vocab.json), and a "
            "union of tokenizers cannot be made; next: name the model whose tokenizer is to be kept"
        )
    known = {model: read_tokens(model) or {} for model in models}
    every = {token for tokens in known.values() for token in tokens}
    for model, tokens in known.items():
        if len(tokens) == len(every):
            return model
    raise MergeError(
        "no model has the tokens of all, and a tokenizer is carried over, not made; next: name the "
        "model whose tokenizer is to be kept, or give all models one tokenizer first"
    )
