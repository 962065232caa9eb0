"""Fusion of gradients on the thread link: equals the gradient of one process, whatever happens."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from allfuse.base.errors import PeerLost, UserError
from allfuse.fusion import Fuser, Fusion
from allfuse.fusion import bucket as bucket_module
from allfuse.fusion.gradients import GradientFusion
from allfuse.launcher.base import current_world
from allfuse.launcher.thread import first_failure, launch_threads
from allfuse.link import Link, Work
from allfuse.link.lone import Done, LoneLink
from allfuse.link.thread import Killed, Script
from allfuse.split.whole import Whole

CPU = torch.device("cpu")
ROWS = 12


def open_link() -> Link:
    world = current_world()
    assert world is not None
    return world.link("data", tuple(range(world.size)), CPU)


def run(function: Callable[[], Any], workers: int, **options: Any) -> list[Any]:
    results = launch_threads(function, workers, **options)
    failure = first_failure(results)
    if failure is not None:
        raise failure
    return results


@pytest.fixture(autouse=True, params=["one by one", "together"])
def copied(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small models stand for large ones too, whose gradients are copied one by one."""
    if request.param == "one by one":
        monkeypatch.setattr(bucket_module, "SMALL_BYTES", 0)


class Peer:
    """One rank's copy of a model, its fusion, and steps over its share of a batch."""

    def __init__(
        self,
        model: nn.Module,
        link: Link,
        bucket_bytes: int = 64,
        prepare: Callable[[nn.Module], None] = lambda module: None,
    ) -> None:
        self.model, self.link = copy.deepcopy(model), link
        prepare(self.model)
        names, parameters = zip(*self.model.named_parameters(), strict=True)
        self.parameters: Sequence[nn.Parameter] = parameters
        self.fusion = GradientFusion(
            names,
            parameters,
            Fuser(Fusion(), link),
            bucket_bytes=bucket_bytes,
            first_bucket_bytes=bucket_bytes,
        )
        self.split = Whole()
        self.split.watch(parameters, self.fusion.final)
        self.fusion.listening = True

    def backward(self, x: Tensor, last: bool = True, **options: Any) -> None:
        """Differentiate this rank's rows of the batch, as a part of its mean."""
        mine = x[self.link.rank :: self.link.size]
        loss = self.model(mine, **options).sum() / len(x)
        self.split.backward(loss, (), last)

    def step(self, x: Tensor, **options: Any) -> list[Tensor | None]:
        self.backward(x, **options)
        self.fusion.finish()
        return self.gradients()

    def gradients(self) -> list[Tensor | None]:
        return [None if p.grad is None else p.grad.clone() for p in self.parameters]


def serial(model: nn.Module, x: Tensor, **options: Any) -> list[Tensor | None]:
    plain = copy.deepcopy(model)
    (plain(x, **options).sum() / len(x)).backward()
    return [parameter.grad for parameter in plain.parameters()]


def assert_same(got: Sequence[Tensor | None], expected: Sequence[Tensor | None]) -> None:
    assert [gradient is None for gradient in got] == [gradient is None for gradient in expected]
    for ours, theirs in zip(got, expected, strict=True):
        if ours is not None and theirs is not None:
            exact = 2e-2 if ours.dtype == torch.bfloat16 else 1e-5  # all is fed by float32
            torch.testing.assert_close(ours, theirs, rtol=exact, atol=exact)


def assert_equal_everywhere(outcomes: list[list[Tensor | None]]) -> None:
    for outcome in outcomes[1:]:
        for ours, first in zip(outcome, outcomes[0], strict=True):
            assert (ours is None) == (first is None)
            if ours is not None and first is not None:
                assert torch.equal(ours, first)


