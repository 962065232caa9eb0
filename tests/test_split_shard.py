"""Rows of parameters: who keeps which, and how blocks of a model bring them together."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training_cases import TIGHT, ranks

from allfuse.launcher.base import current_world
from allfuse.link import Link
from allfuse.link.lone import LoneLink
from allfuse.split.piece import cut_piece, join, whole_piece
from allfuse.split.record import record
from allfuse.split.shard import gather
from allfuse.split.shard.blocks import find_blocks
from allfuse.split.shard.gather import Block
from allfuse.split.shard.rows import Rows, rows_of, shard_piece
from allfuse.split.shard.sharding import shard_model

SHAPES = [(7, 3), (4,), (1, 5), (2, 2, 2), (), (12, 1)]


@pytest.mark.parametrize("n", [2, 3, 5])
def test_rows_are_those_that_torch_cuts(n: int) -> None:
    for length in range(12):
        chunks = [len(chunk) for chunk in torch.arange(length).chunk(n)] if length else []
        found = [stop - first for first, stop in (rows_of(length, n, i) for i in range(n))]
        assert found == chunks + [0] * (n - len(chunks))


@pytest.mark.parametrize("n", [2, 3, 5])
def test_parts_of_all_ranks_make_the_whole_again(n: int) -> None:
    rows, whole = Rows(SHAPES, n), [torch.randn(shape) for shape in SHAPES]
    parts = torch.full((n, rows.length), float("nan"))
    rows.cut(whole, parts)
    found = [torch.empty(shape) for shape in SHAPES]
    rows.join(parts, found)
    for a, b in zip(whole, found, strict=True):
        assert torch.equal(a, b)
    parted = zip(whole, *(rows.own(parts[rank], rank) for rank in range(n)), strict=True)
    for tensor, *pieces in parted:
        assert torch.equal(tensor, torch.cat(pieces) if tensor.dim() else pieces[-1])


def test_rows_of_a_slice_lie_where_they_lay_in_the_whole() -> None:
    """Of packed weights a slice has a run of each part; its rows come of several runs."""
    whole = torch.arange(48.0).view(12, 4)
    pieces = []
    for slice_ in range(2):
        piece = cut_piece((12, 4), 0, (4, 4, 4), [(2 * slice_, 2 * slice_ + 2)] * 3)
        own = piece.take(whole)
        for index in range(4):
            rows = shard_piece(piece, 4, index)
            first, stop = rows_of(len(own), 4, index)
            assert torch.equal(rows.take(whole), own[first:stop])
            pieces.append((rows, own[first:stop]))
    assert torch.equal(join(pieces), whole)


def test_a_single_number_is_whole_on_every_rank() -> None:
    assert shard_piece(whole_piece(()), 4, 3) == whole_piece(())


class Blocks(nn.Module):
    """Embedding and output are tied; one layer is used by its weight alone; one is not called."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 8)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3))
        self.borrowed, self.last = nn.Linear(8, 8), nn.Linear(8, 10, bias=False)
        self.last.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.table(x)
        for layer in self.layers:
            x = layer(x)
        result: Tensor = self.last(x @ self.borrowed.weight + self.borrowed.bias)
        return result


WORDS = torch.arange(10).view(2, 5)


def test_blocks_are_modules_that_alone_use_what_they_have() -> None:
    model = Blocks()
    recording = record(model, lambda made: made(WORDS))
    assert find_blocks(model, recording) == ["layers.0.0", "layers.1.0", "layers.2.0"]


def test_small_layers_are_blocks_as_a_whole() -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(20)))
    recording = record(model, lambda made: made(torch.zeros(2, 4)))
    assert find_blocks(model, recording) == [str(number) for number in range(20)]


def sharded(
    work: Callable[[nn.Module, list[Block]], Any],
    build: Callable[[], nn.Module],
    shortened: bool = False,
) -> list[Any]:
    """`work(model, blocks)` on each of two ranks that keep the rows of one model."""
    whole = build()

    def one() -> Any:
        world = current_world()
        assert world is not None
        link: Link = world.link("shard", (0, 1), torch.device("cpu"))
        model = copy.deepcopy(whole)
        names = [name for name, child in model.named_children() if list(child.parameters())]
        try:
            return work(model, shard_model(model, names, link, shortened=shortened))
        finally:
            link.close()

    return ranks(one, "shard(2)", 2)


def layers() -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 5))


