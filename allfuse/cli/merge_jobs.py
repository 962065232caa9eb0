"""Options of `allfuse merge` for what needs the models' job: its module and its data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from allfuse.cli.options import parse_settings

if TYPE_CHECKING:
    from allfuse.job import Job

JobsOption = Annotated[
    list[Path] | None,
    typer.Option(
        "--job",
        metavar="FILE",
        help="The job of all models, or one for each (repeat it); by default that of their runs.",
    ),
]
ExamplesOption = Annotated[
    int,
    typer.Option(metavar="N", help="Samples of each model's data that methods which learn see."),
]


def read_jobs(
    models: Sequence[Path], files: list[Path] | None, settings: list[str] | None
) -> list[Job]:
    """The job of each model, from --job and --set.

    Raises:
        UserError: a model has none, or a job file cannot be used.
    """
    from allfuse.merge.loaded import find_jobs

    return find_jobs(models, files or [], parse_settings(settings))