class Zoo(nn.Module):
    """All that gradients can look like: shared and reused weights, three types, other strides."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.first = nn.Linear(5, width)
        self.middle = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.again = self.middle[0]  # shared: one parameter under two names
        self.exact = nn.Linear(width, 3).double()
        self.short = nn.Linear(width, 3).bfloat16()
        self.turned = nn.Parameter(torch.randn(width, 4).t())  # not contiguous
        self.conv = nn.Conv2d(1, 2, 2).to(memory_format=torch.channels_last)
        self.scalar = nn.Parameter(torch.tensor(1.5))
        self.nothing = nn.Parameter(torch.zeros(0, 3))
        self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x)) * self.scalar
        for layer in self.middle:
            x = torch.tanh(layer(x)) + x
        x = x + self.again(x)  # used twice
        image = self.conv(x[:, None, None, :].expand(-1, -1, 2, -1))
        out = F.linear(x, self.turned).sum(1) + image.mean(dim=(1, 2, 3)) + self.nothing.sum()
        return out + self.exact(x.double()).sum(1) + self.short(x.bfloat16()).sum(1).double()


@pytest.mark.parametrize("bucket_bytes", [1, 100, 10**9])
@pytest.mark.parametrize("workers", [1, 2, 3, 5])
def test_the_sum_over_peers_is_the_gradient_of_one_process(workers: int, bucket_bytes: int) -> None:
    torch.manual_seed(workers)
    model, x = Zoo(6, 2), torch.randn(ROWS, 5)
    outcomes = run(lambda: Peer(model, open_link(), bucket_bytes).step(x), workers)
    assert_same(outcomes[0], serial(model, x))
    assert_equal_everywhere(outcomes)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_random_models_and_buckets_fuse_alike(seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    workers, width, depth, bucket = (
        int(torch.randint(1, high, (1,), generator=random)) for high in (6, 40, 6, 20000)
    )
    torch.manual_seed(seed)
    model, x = Zoo(width, depth), torch.randn(60, 5)
    outcomes = run(lambda: Peer(model, open_link(), bucket).step(x), workers)
    assert_same(outcomes[0], serial(model, x))
    assert_equal_everywhere(outcomes)


class Branches(nn.Module):
    """Uses the layers that it is told to, in this order."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(4))

    def forward(self, x: Tensor, used: Sequence[int]) -> Tensor:
        for index in used:
            x = torch.tanh(self.layers[index](x))
        return x


@pytest.mark.parametrize("bucket_bytes", [1, 60, 10**9])
def test_parameters_that_some_ranks_do_not_use_neither_hang_nor_differ(bucket_bytes: int) -> None:
    torch.manual_seed(0)
    model, x = Branches(), torch.randn(ROWS, 3)
    uses = {0: [0, 1], 1: [1, 0], 2: [1]}  # another order, a missing one; 2 and 3 by nobody

    def work() -> list[list[Tensor | None]]:
        peer = Peer(model, open_link(), bucket_bytes)
        steps = []
        for _ in range(2):
            steps.append(peer.step(x, used=uses[peer.link.rank]))
            for parameter in peer.parameters:
                parameter.grad = None
        return steps

    expected: list[Tensor | None] = [None] * 8
    for rank, used in uses.items():
        plain = copy.deepcopy(model)
        (plain(x[rank::3], used).sum() / ROWS).backward()
        for place, parameter in enumerate(plain.parameters()):
            if parameter.grad is not None:
                before = expected[place]
                expected[place] = parameter.grad if before is None else before + parameter.grad
    assert [gradient is None for gradient in expected] == [False] * 4 + [True] * 4
    for outcome in run(work, 3):
        for step in outcome:
            assert_same(step, expected)


def test_a_rank_without_samples_takes_part_with_weight_0() -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(3, 2), torch.randn(4, 3)

    def work() -> list[Tensor | None]:
        peer = Peer(model, open_link())
        weight = 0.0 if peer.link.rank == 1 else 1 / len(x)
        peer.split.backward(peer.model(x).sum() * weight, (), last=True)
        peer.fusion.finish()
        return peer.gradients()

    assert_same(run(work, 2)[1], serial(model, x))


def test_accumulated_pieces_are_sent_once_when_the_last_is_done() -> None:
    torch.manual_seed(0)
    model, x = Branches(), torch.randn(ROWS, 3)
    pieces = [[0, 1], [0, 2], [0]]  # layer 1 and 2 get nothing in the last one, layer 3 never

    def work() -> tuple[list[Tensor | None], int, int]:
        peer = Peer(model, open_link())
        for number, used in enumerate(pieces):
            peer.backward(x, last=number == 2, used=used)
        peer.fusion.finish()
        return peer.gradients(), peer.link.sent_bytes, peer.fusion.payload_bytes

    plain = copy.deepcopy(model)
    for used in pieces:
        (plain(x, used).sum() / ROWS).backward()
    for gradients, sent, payload in run(work, 2):
        assert_same(gradients, [parameter.grad for parameter in plain.parameters()])
        assert sent == payload  # 2 (n-1)/n of it


