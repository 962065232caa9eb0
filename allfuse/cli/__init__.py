"""L7: the command line, one verb for each file. `allfuse --help` loads no torch."""

from __future__ import annotations

from allfuse.cli.app import main

__all__ = ["main"]
