"""What `slow_link.py` trains: the character model of examples/charlm.py, and digits.

Both without a wrapper: models, batches in the order in which all take them, optimizer, and what is
measured of a model on samples that it has not seen.
"""

from __future__ import annotations

import importlib
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar

import harness
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(harness.ROOT / "examples"))
WARM_UP = 20  # steps until the learning rate is reached


class Task(ABC):
    """quick: the smallest of its kind, for a smoke run."""

    name: ClassVar[str]
    batch: ClassVar[int]
    lr: ClassVar[float]
    betas: ClassVar[tuple[float, float]]
    decay: ClassVar[float]
    unit: ClassVar[str]

    def __init__(self, quick: bool = False) -> None:
        self.quick = quick

    @abstractmethod
    def build(self) -> nn.Module: ...

    @abstractmethod
    def samples(self, steps: int, seed: int) -> Any:
        """Those of so many steps, in the order in which they are trained on."""

    @abstractmethod
    def forward(self, model: nn.Module, batch: Any) -> Tensor: ...

    @abstractmethod
    def loss(self, outputs: Tensor, batch: Any) -> tuple[Tensor, int]:
        """(sum, count)."""

    @abstractmethod
    def measure(self, model: nn.Module, rank: int, ranks: int) -> tuple[float, int]:
        """What is measured of this rank's own model, as (sum, count)."""

    def reached(self, value: float, target: float) -> bool:
        return value <= target if self.unit == "loss" else value >= target

    def model(self, seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.build()

    def optimizer(self, model: nn.Module, lr: float | None) -> tuple[torch.optim.Optimizer, Any]:
        optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=lr or self.lr,
            betas=self.betas,
            weight_decay=self.decay,
            fused=True,
        )
        warm = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: min((n + 1) / WARM_UP, 1.0))
        return optimizer, warm


class Characters(Task):
    """Predicts each next character of Python's own standard library: 1.3 M parameters. Measured is
    the loss."""

    name, batch, lr, betas, decay = "characters", 16, 1e-3, (0.9, 0.95), 0.1
    unit = "loss"
    context, held_out = 32, 128

    def __init__(self, quick: bool = False) -> None:
        super().__init__(quick)
        self.module: Any = importlib.import_module("charlm")
        self.parts = [
            self.module.windows(text, self.context)
            for text in self.module.read_standard_library(1_000_000)
        ]
        chance = torch.Generator().manual_seed(0)
        self.held = self.parts[1][torch.randperm(len(self.parts[1]), generator=chance)]
        self.held = self.held[: 4 if quick else self.held_out]

    def build(self) -> nn.Module:
        size = (1, 32) if self.quick else (2, 224)
        model: nn.Module = self.module.GPT(*size, self.context)
        return model

    def samples(self, steps: int, seed: int) -> Tensor:
        chance = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self.parts[0]), generator=chance)[: steps * self.batch]
        rows: Tensor = self.parts[0][order]
        return rows

    def forward(self, model: nn.Module, batch: Tensor) -> Tensor:
        outputs: Tensor = model(batch[:, :-1].long())
        return outputs

    def loss(self, outputs: Tensor, batch: Tensor) -> tuple[Tensor, int]:
        found: tuple[Tensor, int] = self.module.loss(outputs, batch)
        return found

    def measure(self, model: nn.Module, rank: int, ranks: int) -> tuple[float, int]:
        mine = self.held[rank::ranks]
        total, count = self.loss(self.forward(model, mine), mine)
        return float(total), count


class Digits(Task):
    """Tells scikit-learn's handwritten digits apart: 0.3 M parameters. Measured is the accuracy."""

    name, batch, lr, betas, decay = "digits", 60, 1e-3, (0.9, 0.999), 0.01
    unit = "accuracy"
    hidden = 512

    def __init__(self, quick: bool = False) -> None:
        super().__init__(quick)
        train, validation, test = importlib.import_module("digits").split()
        self.train = train
        self.held = tuple(torch.cat(pair) for pair in zip(validation, test, strict=True))

    def build(self) -> nn.Module:
        size = 16 if self.quick else self.hidden
        return nn.Sequential(
            nn.Linear(64, size), nn.ReLU(), nn.Linear(size, size), nn.ReLU(), nn.Linear(size, 10)
        )

    def samples(self, steps: int, seed: int) -> tuple[Tensor, Tensor]:
        chance = torch.Generator().manual_seed(seed)
        count = len(self.train[1])
        epochs = -(-steps * self.batch // count)
        order = torch.cat([torch.randperm(count, generator=chance) for _ in range(epochs)])
        order = order[: steps * self.batch]
        return self.train[0][order], self.train[1][order]

    def forward(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        outputs: Tensor = model(batch[0])
        return outputs

    def loss(self, outputs: Tensor, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, int]:
        return F.cross_entropy(outputs, batch[1], reduction="sum"), len(batch[1])

    def measure(self, model: nn.Module, rank: int, ranks: int) -> tuple[float, int]:
        right = model(self.held[0]).argmax(1) == self.held[1]
        return float(right.sum()), len(right)


TASKS: dict[str, type[Task]] = {"characters": Characters, "digits": Digits}


def cut(samples: Any, batch: int, rank: int, ranks: int) -> Iterator[Any]:
    """A rank's share of each batch."""
    parts = samples if isinstance(samples, tuple) else (samples,)
    for begin in range(0, len(parts[0]), batch):
        own = slice(begin + batch * rank // ranks, begin + batch * (rank + 1) // ranks)
        found = tuple(part[own] for part in parts)
        yield found if isinstance(samples, tuple) else found[0]
