"""allfuse, as it is typed, in this process."""

from __future__ import annotations

from typer.testing import CliRunner

from allfuse.cli.app import app


def allfuse(*arguments: str) -> str:
    """What the command prints; its error is raised."""
    result = CliRunner().invoke(app, [*arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def merge(*arguments: str) -> str:
    return allfuse("merge", *arguments)