@pytest.mark.parametrize("large_bytes", [1, 100, 1 << 18])
def test_gradients_are_rows_of_the_sum_over_ranks(
    large_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever travel by themselves."""
    monkeypatch.setattr(gather, "LARGE_BYTES", large_bytes)
    x = torch.randn(4, 6)

    def layers() -> nn.Module:
        torch.manual_seed(2)
        return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5))

    plain = layers()
    plain(x).square().sum().backward()

    def work(model: nn.Module, blocks: list[Block]) -> list[Tensor]:
        own = x[2 * blocks[0].link.rank :][:2]
        model(own).square().sum().backward()
        assert model[0].weight.shape[0] == 4
        return [p.grad for p in model.parameters() if p.grad is not None]

    found = zip(*sharded(work, layers), strict=True)
    for parts, parameter in zip(found, plain.parameters(), strict=True):
        torch.testing.assert_close(torch.cat(parts), parameter.grad)


class Watched(nn.Linear):
    """Knows whether the weight that it last used is still there."""

    def forward(self, x: Tensor) -> Tensor:
        self.used = weakref.ref(self.weight)
        return super().forward(x)


def test_what_was_brought_together_is_gone_when_the_block_has_run() -> None:
    """Autograd keeps where it was, not the numbers, and they are gathered again."""

    def work(model: nn.Module, blocks: list[Block]) -> tuple[bool, int, int]:
        link, watched = blocks[0].link, model[0]
        loss = model(torch.randn(3, 6, requires_grad=True)).square().sum()
        is_gone = watched.used() is None
        before = link.sent_bytes
        loss.backward()
        return is_gone, before, link.sent_bytes - before

    def build() -> nn.Module:
        return nn.Sequential(Watched(6, 8), nn.Tanh(), nn.Linear(8, 4))

    numbers = 7 * 8 + 9 * 4
    for is_gone, forward, backward in sharded(work, build):
        assert is_gone
        assert forward == 4 * numbers / 2
        flags = 2 * 2  # who has found which
        assert backward == 4 * numbers / 2 + 4 * (numbers / 2 + flags)  # gathered, then summed


def test_autocast_gives_the_numbers_of_the_whole_model() -> None:
    """Matrices travel in the type that autocast would make of them."""
    x, plain = torch.randn(4, 6), layers()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = plain(x)
    expected.float().square().sum().backward()

    def work(model: nn.Module, blocks: list[Block]) -> tuple[Tensor, list[Tensor], int]:
        before = blocks[0].link.sent_bytes
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = model(x)
        sent = blocks[0].link.sent_bytes - before
        (y.float().square().sum() / 2).backward()
        return y, [p.grad for p in model.parameters() if p.grad is not None], sent

    results = sharded(work, layers, shortened=True)
    for y, _, sent in results:
        assert torch.equal(y, expected)
        assert sent == 2 * (5 * 6 + 3 * 9) + 4 * (5 + 3)
    for number, parameter in enumerate(plain.parameters()):
        found = torch.cat([gradients[number] for _, gradients, _ in results])
        torch.testing.assert_close(found, parameter.grad, rtol=0.02, atol=0.02)


def test_rows_stay_at_home_and_are_brought_together_where_the_model_runs() -> None:
    """The meta device computes no number, and so stands in for another one as far as places go."""
    model, home = layers(), torch.device("cpu")
    (block,) = shard_model(model, [], LoneLink(), home=home)
    block.device = torch.device("meta")  # as if the parameters had been there
    assert {p.device for p in model.parameters()} == {home}
    assert {whole.device.type for whole in block.gather(torch.float32)} == {"meta"}
    y = model(torch.empty(4, 6, device="meta"))
    assert (y.device.type, tuple(y.shape)) == ("meta", (4, 5))
    assert {p.device for p in model.parameters()} == {home}


def test_gradients_come_home_where_optimizers_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where sums are made in other memory first, as on a device."""
    model, plain, x = layers(), layers(), torch.randn(4, 6)
    (block,) = shard_model(model, [], LoneLink(), home=torch.device("cpu"))
    monkeypatch.setattr(block, "home", torch.device("cpu", 7))  # not where the model runs
    for made in (model, plain):
        made(x).square().sum().backward()
        torch.optim.AdamW(made.parameters(), lr=0.1).step()
    for own, whole in zip(model.parameters(), plain.parameters(), strict=True):
        assert own.grad is not None
        torch.testing.assert_close(own.grad, whole.grad)
        torch.testing.assert_close(own, whole)


def test_nothing_is_left_gathered_after_an_error() -> None:
    def work(model: nn.Module, blocks: list[Block]) -> bool:
        with pytest.raises(RuntimeError):
            model(torch.randn(3, 7))
        return all(isinstance(p, nn.Parameter) for p in model.parameters())

    assert all(sharded(work, layers))


def test_a_repeated_sum_is_the_same_in_every_bit() -> None:
    def work(model: nn.Module, blocks: list[Block]) -> Tensor:
        x = torch.arange(18.0).view(3, 6)
        return model(x).detach()

    first, second = sharded(work, layers)
    torch.testing.assert_close(first, second, **TIGHT)
    assert torch.equal(first, layers()(torch.arange(18.0).view(3, 6)).detach())


def test_gradients_stay_in_one_place_unless_somebody_keeps_them() -> None:
    def work(model: nn.Module, blocks: list[Block]) -> tuple[bool, bool, bool]:
        def learn() -> Tensor:
            model.zero_grad()
            model(torch.ones(3, 6)).square().sum().backward()
            found: Tensor = model[0].weight.grad
            return found

        place = learn().data_ptr()
        again = learn()
        is_same, before = again.data_ptr() == place, again.clone()
        model[0].weight.data.add_(1.0)
        other = learn()
        model(torch.ones(3, 6)).square().sum().backward()  # adds up
        doubled = torch.allclose(model[0].weight.grad, 2 * other) or other is model[0].weight.grad
        return is_same, torch.equal(again, before), doubled

    for is_same, is_kept, is_doubled in sharded(work, layers):
        assert is_same
        assert is_kept
        assert is_doubled
