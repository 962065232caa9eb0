"""What stands for outputs on ranks that have not the last stage of a model."""

from __future__ import annotations

from typing import Final


class Elsewhere:
    """In place of what a model gives: another rank has it."""


ELSEWHERE: Final = Elsewhere()
