"""Models to cut, and a comparison of slices with the whole."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from allfuse.launcher.base import current_world
from allfuse.launcher.thread import first_failure, launch_threads
from allfuse.split.record import record
from allfuse.split.tensor.attention import unfold_attention
from allfuse.split.tensor.late import Late
from allfuse.split.tensor.search import TensorPlan, find_cuts
from allfuse.split.tensor.slicing import slice_model
from allfuse.split.tensor.traffic import Slice


class Residual(nn.Module):
    def __init__(self, *inner: nn.Module) -> None:
        super().__init__()
        self.inner = nn.Sequential(*inner)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.inner(x)
        return result


class GatedUnit(nn.Module):
    """Both halves in one weight, as in SwiGLU."""

    def __init__(self, width: int = 12, hidden: int = 16) -> None:
        super().__init__()
        self.both, self.down = nn.Linear(width, 2 * hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        up, gate = self.both(x).chunk(2, -1)
        result: Tensor = self.down(F.silu(gate) * up)
        return result


class GroupedAttention(nn.Module):
    """Packed queries, keys and values; fewer heads for keys; numbers of heads in the code."""

    def __init__(self, width: int = 16, heads: int = 4, groups: int = 2) -> None:
        super().__init__()
        self.heads, self.groups, self.size = heads, groups, width // heads
        self.parts = [width, groups * self.size, groups * self.size]
        self.qkv, self.out = nn.Linear(width, sum(self.parts)), nn.Linear(width, width)
        self.scale = nn.Parameter(torch.ones(self.size))  # of each head alike

    def forward(self, x: Tensor) -> Tensor:  # B S W
        batch, length, width = x.shape
        q, k, v = self.qkv(x).split(self.parts, -1)
        q = q.view(batch, length, self.heads, self.size).transpose(1, 2) * self.scale
        k = k.view(batch, length, self.groups, self.size).transpose(1, 2)
        v = v.view(batch, length, self.groups, self.size).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        result: Tensor = self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return result


class Unpacked(nn.Module):
    """Queries, keys and values packed into one weight and taken apart by a dim of their own."""

    def __init__(self, width: int = 16, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:  # B S W
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v)
        result: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return result


class PlainWeights(nn.Module):
    """Weights that are in no layer of torch's."""

    def __init__(self, width: int = 12, hidden: int = 8) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.empty(width, hidden))
        self.shift = nn.Parameter(torch.empty(hidden))
        self.down = nn.Parameter(torch.empty(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.up + self.shift) @ self.down


class TiedWords(nn.Module):
    def __init__(self, words: int = 24, width: int = 8) -> None:
        super().__init__()
        self.table, self.unit = nn.Embedding(words, width, padding_idx=5), GatedUnit(width)
        self.head = nn.Linear(width, words, bias=False)
        self.head.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.unit(self.table(x)))
        return result


class CrossAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        mixed, _ = self.attention(x[:, :3], x, x, need_weights=False)
        result: Tensor = mixed
        return result


class Careless(nn.Module):
    """Asks for the weights of attention and does not use them, as most do."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4)
        self.padding: Tensor
        self.register_buffer("padding", torch.tensor([[False, False, True]] * 5))

    def forward(self, x: Tensor) -> Tensor:
        mixed, _ = self.attention(x, x, x, key_padding_mask=self.padding)
        result: Tensor = mixed
        return result


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 12, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(12, 4, 1),
        nn.Flatten(),
        nn.Linear(4 * 4 * 4, 4),
    )


@dataclass(frozen=True)
class Case:
    """A model, what it takes, how many slices, and weights that must be cut."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    cut: tuple[str, ...]
    n: int = 2
    words: int = 0

    def batch(self) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        if self.words:
            return torch.randint(self.words, self.shape, generator=generator)
        return torch.randn(self.shape, generator=generator, dtype=torch.float64)

    def model(self) -> nn.Module:
        model = self.build().double()
        generator = torch.Generator().manual_seed(2)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.4, generator=generator)
        return model


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 16),
        nn.ReLU(),
        nn.Linear(16, 12),
        nn.GELU(),
        nn.Linear(12, 16),
        nn.Linear(16, 2),
    )


