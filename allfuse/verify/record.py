"""What the reference leaves for the comparison: figures in memory, weights in a folder."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from allfuse.base.errors import NonFiniteLoss, UserError
from allfuse.base.units import format_bytes
from allfuse.store.tensorfile import read_tensors, write_tensors

LIMIT_BYTES = 4e9  # of temporary files

Figures = tuple[float, float]  # loss, norm of the gradient


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What the reference came to.

    figures: of each step and site; None where a site had no samples. seconds: of each step, all
    sites together. kept: moments whose weights are in the folder: "0" before the first step, then
    numbers of steps, and "end" after the last round. precision: "float64", or the job's own.
    """

    folder: Path
    figures: list[list[Figures | None]]
    seconds: list[float]
    kept: list[str]
    precision: str
    threads: int
    notes: list[str]

    def weights(self, moment: str, site: int) -> dict[str, Tensor]:
        return read_tensors(weights_path(self.folder, moment, site))


def weights_path(folder: Path, moment: str, site: int) -> Path:
    return folder / f"weights-{moment}-{site}.safetensors"


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """All weights and floating-point buffers by name."""
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: value.detach() for name, value in named.items() if value.is_floating_point()}


class Recorder:
    """Takes what the reference does, step by step.

    Weights of all steps are kept where they fit into `LIMIT_BYTES` (or half the free disk), else of
    every so many steps.

    Raises:
        UserError: not even the weights of three moments fit.
    """

    def __init__(self, folder: Path, steps: int) -> None:
        self.folder, self.steps = folder, steps
        self.figures: list[list[Figures | None]] = []
        self.seconds: list[float] = []
        self.kept: list[str] = []
        self.every = 0  # not known before there is a model

    def step(self, figures: list[Figures | None], seconds: float) -> None:
        self.figures.append(figures)
        for site, figure in enumerate(figures):
            if figure is not None and not math.isfinite(figure[0]):
                raise NonFiniteLoss(
                    f"the loss of the reference is {figure[0]} at site {site} after step "
                    f"{len(self.figures)}, under no plan at all; next: a smaller learning rate, "
                    "clip=1.0, or fewer --steps"
                )
        self.seconds.append(seconds)

    def keep(self, moment: str, models: Sequence[nn.Module]) -> None:
        """Write the weights of all sites, if this is one of the moments to be kept."""
        self.every = self.every or self._choose_every(models)
        if moment != "end" and int(moment) % self.every and int(moment) != self.steps:
            return
        for site, model in enumerate(models):
            write_tensors(weights_path(self.folder, moment, site), tensors_of(model), {})
        self.kept.append(moment)

    def _choose_every(self, models: Sequence[nn.Module]) -> int:
        each = sum(t.nbytes for model in models for t in tensors_of(model).values())
        limit = min(LIMIT_BYTES, shutil.disk_usage(self.folder).free / 2)
        most = int(limit // max(each, 1)) - 2  # beside those of the start and the end
        if most < 1:
            raise UserError(
                f"verify: the weights of one step take {format_bytes(each)}; allowed: "
                f"{format_bytes(limit / 3)}, as those of at least three moments are kept in "
                f"{self.folder.parent}; next: a smaller model from the same job (--set)"
            )
        return math.ceil(self.steps / most)

    @property
    def notes(self) -> list[str]:
        if self.every <= 1:
            return []
        return [
            f"weights are compared every {self.every} steps only, to keep temporary files small; "
            "loss and gradient norm at every step"
        ]
