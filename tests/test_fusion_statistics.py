"""Batch statistics over the global batch: the numbers of torch's own BatchNorm on all rows."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from allfuse.base.errors import BadMessage, UserError
from allfuse.fusion.statistics import GlobalBatchNorm, globalize_batch_norm
from allfuse.launcher.base import current_world
from allfuse.launcher.thread import first_failure, launch_threads
from allfuse.link import Link
from allfuse.link.lone import LoneLink

CPU = torch.device("cpu")


def open_link() -> Link:
    world = current_world()
    assert world is not None
    return world.link("statistics", tuple(range(world.size)), CPU)


def run(function: Callable[[], Any], workers: int) -> list[Any]:
    results = launch_threads(function, workers)
    failure = first_failure(results)
    if failure is not None:
        raise failure
    return results


KINDS: dict[str, tuple[type[nn.Module], tuple[int, ...]]] = {
    "rows": (nn.BatchNorm1d, (4,)),
    "1d": (nn.BatchNorm1d, (4, 5)),
    "2d": (nn.BatchNorm2d, (4, 3, 2)),
    "3d": (nn.BatchNorm3d, (4, 2, 3, 2)),
    "one channel": (nn.BatchNorm2d, (1, 3, 2)),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "cumulative": {"momentum": None},
    "no momentum": {"momentum": 0.0},
    "no affine": {"affine": False},
    "no running": {"track_running_stats": False},
    "large eps": {"eps": 0.1},
}


def make(kind: str, dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
    cls, shape = KINDS[kind]
    norm = cls(shape[0], **options).to(dtype)
    if norm.affine:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    return norm


class Numbers:
    """What a BatchNorm computed over some batches: outputs, gradients, and its state."""

    def __init__(self, norm: nn.Module, batches: list[Tensor], upstream: list[Tensor]) -> None:
        self.outputs: list[Tensor] = []
        self.inputs: list[Tensor] = []
        for x, dy in zip(batches, upstream, strict=True):
            x = x.clone().requires_grad_()
            y = norm(x)
            (y * dy).sum().backward()
            assert x.grad is not None
            self.outputs.append(y.detach())
            self.inputs.append(x.grad)
        self.parameters = [p.grad for p in norm.parameters() if p.grad is not None]
        self.state = dict(norm.state_dict())


def compare(
    norm: nn.Module,
    batches: list[Tensor],
    bounds: list[int],
    *,
    exact: float = 1e-5,
    eval_mode: bool = False,
) -> None:
    """A norm whose ranks hold rows bounds[r]..bounds[r+1] of each batch, against the whole."""
    norm.train(not eval_mode)
    upstream = [torch.randn_like(x) for x in batches]
    whole = Numbers(copy.deepcopy(norm), batches, upstream)
    workers = len(bounds) - 1

    def work() -> Numbers:
        mine = copy.deepcopy(norm)
        link = open_link()
        globalize_batch_norm(mine, link)
        rows = slice(bounds[link.rank], bounds[link.rank + 1])
        return Numbers(mine, [x[rows] for x in batches], [dy[rows] for dy in upstream])

    def same(ours: Tensor, theirs: Tensor) -> None:
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=exact, atol=exact)

    parts = run(work, workers)
    for number in range(len(batches)):
        same(torch.cat([part.outputs[number] for part in parts]), whole.outputs[number])
        same(torch.cat([part.inputs[number] for part in parts]), whole.inputs[number])
    for place, gradient in enumerate(whole.parameters):
        same(torch.stack([part.parameters[place] for part in parts]).sum(0), gradient)
    for part in parts:
        assert part.state.keys() == whole.state.keys()
        for name, value in whole.state.items():
            same(part.state[name], value)
            assert torch.equal(part.state[name], parts[0].state[name])


def batches_for(kind: str, rows: int = 9, count: int = 3, shift: float = 3.0) -> list[Tensor]:
    shape = KINDS[kind][1]
    return [torch.randn(rows, *shape) * 2 + shift for _ in range(count)]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_it_equals_one_process_on_the_whole_batch(kind: str, options: str) -> None:
    torch.manual_seed(0)
    compare(make(kind, **OPTIONS[options]), batches_for(kind), [0, 5, 9])


@pytest.mark.parametrize("bounds", [[0, 1, 9], [0, 1, 2, 3], [0, 4, 4, 9], [0, 2, 3, 4, 9]])
def test_uneven_shares_even_of_one_row_or_none_change_nothing(bounds: list[int]) -> None:
    torch.manual_seed(0)
    compare(make("rows"), batches_for("rows", rows=bounds[-1]), bounds)


@pytest.mark.parametrize("options", ["plain", "no running"])
def test_evaluation_equals_one_process_too(options: str) -> None:
    torch.manual_seed(0)
    norm = make("2d", **OPTIONS[options])
    norm(torch.randn(8, 4, 3, 2) * 5 + 1)
    compare(norm, batches_for("2d"), [0, 3, 9], eval_mode=True)


def test_running_statistics_that_are_no_longer_kept_are_used_as_torch_does() -> None:
    torch.manual_seed(0)
    norm = make("rows")
    norm.track_running_stats = False  # set by a script: the buffers stay
    compare(norm, batches_for("rows"), [0, 4, 9])
    compare(norm, batches_for("rows"), [0, 4, 9], eval_mode=True)


@pytest.mark.parametrize(
    ("input_type", "norm_type", "exact"),
    [
        (torch.float64, torch.float64, 1e-12),
        (torch.bfloat16, torch.bfloat16, 4e-2),
        (torch.bfloat16, torch.float32, 4e-2),
        (torch.float16, torch.float16, 4e-3),
    ],
    ids=str,
)
def test_types_are_those_of_torch(
    input_type: torch.dtype, norm_type: torch.dtype, exact: float
) -> None:
    torch.manual_seed(0)
    batches = [x.to(input_type) for x in batches_for("2d", count=1, shift=0.0)]
    compare(make("2d", norm_type), batches, [0, 5, 9], exact=exact)


def test_large_means_lose_no_digits() -> None:
    torch.manual_seed(0)
    batches = batches_for("rows", rows=64, count=1, shift=1000.0)
    exact = copy.deepcopy(make("rows")).double()
    expected = exact(batches[0].double())

    def work() -> Tensor:
        norm, link = copy.deepcopy(exact).float(), open_link()
        globalize_batch_norm(norm, link)
        return norm(batches[0][link.rank * 32 : link.rank * 32 + 32]).detach()

    got = torch.cat(run(work, 2))
    torch.testing.assert_close(got.double(), expected.detach(), rtol=0, atol=1e-3)


def test_memory_formats_pass_through() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 4, 3, 2).to(memory_format=torch.channels_last)
    norm = make("2d")
    globalize_batch_norm(norm, LoneLink())
    assert norm(x).is_contiguous(memory_format=torch.channels_last)
    turned = torch.randn(2, 3, 4, 4).permute(3, 2, 1, 0)  # no dense format at all
    torch.testing.assert_close(norm(turned), norm(turned.contiguous()))


def test_a_stand_in_of_weight_0_changes_nothing_whatever_it_holds() -> None:
    torch.manual_seed(0)
    norm, x = make("rows"), torch.randn(6, 4)
    whole = Numbers(copy.deepcopy(norm), [x], [torch.ones_like(x)])

    def work() -> Numbers:
        mine, link = copy.deepcopy(norm), open_link()
        (made,) = globalize_batch_norm(mine, link)
        made.weight_of_rows = 0.0 if link.rank == 1 else 1.0
        rows = torch.full((2, 4), float("inf")) if link.rank == 1 else x
        if link.rank == 1:
            y = mine(rows)
            (torch.nan_to_num(y) * 0.0).sum().backward()
            return Numbers.__new__(Numbers)
        return Numbers(mine, [x], [torch.ones_like(x)])

    part = run(work, 2)[0]
    torch.testing.assert_close(part.outputs[0], whole.outputs[0])
    torch.testing.assert_close(part.inputs[0], whole.inputs[0], atol=1e-6, rtol=1e-5)
    for name, value in whole.state.items():
        torch.testing.assert_close(part.state[name], value)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_whole_batch_of_one_value_is_refused_as_torch_does(workers: int) -> None:
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        make("rows")(torch.randn(1, 4))

    def work() -> None:
        mine, link = make("rows"), open_link()
        (made,) = globalize_batch_norm(mine, link)
        made.weight_of_rows = 1.0 if link.rank == 0 else 0.0
        with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
            mine(torch.randn(1, 4))

    run(work, workers)


@pytest.mark.parametrize("shape", [(3,), (3, 4, 5), (3, 5, 2, 2)])
def test_inputs_of_a_wrong_shape_are_refused_as_torch_does(shape: tuple[int, ...]) -> None:
    norm = nn.BatchNorm2d(4)
    globalize_batch_norm(norm, LoneLink())
    with pytest.raises((ValueError, RuntimeError)):
        norm(torch.randn(shape))


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.BatchNorm1d(16)
    )


def test_a_network_trains_as_in_one_process() -> None:
    torch.manual_seed(0)
    model = network()
    batches = [torch.randn(8, 2, 4, 4) for _ in range(4)]

    def train(module: nn.Module, rows: slice, sum_up: Callable[[Tensor], None]) -> list[Tensor]:
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        for x in batches:
            optimizer.zero_grad()
            module(x[rows]).pow(3).sum().div(100).backward()
            for parameter in module.parameters():
                assert parameter.grad is not None
                sum_up(parameter.grad)
            optimizer.step()
        return [value.detach() for value in module.state_dict().values()]

    def work() -> list[Tensor]:
        mine, link = copy.deepcopy(model), open_link()
        globalize_batch_norm(mine, link)
        rows = slice(0, 3) if link.rank == 0 else slice(3, 8)
        return train(mine, rows, lambda gradient: link.all_reduce(gradient, "gradient").wait())

    expected = train(copy.deepcopy(model), slice(0, 8), lambda gradient: None)
    for outcome in run(work, 2):
        for ours, theirs in zip(outcome, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_transfers_name_their_layer_so_that_ranks_that_differ_are_found_out() -> None:
    model = nn.ModuleDict({"one": nn.BatchNorm1d(4), "two": nn.BatchNorm1d(4)})

    def work() -> None:
        mine, link = copy.deepcopy(model), open_link()
        globalize_batch_norm(mine, link)
        mine["one" if link.rank == 0 else "two"](torch.randn(3, 4))

    error = first_failure(launch_threads(work, 2))
    assert isinstance(error, BadMessage)
    assert "fuse batch statistics of one" in str(error)
    assert "fuse batch statistics of two" in str(error)


def test_modules_keep_their_names_parameters_and_classes() -> None:
    model = network()
    before = dict(model.named_parameters()), dict(model.named_buffers())
    changed = globalize_batch_norm(model, LoneLink())
    assert [type(norm).__name__ for norm in changed] == [
        "GlobalBatchNorm2d",
        "GlobalBatchNorm1d",
    ]
    assert isinstance(model[1], nn.BatchNorm2d)
    after = dict(model.named_parameters()), dict(model.named_buffers())
    for old, new in zip(before, after, strict=True):
        assert old.keys() == new.keys()
        assert all(old[name] is new[name] for name in old)
    assert globalize_batch_norm(model, LoneLink()) == []  # once is enough


def test_a_copy_keeps_the_link_and_a_pickle_is_plain_again() -> None:
    def work() -> bytes:
        model, link = network(), open_link()
        globalize_batch_norm(model, link)
        copied = copy.deepcopy(model)
        assert isinstance(copied[1], GlobalBatchNorm)
        assert copied[1].link is link
        assert copied[1].weight is not model[1].weight
        return pickle.dumps(model)

    for packed in run(work, 2):
        model = pickle.loads(packed)
        assert type(model[1]) is nn.BatchNorm2d
        assert type(model[4]) is nn.BatchNorm1d
        assert not {"link", "whose", "weight_of_rows"} & vars(model[1]).keys()
        model(torch.randn(3, 2, 4, 4)).sum().backward()


class Activated(nn.BatchNorm1d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).relu()


class Renamed(nn.BatchNorm1d):
    pass


def test_what_would_compute_something_else_is_refused() -> None:
    with pytest.raises(UserError, match=r"0 is a Activated that has a forward of its own"):
        globalize_batch_norm(nn.Sequential(Activated(4)), LoneLink())
    with pytest.raises(UserError, match=r"LazyBatchNorm1d that has not seen a batch yet"):
        globalize_batch_norm(nn.Sequential(nn.LazyBatchNorm1d()), LoneLink())
    model = nn.Sequential(Renamed(4), nn.InstanceNorm1d(4), nn.LayerNorm(4))
    (changed,) = globalize_batch_norm(model, LoneLink())
    assert isinstance(changed, Renamed)