def encoder(dropout: float = 0.0) -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=dropout, batch_first=True)
    return nn.TransformerEncoder(layer, 2)


CASES = {
    "mlp": Case(mlp, (5, 6), ("0.weight", "0.bias", "2.weight", "4.weight", "5.weight")),
    "mlp in 4": Case(mlp, (5, 6), ("0.weight", "2.weight"), n=4),
    "convolutions": Case(
        convolutions,
        (5, 3, 8, 8),
        ("0.weight", "1.weight", "1.running_mean", "4.weight", "8.weight"),
    ),
    "gated": Case(
        lambda: Residual(nn.LayerNorm(12), GatedUnit()),
        (5, 12),
        ("inner.1.both.weight", "inner.1.down.weight"),
    ),
    "grouped attention": Case(
        lambda: Residual(nn.LayerNorm(16), GroupedAttention()),
        (2, 5, 16),
        ("inner.1.qkv.weight", "inner.1.out.weight"),
    ),
    "unpacked": Case(Unpacked, (2, 5, 16), ("qkv.weight", "out.weight"), n=4),
    "plain weights": Case(PlainWeights, (5, 12), ("up", "shift", "down")),
    "tied words": Case(TiedWords, (2, 6), ("unit.both.weight", "table.weight"), words=24),
    "cross attention": Case(
        CrossAttention, (2, 5, 16), ("attention.in_proj_weight", "attention.out_proj.weight")
    ),
    "careless attention": Case(Careless, (3, 5, 16), ("attention.in_proj_weight",), n=4),
    "encoder": Case(
        lambda: nn.TransformerEncoder(
            nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True), 2
        ),
        (2, 5, 16),
        ("layers.0.self_attn.in_proj_weight", "layers.1.linear2.weight"),
        n=4,
    ),
}


def plan_of(model: nn.Module, run: Callable[[nn.Module], Any], n: int, **more: Any) -> TensorPlan:
    unfold_attention(model)
    return find_cuts(record(model, run), n, **more)


@dataclass
class Outcome:
    output: Tensor
    gradients: dict[str, Tensor]
    buffers: dict[str, Tensor]
    plan: TensorPlan | None = None


def outcome(model: nn.Module, run: Callable[[nn.Module], Tensor]) -> Outcome:
    """Output and gradients of a function of a model."""
    output = run(model)
    (output.sin() * torch.arange(1.0, output.numel() + 1).view_as(output)).sum().backward()
    gradients = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
    output = output.detach()
    if isinstance(output, Late):
        output = output.whole("to compare it")
    return Outcome(output, gradients, dict(model.named_buffers()))


def in_slices(
    model: nn.Module, run: Callable[[nn.Module], Tensor], n: int, **more: Any
) -> list[Outcome]:
    """The same by n slices."""

    def work() -> Outcome:
        world = current_world()
        assert world is not None
        own = copy.deepcopy(model)
        plan = plan_of(own, run, n, **more)
        link = world.link("tensor", tuple(range(n)), torch.device("cpu"))
        slice_model(own, plan, Slice(link))
        found = outcome(own, run)
        found.plan = plan
        return found

    results = launch_threads(work, n)
    if (failure := first_failure(results)) is not None:
        raise failure
    return results


def assert_slices_equal_the_whole(
    model: nn.Module, run: Callable[[nn.Module], Tensor], n: int, **more: Any
) -> TensorPlan:
    slices = in_slices(model, run, n, **more)
    whole = outcome(copy.deepcopy(model), run)
    plan = slices[0].plan
    assert plan is not None
    for index, each in enumerate(slices):
        torch.testing.assert_close(each.output, whole.output)
        assert torch.equal(each.output, slices[0].output)
        for mine, all_of in ((each.gradients, whole.gradients), (each.buffers, whole.buffers)):
            assert mine.keys() == all_of.keys()
            for name, value in all_of.items():
                cut = plan.cuts.get(name)
                expected = value if cut is None else cut.piece(value, n, index)
                torch.testing.assert_close(
                    mine[name], expected, msg=lambda m, name=name: f"{name}: {m}"
                )
                if cut is None and value.is_floating_point():
                    first = slices[0].gradients.get(name, slices[0].buffers.get(name))
                    assert first is not None
                    assert torch.equal(mine[name], first), name
    return plan
