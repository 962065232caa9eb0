"""The files beside weights that say what a model is, and what a result's say instead."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from allfuse.merge.source import Source
from allfuse.store.durable import parse_json

CONFIG = "config.json"
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
ROWS = "vocab_size"
TYPES = ("torch_dtype", "dtype")
TYPE_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "spiece.model",
    "sentencepiece.bpe.model", "tekken.json", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
"""Files that together are a tokenizer, by the names that Hugging Face's transformers gives them."""


@dataclass(frozen=True)
class Changes:
    """What is another in a result than in the model whose configuration is carried over.

    Attributes:
        layers: which of that model's layers stand in the result, in order; None: all of them.
        layers_before: how many that model has.
        rows, rows_before: of tables of words; None: as many.
        dtype: of the numbers, by a name of safetensors; None: the same.
    """

    layers: Sequence[int] | None = None
    layers_before: int = 0
    rows: int | None = None
    rows_before: int = 0
    dtype: str | None = None


def adapt_config(source: Source, changes: Changes) -> tuple[bytes | None, list[str]]:
    """What a result's config.json says, None where that is what the model's says; and what of the
    changes it has no place for.

    Numbers are exchanged where they are the model's own: `num_hidden_layers` and its like, lists
    with an entry for each layer, `vocab_size`, and the type of numbers.
    """
    path = next((file for file in source.side_files() if file.name == CONFIG), None)
    if changes == Changes() or path is None:
        return None, []
    try:
        said = parse_json(path.read_bytes())
    except (OSError, ValueError):
        return None, [f"{path} cannot be read, and is carried over as it is"]
    done: set[str] = set()
    adapted = _adapt(said, changes, done)
    asked = {
        "layers": changes.layers is not None,
        ROWS: changes.rows not in (None, changes.rows_before),
    }
    notes = [
        f"{path} does not say the number of {'layers' if what == 'layers' else 'words'} "
        "where it is looked for; next: correct the copy"
        for what, needed in asked.items()
        if needed and what not in done
    ]
    if adapted == said:
        return None, notes
    return (json.dumps(adapted, indent=2) + "\n").encode(), notes


def _adapt(said: Any, changes: Changes, done: set[str]) -> Any:
    if not isinstance(said, dict):
        return said
    adapted: dict[str, Any] = {}
    for key, value in said.items():
        adapted[key] = _adapt(value, changes, done)
        if changes.layers is not None and key in LAYERS and value == changes.layers_before:
            adapted[key] = len(changes.layers)
            done.add("layers")
        elif (
            changes.layers is not None
            and "layer" in key
            and isinstance(value, list)
            and len(value) == changes.layers_before
            and max(changes.layers, default=0) < len(value)
        ):
            adapted[key] = [value[layer] for layer in changes.layers]
        elif changes.rows is not None and key == ROWS and value == changes.rows_before:
            adapted[key] = changes.rows
            done.add(ROWS)
        elif changes.dtype in TYPE_NAMES and key in TYPES and isinstance(value, str):
            adapted[key] = TYPE_NAMES[changes.dtype]
    return adapted
