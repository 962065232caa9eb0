"""What a method that learns is given: models, their data, and whom to tell."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from allfuse.base.errors import MergeError
from allfuse.base.tensors import count_rows
from allfuse.job import Job, default_forward
from allfuse.merge.loaded import batches, build, load
from allfuse.merge.source import Source
from allfuse.training.measure import to_device

Tell = Callable[..., None]
MOST_NAMED = 10


@dataclass(frozen=True, kw_only=True)
class Ingredients:
    """The models to be fused, the job of each, and how much of its data is looked at.

    Attributes:
        weights: of each model, from 0.
        base: what changes are counted from, for methods of changes.
        examples: samples of each model's data. seed: of which samples, and of what is drawn.
        device: where modules compute.
    """

    sources: tuple[Source, ...]
    jobs: tuple[Job, ...]
    weights: tuple[float, ...]
    base: Source | None = None
    examples: int = 256
    seed: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    tell: Tell = lambda name, **data: None

    @property
    def shares(self) -> list[float]:
        """The weights, of which the sum is 1."""
        return [weight / sum(self.weights) for weight in self.weights]

    @property
    def first(self) -> Source:
        """Whose names, types and other files the result has."""
        return self.base or self.sources[0]

    def model(self, number: int) -> nn.Module:
        """One of the models in a module of its own, in float32 (float64 stays), to be evaluated."""
        return self._loaded(self.jobs[number], self.sources[number])

    def start(self) -> nn.Module:
        """The base, or else the first model, as `model`; the result has its whole numbers."""
        return self._loaded(self.jobs[0], self.first)

    def _loaded(self, job: Job, source: Source) -> nn.Module:
        module = build(job)
        if all(parameter.dtype != torch.float64 for parameter in module.parameters()):
            module.float()
        load(module, source)
        for name, value in floats(module).items():
            if not bool(value.isfinite().all()):
                raise MergeError(
                    f"{source.path}: {name} has numbers that are not finite; next: take another "
                    "checkpoint"
                )
        return module.requires_grad_(False).to(self.device)

    def forward(self, number: int, module: nn.Module, batch: Any) -> Any:
        """What a module says of a batch of a model's data."""
        return (self.jobs[number].forward or default_forward)(module, batch)

    def batches(self, number: int, what: str, which: str = "train") -> Iterator[Any]:
        """Batches of a model's data on the device: `examples` samples at most.

        Raises:
            MergeError, JobError, DataError: there are none.
        """
        self.tell("learning", what=what, model=number, models=len(self.jobs), total=self.examples)
        seen = 0
        for batch in batches(self.jobs[number], which, self.examples, seed=self.seed):
            yield to_device(batch, self.device)
            rows = count_rows(batch)
            seen += rows
            self.tell("learned", count=rows)
        if not seen:
            raise MergeError(f"the {which} data of {self.sources[number].path} has no samples")

    def tell_averaged(self, solved: Iterable[str]) -> None:
        """Say which parameters of two dims and more are averaged, being none of the solved ones."""
        known = set(solved)
        left = [
            name
            for name, entry in self.sources[0].entries.items()
            if entry.is_float and len(entry.shape) > 1 and name not in known
        ]
        if left:
            more = f" and {len(left) - MOST_NAMED} more" if len(left) > MOST_NAMED else ""
            self.tell("note", text=f"averaged: {', '.join(left[:MOST_NAMED])}{more}")

    @torch.no_grad()
    def mean(self) -> dict[str, Tensor]:
        """The weighted mean of all floating-point parameters and buffers, float32, by name."""
        total: dict[str, Tensor] = {}
        for number, share in enumerate(self.shares):
            for name, value in floats(self.model(number)).items():
                total[name] = total[name].add_(value, alpha=share) if number else value * share
        return total


def floats(module: nn.Module) -> dict[str, Tensor]:
    """The floating-point parameters and buffers of a module, each under its first name.

    Buffers that its state dict leaves out are left out here, too.
    """
    kept = module.state_dict().keys()
    return {
        name: value.detach()
        for name, value in (*module.named_parameters(), *module.named_buffers())
        if name in kept and value.is_floating_point()
    }


@torch.no_grad()
def put(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Give parameters and buffers of a module these numbers, by the names of `floats`."""
    own = floats(module)
    for name, value in values.items():
        own[name].copy_(value)
