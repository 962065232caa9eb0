"""The loss of a tensor of which each rank has a slice is that of the whole, for little traffic."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sliced import plan_of
from torch import Tensor, nn

from allfuse.launcher.base import current_world
from allfuse.launcher.thread import first_failure, launch_threads
from allfuse.split.tensor.late import Late, put_off
from allfuse.split.tensor.slicing import slice_model
from allfuse.split.tensor.traffic import Slice

ROWS, LENGTH, WORDS = 3, 5, 101  # which neither 2 nor 3 divides
CHANCE = torch.Generator().manual_seed(4)
TARGETS = torch.randint(WORDS, (ROWS, LENGTH), generator=CHANCE)
WEIGHTS = torch.rand(WORDS, generator=CHANCE, dtype=torch.float64) + 0.5
SOFT = torch.rand(ROWS, LENGTH, WORDS, generator=CHANCE, dtype=torch.float64).softmax(-1)
SCORES = torch.randn(ROWS, LENGTH, WORDS, generator=CHANCE, dtype=torch.float64)
SOME = TARGETS % 3 > 0
Loss = Callable[[Tensor], Tensor]


def entropy(x: Tensor, **more: Any) -> Tensor:
    return F.cross_entropy(x.reshape(-1, x.shape[-1]), TARGETS.view(-1), **more)


def shifted(x: Tensor) -> Tensor:
    rows = x[:, :-1].contiguous().view(-1, WORDS)
    return F.cross_entropy(rows, TARGETS[:, 1:].reshape(-1))


def scaled_in_place(x: Tensor) -> Tensor:
    y = x * 1
    flat = y.view(-1, WORDS)
    y /= 2.0
    y.add_(WEIGHTS)
    return F.cross_entropy(flat, TARGETS.view(-1))


def accuracy_weighted(x: Tensor) -> Tensor:
    right = x.argmax(-1) == TARGETS
    found, at = x.max(dim=-1)
    assert torch.equal(at, x.argmax(-1))
    return entropy(x, reduction="none").dot(1.0 + right.view(-1).double()) + found.detach().sum()


def by_hand(x: Tensor) -> Tensor:
    picked = x.log_softmax(-1).gather(-1, TARGETS.unsqueeze(-1))
    return -(picked.squeeze(-1) * SOME).sum() / SOME.sum()


BY_PARTS: dict[str, Loss] = {
    "mean": entropy,
    "sum": lambda x: entropy(x, reduction="sum"),
    "each": lambda x: entropy(x, reduction="none").square().sum(),
    "ignored": lambda x: entropy(x, ignore_index=int(TARGETS[0, 0])),
    "weights": lambda x: entropy(x, weight=WEIGHTS),
    "smooth": lambda x: entropy(x, label_smoothing=0.1),
    "smooth and weights": lambda x: entropy(
        x, label_smoothing=0.1, weight=WEIGHTS, ignore_index=int(TARGETS[0, 0])
    ),
    "soft": lambda x: F.cross_entropy(x.flatten(0, 1), SOFT.flatten(0, 1)),
    "classes in dim 1": lambda x: F.cross_entropy(x.transpose(1, 2), TARGETS, weight=WEIGHTS),
    "two steps": lambda x: F.nll_loss(x.log_softmax(-1).view(-1, WORDS), TARGETS.view(-1)),
    "by hand": by_hand,
    "shifted": shifted,
    "masked rows": lambda x: F.cross_entropy(x[SOME], TARGETS[SOME]),
    "the last": lambda x: F.cross_entropy(x[:, -1], TARGETS[:, -1]),
    "scaled": lambda x: entropy(torch.tanh(x / 3.0) * 3.0 + WEIGHTS),
    "scaled in place": scaled_in_place,
    "one after the other": lambda x: entropy(x) + 1e-2 * x.logsumexp(-1).square().mean(),
    "probabilities": lambda x: -(x.softmax(-1) * x.log_softmax(-1)).sum(-1).mean(),
    "divergence": lambda x: F.kl_div(x.log_softmax(-1), SOFT, reduction="batchmean"),
    "accuracy": accuracy_weighted,
    "in float": lambda x: entropy(x.float()).double(),
    "rows of ones": lambda x: entropy(x.unsqueeze(2).squeeze(2).permute(1, 0, 2).transpose(0, 1)),
}


def column(x: Tensor) -> Tensor:
    y = x * 1
    y[..., 3] = -9.0
    y[..., 40:] *= 2.0
    y.select(-1, 5).fill_(1.0)
    return entropy(y)


def sparse(x: Tensor) -> Tensor:
    y = x * 1
    y.index_put_((torch.tensor([0]), torch.tensor([1]), torch.tensor([99])), x[0, 0, 1])
    return y.square().sum()


GATHERED: dict[str, Loss] = {
    "squares": lambda x: F.mse_loss(x, SOFT),
    "a column": lambda x: x[..., 3].sum() + entropy(x[..., : WORDS - 1], ignore_index=WORDS - 1),
    "set": column,
    "put": sparse,
    "flat": lambda x: x.reshape(-1).square().mean(),
    "sorted": lambda x: x.sort(-1).values.cumsum(-1).square().mean(),
    "multiplied": lambda x: (x @ WEIGHTS).square().mean(),
    "normed": lambda x: F.layer_norm(x, (WORDS,)).pow(3).sum(),
    "chunks": lambda x: sum(c.square().sum() * i for i, c in enumerate(x.chunk(3, -1))),
    "beside each other": lambda x: torch.cat([x, x[:1]]).square().sum(),
    "seen": lambda x: entropy(x) * float(x.detach().numpy().sum()) / len(x.tolist()),
}


def in_parts(loss: Loss, n: int) -> list[tuple[Tensor, Tensor, int]]:
    """By each rank: the loss, the gradient of its slice, and how many bytes it sent."""

    def work() -> tuple[Tensor, Tensor, int]:
        world = current_world()
        assert world is not None
        link = world.link("tensor", tuple(range(n)), torch.device("cpu"))
        own = _own(SCORES, n, link.rank).requires_grad_()
        found = loss(put_off(own * 1, Slice(link), 2, WORDS, "head"))
        found.backward()
        assert own.grad is not None
        return found.detach(), own.grad, link.sent_bytes

    results = launch_threads(work, n)
    if (failure := first_failure(results)) is not None:
        raise failure
    return results


def _own(x: Tensor, n: int, index: int) -> Tensor:
    return x[..., WORDS * index // n : WORDS * (index + 1) // n].clone()


def assert_as_whole(loss: Loss, n: int) -> list[int]:
    """The loss and its gradient are those of the whole; how many bytes each rank sent."""
    whole = SCORES.clone().requires_grad_()
    expected = loss(whole)
    expected.backward()
    assert whole.grad is not None
    results = in_parts(loss, n)
    close = {"rtol": 1e-6, "atol": 1e-8} if loss is BY_PARTS["in float"] else {}
    for index, (found, gradient, _) in enumerate(results):
        assert type(found) is Tensor
        assert torch.equal(found, results[0][0])
        torch.testing.assert_close(found, expected.detach(), **close)
        torch.testing.assert_close(gradient, _own(whole.grad, n, index), **close)
    return [sent for _, _, sent in results]


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("name", BY_PARTS)
def test_a_loss_by_parts_is_that_of_the_whole_for_less_than_a_gather(name: str, n: int) -> None:
    for index, sent in enumerate(assert_as_whole(BY_PARTS[name], n)):
        assert 0 < sent < (n - 1) * _own(SCORES, n, index).nbytes / 2


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("name", GATHERED)
def test_what_needs_the_whole_is_computed_from_the_whole(name: str, n: int) -> None:
    for index, sent in enumerate(assert_as_whole(GATHERED[name], n)):
        assert sent >= (n - 1) * _own(SCORES, n, index).nbytes


@pytest.mark.parametrize("n", [2, 3])
def test_a_cross_entropy_sends_one_number_for_each_row_and_one_for_all(n: int) -> None:
    rows, number = ROWS * LENGTH, 8
    one = in_parts(lambda x: x.sum(), n)  # one number is summed
    for (*_, sent), (*_, alone) in zip(in_parts(entropy, n), one, strict=True):
        assert sent == (n - 1) * rows * number + alone
        assert alone <= 2 * (n - 1) * number


def test_targets_that_are_no_class_are_refused() -> None:
    bad = TARGETS.view(-1).clone()
    bad[3] = WORDS
    with pytest.raises(IndexError, match="Target 101 is out of bounds"):
        in_parts(lambda x: F.cross_entropy(x.view(-1, WORDS), bad), 2)


def test_rows_of_which_none_counts_have_no_loss() -> None:
    none = torch.full_like(TARGETS.view(-1), -100)
    for found, gradient, _ in in_parts(lambda x: F.cross_entropy(x.view(-1, WORDS), none), 2):
        assert found.isnan()
        assert not gradient.any()


def test_autocast_makes_the_types_that_it_makes_of_the_whole() -> None:
    def loss(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = x.bfloat16() * 2
            seen.append((y.dtype, y.log_softmax(-1).dtype, y.softmax(-1).dtype, y.sum(-1).dtype))
            return entropy(y).double()

    seen: list[Any] = []
    whole = loss(SCORES)
    for found, _, _ in in_parts(loss, 2):
        torch.testing.assert_close(found, whole, rtol=1e-2, atol=1e-2)
    assert seen[1:] == seen[:1] * 2


def test_one_rank_alone_may_print_what_it_has() -> None:
    def loss(x: Tensor) -> Tensor:
        told.append(repr(x))
        return x.sum()

    told: list[str] = []
    in_parts(loss, 2)
    assert any("this rank has 0:50 of dim 2" in text for text in told)


class Net(nn.Module):
    """Words in, scores of words out; with labels their loss, too."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(WORDS, 8), nn.Linear(8, WORDS)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        scores = self.head(self.table(x).tanh())
        return scores, None if labels is None else entropy(scores)


def test_the_last_map_is_put_together_late_where_it_learns_and_at_once_elsewhere() -> None:
    def work() -> None:
        world = current_world()
        assert world is not None
        torch.manual_seed(0)
        model = Net().double()
        plan = plan_of(model, lambda made: made(TARGETS), 2)
        assert [use.way for use in plan.uses.values()] == ["vocabulary", "late"]
        slice_model(model, plan, Slice(world.link("tensor", (0, 1), torch.device("cpu"))))
        assert isinstance(model(TARGETS)[0], Late)
        with torch.no_grad():
            assert type(model(TARGETS)[0]) is Tensor
        scores, loss = model(TARGETS, TARGETS)
        torch.testing.assert_close(loss, entropy(scores))

    results = launch_threads(work, 2)
    if (failure := first_failure(results)) is not None:
        raise failure


def test_a_map_that_others_come_after_is_put_together_at_once() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.Softmax(-1), nn.Linear(16, 9), nn.Tanh()).double()
    plan = plan_of(model, lambda made: made(torch.randn(5, 8).double()), 2)
    assert [use.way for use in plan.uses.values()] == ["gathered", "late"]