@pytest.mark.parametrize("set_to_none", [True, False])
def test_steps_that_follow_each_other_equal_those_of_one_process(set_to_none: bool) -> None:
    torch.manual_seed(0)
    model = Zoo(4, 2)
    batches = [torch.randn(ROWS, 5) for _ in range(4)]

    def train(module: nn.Module, backward: Callable[[Tensor], None]) -> list[Tensor]:
        optimizer = torch.optim.SGD(module.parameters(), lr=0.01, momentum=0.9)
        for x in batches:
            backward(x)
            optimizer.step()
            optimizer.zero_grad(set_to_none=set_to_none)
        return [parameter.detach() for parameter in module.parameters()]

    def work() -> list[Tensor]:
        peer = Peer(model, open_link())
        return train(peer.model, lambda x: (peer.step(x), None)[1])

    plain = copy.deepcopy(model)
    expected = train(plain, lambda x: (plain(x).sum() / ROWS).backward())
    outcomes = run(work, 3)
    assert_same(outcomes[0], expected)
    assert_equal_everywhere([list(outcome) for outcome in outcomes])


def test_sums_are_handed_out_without_a_copy_and_used_again() -> None:
    model, x = nn.Linear(3, 2), torch.randn(4, 3)

    def work() -> bool:
        peer = Peer(model, open_link(), bucket_bytes=10**9)
        places = set()
        for _ in range(3):
            peer.step(x)
            assert peer.model.weight.grad is not None
            places.add(peer.model.weight.grad.data_ptr())
            peer.model.zero_grad(set_to_none=True)
        return len(places) == 1

    assert all(run(work, 2))


@pytest.mark.parametrize(
    "keep",
    [
        lambda gradient: gradient,
        lambda gradient: gradient.detach(),
        lambda gradient: gradient.view(-1),
        lambda gradient: gradient[:1],
        lambda gradient: gradient.numpy(),
    ],
    ids=["itself", "detached", "flat", "slice", "numpy"],
)
def test_a_gradient_that_a_script_keeps_is_not_written_over(keep: Callable[[Tensor], Any]) -> None:
    torch.manual_seed(0)
    model, first, second = nn.Linear(3, 2), torch.randn(4, 3), torch.randn(4, 3)

    def work() -> None:
        peer = Peer(model, open_link(), bucket_bytes=10**9)
        expected = peer.step(first)[0]
        assert expected is not None
        assert peer.model.weight.grad is not None
        kept = keep(peer.model.weight.grad)
        peer.model.zero_grad(set_to_none=True)
        assert_same(peer.step(second), serial(model, second))
        assert torch.equal(torch.as_tensor(kept), torch.as_tensor(keep(expected)))

    run(work, 2)


def test_a_gradient_that_a_script_replaces_is_what_is_sent() -> None:
    model, x = nn.Linear(3, 3, bias=False), torch.randn(4, 3)

    def work() -> None:
        peer = Peer(model, open_link())
        peer.step(x)
        weight = peer.model.weight
        assert weight.grad is not None
        weight.grad = weight.grad.t()  # the same memory, other strides
        expected = 2 * weight.grad.clone()
        peer.fusion.finish()
        assert_same([weight.grad], [expected])

    run(work, 2)


def test_a_gradient_that_is_gone_counts_as_none_not_as_that_of_the_step_before() -> None:
    model, x = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)), torch.randn(4, 3)

    def work() -> list[Tensor | None]:
        gone = False

        def drop(parameter: Tensor) -> None:
            if gone:
                parameter.grad = None

        def watch_first(module: nn.Module) -> None:  # before the fusion does
            next(module.parameters()).register_post_accumulate_grad_hook(drop)

        peer = Peer(model, open_link(), bucket_bytes=10**9, prepare=watch_first)
        peer.step(x)
        peer.model.zero_grad(set_to_none=True)
        gone = True
        return peer.step(x)

    for gradients in run(work, 2):
        assert gradients[0] is None
        assert_same(gradients[1:], serial(model, x)[1:])


def test_one_backward_pass_too_many_is_refused() -> None:
    model, x = nn.Linear(3, 2), torch.randn(4, 3)

    def work() -> None:
        peer = Peer(model, open_link())
        peer.backward(x)
        peer.backward(x)

    error = first_failure(launch_threads(work, 2))
    assert isinstance(error, UserError)
    assert "became final twice in one step; allowed: one backward pass" in str(error)


