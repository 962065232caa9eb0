"""What a model's outputs say of rows, as columns of text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from allfuse.base.errors import JobError

Columns = dict[str, list[str]]

QUOTE = '"'
SPECIAL = re.compile(r'[",\r\n]')


class BadOutput(Exception):
    """The outputs of a row hold NaN or infinity. `index` counts the rows of the batch from 0."""

    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.index = index


def answer(outputs: Any, rows: int, classes: Sequence[str] | None) -> Columns:
    """The columns that the outputs for a batch give.

    With classes: `prediction` is the name of the class with the largest output and `confidence` its
    softmax probability, to 6 digits. Without: the values, in `prediction`, or in `prediction_0`,
    `prediction_1`, ... where there are several for each row; as many digits as tell them apart.

    Args:
        outputs: a tensor (rows,) or (rows, values), or an object with such a tensor as `.logits`.

    Raises:
        JobError: outputs of another kind or shape.
        BadOutput: NaN or infinity, in the first such row.
    """
    logits = getattr(outputs, "logits", outputs)
    if not isinstance(logits, Tensor):
        raise JobError(
            f"the model gives a {type(logits).__name__}; allowed for prediction: a tensor, or an "
            "object with .logits; next: pick it in Job(forward=...)"
        )
    shape = tuple(logits.shape)
    if logits.dim() not in (1, 2) or shape[0] != rows or not logits.numel():
        raise JobError(
            f"the model gives a tensor {shape} for {rows} rows; allowed for prediction: ({rows},) "
            f"or ({rows}, values)"
        )
    values = logits.detach().reshape(rows, -1).cpu()
    if values.dtype == torch.bfloat16:
        values = values.float()  # NumPy has no bfloat16
    return _values(values) if classes is None else _classes(values, classes)


def _classes(values: Tensor, classes: Sequence[str]) -> Columns:
    if values.shape[1] != len(classes):
        raise JobError(
            f"the model gives {values.shape[1]} values for each row and the job names "
            f"{len(classes)} classes; allowed: {len(classes)} values, one for each class"
        )
    confidences, indices = values.float().softmax(dim=1).max(dim=1)
    refuse_non_finite(confidences)
    names = [str(name) for name in classes]
    return {
        "prediction": [names[index] for index in indices.tolist()],
        "confidence": [f"{value:.6g}" for value in confidences.tolist()],
    }


def _values(values: Tensor) -> Columns:
    refuse_non_finite(values)
    count = values.shape[1]
    names = ["prediction"] if count == 1 else [f"prediction_{index}" for index in range(count)]
    return {
        name: [str(value) for value in column]  # NumPy's numbers print no digit too many
        for name, column in zip(names, values.numpy().T, strict=True)
    }


def refuse_non_finite(values: Tensor) -> None:
    bad = ~values.isfinite().reshape(values.shape[0], -1).all(dim=1)
    if bad.any():
        raise BadOutput(int(bad.int().argmax()))


def format_rows(columns: Sequence[Sequence[str]]) -> bytes:
    """Rows of columns as CSV text in UTF-8; quotes stand where they must."""
    quoted = [
        [quote(text) for text in column] if SPECIAL.search(" ".join(column)) else column
        for column in columns
    ]
    return "".join(f"{','.join(row)}\n" for row in zip(*quoted, strict=True)).encode()


def quote(text: str) -> str:
    """A field of CSV. Python's csv module leaves a lone carriage return bare, up to 3.12 at least.

    >>> quote("a,b"), quote("plain")
    ('"a,b"', 'plain')
    """
    return f'"{text.replace(QUOTE, QUOTE + QUOTE)}"' if SPECIAL.search(text) else text
