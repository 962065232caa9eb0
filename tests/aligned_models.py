"""Modules whose units can be permuted, of many kinds, and inputs for them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Residual(nn.Module):
    """Convolutions with BatchNorm and a shortcut, as in a ResNet."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(12)
        self.one = nn.Conv2d(12, 10, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(10)
        self.two = nn.Conv2d(10, 12, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(12)
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)), inplace=True)
        y = F.relu(self.norm1(self.one(F.max_pool2d(x, 2))))
        y = self.norm2(self.two(F.interpolate(y, scale_factor=2)))
        return self.head(F.adaptive_avg_pool2d(F.relu(x + y), 1).flatten(1))


class Attention(nn.Module):
    """A transformer block before its norm, with query, key and value apart, on tied words."""

    def __init__(self, heads: int = 3) -> None:
        super().__init__()
        self.heads = heads
        self.words = nn.Embedding(11, 12)
        self.places = nn.Parameter(torch.randn(6, 12))
        self.norm1, self.norm2 = nn.LayerNorm(12), nn.LayerNorm(12)
        self.query, self.key, self.value = (nn.Linear(12, 12) for _ in range(3))
        self.join = nn.Linear(12, 12)
        self.wide, self.narrow = nn.Linear(12, 20), nn.Linear(20, 12)
        self.head = nn.Linear(12, 11, bias=False)
        self.head.weight = self.words.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.words(tokens) + self.places[: tokens.shape[1]]
        y = self.norm1(x)
        q, k, v = (each(y).unflatten(-1, (self.heads, -1)).transpose(1, 2)
                   for each in (self.query, self.key, self.value))  # fmt: skip
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.join(y.transpose(1, 2).flatten(2))
        x = x + self.narrow(F.gelu(self.wide(self.norm2(x))))
        out: Tensor = self.head(x)
        return out


class Encoder(nn.Module):
    """torch's own transformer layer, with its weight of query, key and value in one."""

    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Linear(5, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
        self.out = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(self.layer(self.into(x)).mean(1))
        return out


class Recurrent(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.cells = getattr(nn, kind)(5, 9, num_layers=2, batch_first=True)
        self.out = nn.Linear(9, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(self.cells(x)[0][:, -1])
        return out


class Dense(nn.Module):
    """Layers that see all before them, laid end to end, as in a DenseNet, flattened at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(2, 6, 3, padding=1)
        self.two = nn.Conv2d(8, 5, 3, padding=1)
        self.norm = nn.BatchNorm2d(13)
        self.out = nn.Linear(13 * 4 * 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([x, self.one(x).tanh()], 1)
        x = torch.cat([x, self.two(x).tanh()], 1)
        out: Tensor = self.out(self.norm(x).flatten(1))
        return out


class Gated(nn.Module):
    """A gated unit: two halves of one layer that go with each other, with weight norm."""

    def __init__(self) -> None:
        super().__init__()
        self.into = nn.utils.parametrizations.weight_norm(nn.Linear(4, 14))
        self.out = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(F.glu(self.into(x)))
        return out


def grouped() -> nn.Module:
    """Depthwise and grouped convolutions, and GroupNorm."""
    return nn.Sequential(
        nn.Conv2d(2, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.ReLU6(),
        nn.Conv2d(8, 12, 1, groups=4), nn.GroupNorm(2, 12), nn.SiLU(),
        nn.ConvTranspose2d(12, 6, 2, stride=2), nn.LeakyReLU(), nn.AvgPool2d(2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3),
    )  # fmt: skip


def perceptron(width: int = 16) -> nn.Module:
    return nn.Sequential(
        nn.Linear(5, width), nn.ReLU(), nn.Linear(width, width + 2), nn.BatchNorm1d(width + 2),
        nn.Tanh(), nn.Dropout(0.5), nn.Linear(width + 2, 3),
    )  # fmt: skip


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(7))


MODELS = {
    "perceptron": (perceptron, numbers(4, 5), [16, 18]),
    "residual": (Residual, numbers(4, 3, 8, 8), [12, 10]),
    # words; heads, numbers of query and key in a head, of value; hidden units
    "attention": (Attention, numbers(4, 6).abs().mul(4).long() % 11, [3, 4, 4, 12, 20]),
    "encoder": (Encoder, numbers(4, 6, 5), [2, 4, 8, 16]),
    "lstm": (lambda: Recurrent("LSTM"), numbers(4, 6, 5), [9, 9]),
    "gru": (lambda: Recurrent("GRU"), numbers(4, 6, 5), [9, 9]),
    "dense": (Dense, numbers(4, 2, 4, 4), [6, 5]),
    "gated": (Gated, numbers(4, 4), [7]),
    # depthwise channels are the four groups of two of the next layer, whose three channels each
    # are two groups of a norm with six
    "grouped": (grouped, numbers(4, 2, 6, 6), [2, 2, 2, 3, 6]),
}
"""How a module is built, a batch, and the sizes of its groups in ascending order or not."""


def build(name: str, seed: int = 0) -> nn.Module:
    """A module in evaluation mode, whose norms have numbers of their own."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module: nn.Module = MODELS[name][0]()  # type: ignore[operator]
        for each in module.modules():
            if isinstance(each, nn.BatchNorm1d | nn.BatchNorm2d | nn.LayerNorm | nn.GroupNorm):
                nn.init.uniform_(each.weight, 0.5, 1.5)
                nn.init.normal_(each.bias)
            if isinstance(each, nn.BatchNorm1d | nn.BatchNorm2d):
                assert each.running_var is not None
                assert each.running_mean is not None
                each.running_var.uniform_(0.5, 1.5)
                each.running_mean.normal_()
    return module.eval()
