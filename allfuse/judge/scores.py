"""What was measured before, so that a search that was killed goes on, and none measures twice.

One file for each model and data, named after a hash of all that its figures follow from. It may be
removed at any time.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from allfuse.base.errors import MergeError
from allfuse.judge.measured import Measured
from allfuse.store.durable import explain, parse_json, partial_path

NAME = ".allfuse-scores"


class Scores:
    """A folder of what was measured.

    Args:
        folder: made when it is needed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def find(self, key: str) -> Measured | None:
        """What is known; None where nothing is, or it is damaged."""
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
            return Measured.read(parse_json((self.folder / f"{key}.json").read_bytes())["measured"])
        return None

    def add(self, key: str, about: Any, measured: Measured) -> None:
        """Keep it. `about` is for people.

        Raises:
            MergeError: it cannot be written.
        """
        path = self.folder / f"{key}.json"
        try:
            self.folder.mkdir(exist_ok=True)
            partial = partial_path(path)
            partial.write_text(json.dumps({"of": about, "measured": measured.plain()}))
            os.replace(partial, path)  # without waiting for the disk: what a crash damages is lost
        except OSError as error:
            raise MergeError(explain(error, path)) from error