def test_sparse_and_complex_gradients_are_refused() -> None:
    model = nn.Sequential(nn.Embedding(5, 2, sparse=True))

    def work() -> None:
        Peer(model, open_link()).step(torch.arange(4))

    error = first_failure(launch_threads(work, 2))
    assert isinstance(error, UserError)
    assert "the gradient of 0.weight is sparse; allowed: dense" in str(error)

    def build() -> None:
        odd = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
        GradientFusion(["odd"], [odd], Fuser(Fusion(), open_link()))

    error = first_failure(launch_threads(build, 2))
    assert isinstance(error, UserError)
    assert "parameter odd is complex" in str(error)


def test_a_step_can_be_forgotten_at_any_stage_and_the_next_one_is_right() -> None:
    torch.manual_seed(0)
    model, x, y = Branches(), torch.randn(ROWS, 3), torch.randn(ROWS, 3)

    def work() -> list[Tensor | None]:
        peer = Peer(model, open_link(), bucket_bytes=1)
        if peer.link.rank == 0:
            peer.backward(x, used=[0, 1, 2, 3])  # all buckets are under way
        elif peer.link.rank == 1:
            peer.backward(x, used=[2, 3])  # some are; the third rank has begun nothing
        peer.fusion.forget()
        assert all(parameter.grad is None for parameter in peer.parameters)
        return peer.step(y, used=[0, 3])

    outcomes = run(work, 3)
    assert_same(outcomes[0], serial(model, y, used=[0, 3]))
    assert_equal_everywhere(outcomes)


class Recorder(Link):
    """A link that notes when transfers start; its peer sends zeros."""

    def __init__(self) -> None:
        self.rank, self.members, self.timeout_s = 0, (0, 1), 1.0
        self.started: list[str] = []

    def all_reduce(self, tensor: Tensor, operation: str) -> Work:
        self.started.append(operation)
        return Done()

    def broadcast(self, tensor: Tensor, operation: str, root: int = 0) -> Work:
        raise NotImplementedError

    send = receive = broadcast  # type: ignore[assignment]

    def alive(self) -> tuple[int, ...]:
        return self.members

    def close(self) -> None: ...


def test_buckets_start_in_order_while_backward_still_runs() -> None:
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(4)))
    link = Recorder()
    peer = Peer(model, link, bucket_bytes=1)
    before_first_layer: list[int] = []
    peer.model[0].register_full_backward_hook(
        lambda *_: before_first_layer.append(len(link.started))
    )
    x = torch.randn(4, 3, requires_grad=True)
    peer.backward(x)
    assert before_first_layer[0] >= 6  # two parameters for each of the three layers behind it
    assert link.started == [f"fuse gradients, bucket {number}" for number in range(8)]
    peer.fusion.finish()
    assert len(link.started) == 8


def test_without_peers_gradients_stay_as_they_are() -> None:
    model, x = nn.Linear(3, 2), torch.randn(4, 3)
    peer = Peer(model, LoneLink())
    peer.backward(x)
    before = peer.parameters[0].grad
    peer.fusion.finish()
    assert peer.parameters[0].grad is before
    assert peer.fusion.payload_bytes == 0


def test_nothing_to_fuse_is_fine() -> None:
    def work() -> None:
        fusion = GradientFusion([], [], Fuser(Fusion(), open_link()))
        fusion.finish()
        fusion.forget()

    run(work, 2)


@pytest.mark.parametrize("count", range(4))
def test_a_peer_that_dies_in_any_bucket_is_named_by_all_others(count: int) -> None:
    model, x = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)), torch.randn(ROWS, 3)

    def work() -> list[Tensor | None]:
        peer = Peer(model, open_link(), bucket_bytes=1)
        peer.link.step = 8
        return peer.step(x)

    results = launch_threads(work, 3, script=Script(kill={(1, count)}), timeout_s=20)
    assert isinstance(results[1], Killed)
    for rank in (0, 2):
        error = results[rank]
        assert isinstance(error, PeerLost)
        assert (error.rank, error.peer, error.step) == (rank, 1, 8)
        assert error.operation == f"fuse gradients, bucket {count}"
