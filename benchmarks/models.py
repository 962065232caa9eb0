"""The models, data and optimizers that every side of a comparison trains, and plain loops.

Shapes: B samples, T tokens, C channels, V entries of the vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Columns = tuple[Tensor, Tensor]
Make = Callable[[nn.Module], torch.optim.Optimizer]

SAMPLES = 2048
CONTEXT = 32  # T
VOCABULARY = 512  # V


class Block(nn.Module):
    """A transformer block: causal attention, then two linear layers, both on a residual stream."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention, self.norm_hidden = nn.LayerNorm(width), nn.LayerNorm(width)
        self.into, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.hidden, self.back = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, C)
        parts = self.into(self.norm_attention(x)).chunk(3, dim=-1)
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        seen = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).flatten(2))
        return x + self.back(F.gelu(self.hidden(self.norm_hidden(x))))


class SmallGpt(nn.Module):
    """A decoder of 5 blocks, 2.4 million parameters."""

    def __init__(self, width: int = 192, blocks: int = 5, heads: int = 6) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Embedding(CONTEXT, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(blocks)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:  # (B, T) -> (B, T, V)
        places = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.tokens(tokens) + self.positions(places)
        return self.head(self.norm(self.blocks(x)))


def small_mlp() -> nn.Module:
    """1.26 million parameters."""
    return nn.Sequential(
        nn.Linear(512, 800),
        nn.ReLU(),
        nn.Linear(800, 800),
        nn.ReLU(),
        nn.Linear(800, 256),
        nn.ReLU(),
        nn.Linear(256, 10),
    )


def small_cnn() -> nn.Module:
    """1.24 million parameters. Without batch statistics, which both sides fuse differently."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 64), (64, 128), (128, 256), (256, 376)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(376, 10))


def wide_cnn() -> nn.Module:
    """0.1 million parameters that do much work for each sample: bound by computing."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 48), (48, 64), (64, 96)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(96, 10))


def tiny_linear() -> nn.Module:
    """650 parameters: what is left of a step is what the loop around it costs."""
    return nn.Linear(64, 10)


def images(size: int) -> Columns:
    """Random images (B, 3, size, size) with classes."""
    chance = torch.Generator().manual_seed(0)
    pixels = torch.randn(SAMPLES, 3, size, size, generator=chance)
    return pixels, torch.randint(10, (SAMPLES,), generator=chance)


def vectors(width: int) -> Columns:
    """Random rows (B, width) with classes."""
    chance = torch.Generator().manual_seed(0)
    rows = torch.randn(SAMPLES, width, generator=chance)
    return rows, torch.randint(10, (SAMPLES,), generator=chance)


def texts() -> Columns:
    """Random tokens (B, T) with the next token of each place."""
    chance = torch.Generator().manual_seed(0)
    tokens = torch.randint(VOCABULARY, (SAMPLES, CONTEXT + 1), generator=chance)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def momentum(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-4)


def loss_of(outputs: Tensor, batch: Columns) -> Tensor:
    """Mean cross entropy over classes (B, 10) or tokens (B, T, V)."""
    return F.cross_entropy(outputs.flatten(0, -2), batch[1].flatten())


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model with its data and optimizer. `share`: samples of one worker in a step."""

    name: str
    model: Callable[[], nn.Module]
    data: Callable[[], Columns]
    optimizer: Make
    share: int


CASES = {
    case.name: case
    for case in (
        Case(name="mlp", model=small_mlp, data=lambda: vectors(512), optimizer=momentum, share=64),
        Case(name="cnn", model=small_cnn, data=lambda: images(16), optimizer=momentum, share=8),
        Case(name="gpt", model=SmallGpt, data=texts, optimizer=adamw, share=4),
        Case(
            name="tiny", model=tiny_linear, data=lambda: vectors(64), optimizer=momentum, share=32
        ),
        Case(name="wide", model=wide_cnn, data=lambda: images(32), optimizer=momentum, share=32),
    )
}


def build(case: Case) -> nn.Module:
    """The model, with the same weights wherever it is built."""
    torch.manual_seed(0)
    return case.model()


def count_parameters(case: Case) -> int:
    return sum(parameter.numel() for parameter in build(case).parameters())


class PlainLoop:
    """The loop that a person writes: the next rows, forward, backward, step.

    Args:
        forward: the model, bare or in DistributedDataParallel.
        batch: samples of a step over all workers; `index` of `parts` takes its share of them.
    """

    def __init__(
        self, forward: nn.Module, case: Case, data: Columns, batch: int, parts: int, index: int
    ) -> None:
        self.forward, self.data = forward, data
        self.optimizer = case.optimizer(forward)
        self._rows = self._shares(batch, parts, index)

    def _shares(self, batch: int, parts: int, index: int) -> Iterator[Tensor]:
        """This worker's rows of each batch, from one permutation that is computed beforehand."""
        order = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(0))
        share = batch // parts
        while True:
            for start in range(0, SAMPLES, batch):
                yield order[start + index * share : start + (index + 1) * share]

    def run(self, steps: int) -> None:
        for _ in range(steps):
            rows = next(self._rows)
            batch = (self.data[0].index_select(0, rows), self.data[1].index_select(0, rows))
            loss = loss_of(self.forward(batch[0]), batch)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()
            loss.item()


class SessionLoop:
    """The same loop through allfuse's session."""

    def __init__(self, session: object, case: Case, data: Columns, batch: int) -> None:
        from allfuse.training.session import Session

        assert isinstance(session, Session)
        self.session = session
        model = session.model(lambda: case.model())
        session.optimizer(case.optimizer(model))
        self.batches = session.batches(data, batch_size=batch)

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.session.step(next(self.batches), loss_of)

    def close(self) -> None:
        self.batches.close()


def steps_in(loop: PlainLoop, seconds: float) -> int:
    """About how many steps a loop does in so many seconds."""
    loop.run(3)
    count = 0
    begin = time.perf_counter()
    while time.perf_counter() - begin < min(seconds, 0.5):
        loop.run(1)
        count += 1
    return max(2, round(count * seconds / (time.perf_counter() - begin)))
