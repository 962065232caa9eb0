"""The hook for DistributedDataParallel: every fusion of a data axis, in a loop of others."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import allfuse as af
from allfuse.base.errors import PeerLost, PlanError, UserError, WorkerFailed
from allfuse.base.torch_private import PrefixStore
from allfuse.codec import CODECS
from allfuse.codec.memory import Memory
from allfuse.fusion.hook import CommHook
from allfuse.fusion.residuals import Remainder, Residuals
from allfuse.launcher.base import current_world
from allfuse.launcher.local import launch_local
from allfuse.plan.parse import read_product
from allfuse.rule import RULES
from allfuse.topology import TOPOLOGIES

EXACT = [name for name, topology in TOPOLOGIES.items() if topology.exact]
ARGUMENTS = {"topk": "(0.1)", "randomk": "(0.1)", "lowrank": "(2)", "clipped": "(0.05)"}
LOSSY = [name + ARGUMENTS.get(name, "") for name in CODECS if name != "identity"]
MEANS = [
    *(f"topology={name}" for name in EXACT),
    "topology=tree(double)",
    "topology=central(servers=2)",
    "topology=auto",
    "rule=clipped(1000.0)",
    "rule=trimmed(0.0)",
]
CODED = [*(f"codec={codec}" for codec in LOSSY), "topology=ring, codec=topk(0.1)"]
VALUES = [name for name in RULES if not RULES[name].of_changes]
OTHERS = [f"rule={name}{ARGUMENTS.get(name, '')}" for name in VALUES if name != "mean"]
SIZE = 3


def join() -> None:
    """The group that the owner of a loop makes."""
    world = current_world()
    assert world is not None
    store = PrefixStore("owner", world.store_board.store)  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=world.rank, world_size=world.size)


class Owner:
    """A loop of others: a model in several buckets, cut anew after the first step."""

    def __init__(self, keywords: str | None, **options: Any) -> None:
        torch.manual_seed(0)
        layers = [nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 2)]
        self.model = nn.Sequential(*layers)
        self.parallel = DistributedDataParallel(self.model, bucket_cap_mb=0.002)
        self.hook: CommHook | None = None
        self.buckets: list[list[int]] = []  # of the last backward pass
        if keywords is not None:
            plan = f"data({dist.get_world_size()}, {keywords})"
            self.hook = af.comm_hook(plan, timeout_s=20, **options)
            self.parallel.register_comm_hook(None, self._note)
        self.random = torch.Generator().manual_seed(dist.get_rank())

    def _note(self, state: object, bucket: Any) -> torch.futures.Future[Tensor]:
        assert self.hook is not None
        if bucket.index() == 0:
            self.buckets = []
        self.buckets.append([id(parameter) for parameter in bucket.parameters()])
        return self.hook(state, bucket)

    _note.__annotations__.clear()

    def backward(self) -> None:
        self.model.zero_grad()
        self.parallel(torch.randn(4, 6, generator=self.random)).square().mean().backward()

    def gradient(self) -> Tensor:
        return torch.cat([p.grad.reshape(-1) for p in self.model.parameters()])  # type: ignore

    def local_gradient(self) -> Tensor:
        """That of the batch that comes next, of this rank alone."""
        before = self.random.get_state()
        with self.parallel.no_sync():
            self.backward()
        self.random.set_state(before)
        return self.gradient().clone()

    def train(self, steps: int) -> Tensor:
        optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        for _ in range(steps):
            self.backward()
            optimizer.step()
        return nn.utils.parameters_to_vector(self.model.parameters()).detach()

    def residual(self) -> Tensor:
        """What this rank has not sent yet, in the order of the model."""
        assert self.hook is not None
        return torch.cat([part["residual"] for part in self.hook.state_dict()["parameters"]])


def is_equal_everywhere(value: Tensor) -> bool:
    low, high = value.clone(), value.clone()
    dist.all_reduce(low, op=dist.ReduceOp.MIN)
    dist.all_reduce(high, op=dist.ReduceOp.MAX)
    return torch.equal(low, high)


def total(value: Tensor) -> Tensor:
    summed = value.clone()
    dist.all_reduce(summed)
    return summed


def run(function: Callable[[], Any], workers: int = SIZE) -> Any:
    """As ranks of a group of their own; what rank 0 returns."""

    def work() -> Any:
        join()
        result = function()
        # In the other order torch 2.13 may deadlock: models are gone by now.
        dist.destroy_process_group()
        return result

    return launch_local(work, workers, timeout_s=60)


@cache
def trained() -> dict[str, tuple[Tensor, bool]]:
    """The weights after some steps under each plan that is a mean, and whether ranks agree."""

    def train() -> dict[str, tuple[Tensor, bool]]:
        found = {}
        for keywords in (None, *MEANS, *OTHERS):
            weights = Owner(keywords).train(3)
            found[str(keywords)] = (weights, is_equal_everywhere(weights))
        return found

    made: dict[str, tuple[Tensor, bool]] = run(train)
    return made


@pytest.mark.parametrize("keywords", MEANS)
def test_every_topology_gives_what_distributed_data_parallel_gives(keywords: str) -> None:
    weights, equal = trained()[keywords]
    assert equal  # bit for bit
    torch.testing.assert_close(weights, trained()["None"][0], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("keywords", OTHERS)
def test_other_rules_leave_all_ranks_equal(keywords: str) -> None:
    assert trained()[keywords][1]


def follow_the_rules() -> dict[str, Tensor]:
    """Each rank's own gradient of one step, and what rules make of them."""
    found = {}
    for rule in ("median", "vote", "clipped(0.05)"):
        owner = Owner(f"rule={rule}")
        own = owner.local_gradient()
        slots = torch.zeros(SIZE, own.numel())
        slots[dist.get_rank()] = own
        found["each"] = total(slots)
        owner.backward()
        found[rule] = owner.gradient().clone()
    return found


def test_rules_of_gradients_are_what_they_say() -> None:
    found = run(follow_the_rules)
    each = found["each"]
    torch.testing.assert_close(found["median"], each.median(0).values)
    torch.testing.assert_close(found["vote"], each.sign().sum(0).sign())
    shares = (0.05 / each.norm(dim=1)).clamp(max=1.0)
    assert bool((shares < 1).any())  # the norm is that of all buckets together
    torch.testing.assert_close(found["clipped(0.05)"], (shares[:, None] * each).mean(0))


@cache
def conserved() -> dict[str, tuple[Tensor, Tensor, bool, bool]]:
    """For each codec: what was to be fused, what was fused and what is left, over some steps."""

    def follow() -> dict[str, Any]:
        found = {}
        for keywords in CODED:
            owner, steps = Owner(keywords), []
            wanted, fused = torch.zeros(1), torch.zeros(1)
            equal, cuts = True, []
            for step in range(4):
                wanted = wanted + total(owner.local_gradient()) / SIZE
                if step == 3:  # another run goes on where this one stops
                    assert owner.hook is not None
                    state, random = owner.hook.state_dict(), owner.random
                    owner = Owner(keywords)
                    assert owner.hook is not None
                    owner.hook.load_state_dict(state)
                    owner.random = random
                owner.backward()
                fused = fused + owner.gradient()
                equal &= is_equal_everywhere(owner.gradient())
                cuts.append(owner.buckets)
            steps = [one != other for one, other in pairwise(cuts)]
            left = total(owner.residual())
            found[keywords] = (wanted, fused, left, equal, steps[0])
        return found

    made: dict[str, tuple[Tensor, Tensor, bool, bool]] = run(follow)
    return made


@pytest.mark.parametrize("keywords", CODED)
def test_a_lossy_codec_sends_later_what_it_leaves_out(keywords: str) -> None:
    """Nothing is lost when buckets are cut anew, nor when a run is resumed."""
    wanted, fused, left, equal, was_cut_anew = conserved()[keywords]
    assert equal
    assert was_cut_anew
    torch.testing.assert_close(fused + left, wanted, rtol=1e-4, atol=1e-6)
    assert left.abs().max() > 0 or "fp16" in keywords


def warm_up() -> list[tuple[bool, bool]]:
    """Of each step: whether it is that of no codec, and whether all of it was sent. The second
    one is that of a run that goes on where the first has stopped."""
    found = []
    plain, coded = Owner("topology=central"), Owner("topology=central, codec=topk(0.1, warm=2)")
    for step in range(3):
        if step == 1:
            assert coded.hook is not None
            state, random = coded.hook.state_dict(), coded.random
            coded = Owner("topology=central, codec=topk(0.1, warm=2)")
            assert coded.hook is not None
            coded.hook.load_state_dict(state)
            coded.random = random
        plain.backward()
        coded.backward()
        found.append((torch.equal(plain.gradient(), coded.gradient()), not coded.residual().any()))
    return found


def test_warm_rounds_are_counted_through_a_run_that_is_resumed() -> None:
    assert run(warm_up, 2) == [(True, True), (True, True), (False, False)]


def other_rank() -> bool:
    """What is left after one step by lowrank(2) that begins with what lowrank(1) has left."""
    first, second = Owner("codec=lowrank(1)"), Owner("codec=lowrank(2)")
    assert first.hook is not None
    assert second.hook is not None
    first.backward()
    second.hook.load_state_dict(first.hook.state_dict())
    second.backward()
    return bool(second.residual().isfinite().all())


def test_a_codec_does_not_go_on_from_what_another_remembers() -> None:
    assert run(other_rank, 2)


def other_codecs() -> str:
    owner = Owner(("codec=int8", "codec=int4")[dist.get_rank()])
    with pytest.raises(UserError) as told:
        owner.backward()
    return str(told.value)


def test_other_plans_on_other_ranks_are_refused() -> None:
    assert "the plan of rank 1 is not that of rank 0" in run(other_codecs, 2)


def overflow() -> dict[str, tuple[bool, bool]]:
    """A step in which one rank's gradient is infinite, as loss scaling provokes, and the next."""
    found = {}
    for keywords in CODED:
        owner, finite = Owner(keywords), []
        for step in range(3):
            if step == 1 and dist.get_rank() == 1:
                owner.model[0].register_forward_pre_hook(_blow_up)
            else:
                owner.model[0]._forward_pre_hooks.clear()
            owner.backward()
            finite.append(bool(owner.gradient().isfinite().all()))
        found[keywords] = (finite[1], finite[2] and is_equal_everywhere(owner.gradient()))
    return found


def _blow_up(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
    return (inputs[0] * float("inf"),)


def test_a_gradient_that_is_not_finite_is_seen_by_all_and_does_not_come_again() -> None:
    for keywords, (during, after) in run(overflow, 2).items():
        assert not during, keywords
        assert after, keywords


def test_the_group_may_be_a_part_of_the_world() -> None:
    def train() -> bool:
        mine = [dist.get_rank() // 2 * 2, dist.get_rank() // 2 * 2 + 1]
        group, _ = dist.new_subgroups(2)
        same = True
        for keywords in ("", "topology=ring", "codec=topk(0.5)"):
            torch.manual_seed(0)
            parallel = DistributedDataParallel(nn.Linear(3, 2), process_group=group)
            hook = af.comm_hook(f"data(2, {keywords})", group, timeout_s=20)
            parallel.register_comm_hook(None, hook)
            rows = torch.full((1, 3), float(dist.get_rank()))
            parallel(rows).sum().backward()
            gradient = parallel.module.weight.grad
            expected = sum(mine) / 2 if "topk" not in keywords else gradient.max()
            same &= bool((gradient == expected).all() | (gradient == 0).any())
            hook.close()
            hook.close()  # once is enough, twice does no harm
        return bool(total(torch.tensor(float(same))) == dist.get_world_size())

    assert run(train, 4)


def lose_a_peer(how: str, keywords: str, told: Path) -> None:
    owner = Owner(keywords)
    assert owner.hook is not None
    owner.hook.timeout_s = 1.0
    owner.train(2)
    if dist.get_rank() == 1:
        if how == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        deadline = time.monotonic() + 20
        while not told.exists() and time.monotonic() < deadline:
            time.sleep(0.01)  # emulated silence
        os._exit(0)
    begin = time.monotonic()
    with pytest.raises(PeerLost) as caught:
        owner.train(1)
    told.write_text(f"{time.monotonic() - begin}\n{caught.value}")
    os._exit(0)  # a group that has lost a rank may wait for it for ever


@pytest.mark.parametrize("how", ["dies", "falls silent"])
@pytest.mark.parametrize("keywords", ["", "topology=ring", "codec=topk(0.1)"])
def test_a_lost_peer_is_named_within_the_deadline(keywords: str, how: str, tmp_path: Path) -> None:
    told = tmp_path / "told"
    with pytest.raises(WorkerFailed):
        run(lambda: lose_a_peer(how, keywords, told), 2)
    seconds, message = told.read_text().split("\n", 1)
    assert float(seconds) < 10
    assert message.startswith("rank 0 lost rank 1 in fuse gradients, bucket ")
    assert "at step 2 after" in message


def test_plans_that_a_loop_of_others_cannot_follow_are_refused() -> None:
    def refuse() -> list[str]:
        refused = []
        for plan in ("data(3)", "site(2)", "site(1) * data(2)"):
            with pytest.raises(PlanError) as caught:
                af.comm_hook(plan)
            refused.append(str(caught.value))
        return refused

    size, kind, product = run(refuse, 2)
    assert "the process group has 2 ranks; nearest that can: data(2)" in size
    assert "fuses gradients of whole models only; nearest that can: data(2)" in kind
    assert "nearest that can: data(2)" in product


def test_the_hook_needs_a_process_group() -> None:
    with pytest.raises(UserError, match=r"call torch\.distributed\.init_process_group"):
        af.comm_hook("data(2)")


def test_a_group_of_one_has_nothing_to_fuse() -> None:
    def train() -> bool:
        weights = [Owner(keywords).train(2) for keywords in (None, "", "codec=topk(0.1)")]
        return all(torch.equal(weights[0], others) for others in weights[1:])

    assert run(train, 1)


# Residuals, without processes.


PARAMETERS = [nn.Parameter(torch.zeros(size)) for size in (3, 2, 4)]
ALL = torch.zeros(9)


def fill(memory: Memory, parameters: list[nn.Parameter]) -> None:
    """The residual of each parameter is its number in PARAMETERS."""
    numbers = [next(n for n, own in enumerate(PARAMETERS) if own is p) for p in parameters]
    for place, (residual, number) in enumerate(zip(memory.residuals(), numbers, strict=True)):
        residual.fill_(number + 1.0)
        memory.kept[place] = torch.tensor([float(number)])


def test_residuals_follow_their_parameters_into_other_buckets() -> None:
    first, second, third = PARAMETERS
    residuals = Residuals(Memory)
    fill(residuals.of(0, [third], ALL), [third])
    fill(residuals.of(1, [first, second], ALL), [first, second])
    same = residuals.of(1, [first, second], ALL)
    assert same.residual.tolist() == [1.0] * 3 + [2.0] * 2
    early = residuals.of(0, [third, second], ALL)
    assert early.residual.tolist() == [3.0] * 4 + [2.0] * 2
    assert early.kept[0].tolist() == [2.0]
    assert early.kept[1].tolist() == [1.0]
    saved = residuals.state_dict()  # while the first parameter is in no bucket
    assert [part["residual"].tolist() for part in saved] == [[1.0] * 3, [2.0] * 2, [3.0] * 4]
    assert residuals.of(1, [first], ALL).residual.tolist() == [1.0] * 3


@pytest.mark.parametrize("cuts", [[[2], [0, 1]], [[0, 1, 2]], [[1, 2], [0]]])
def test_residuals_are_loaded_whatever_the_first_buckets_are(cuts: list[list[int]]) -> None:
    saved = [
        Remainder(residual=torch.full((p.numel(),), number + 1.0), kept=None)
        for number, p in enumerate(PARAMETERS)
    ]
    residuals = Residuals(Memory)
    residuals.load_state_dict(saved)
    assert len(residuals.state_dict()) == 3
    for number, cut in enumerate(cuts):
        memory = residuals.of(number, [PARAMETERS[place] for place in cut], ALL)
        for place, residual in zip(cut, memory.residuals(), strict=True):
            assert residual.tolist() == [place + 1.0] * PARAMETERS[place].numel()
    saved[0]["residual"].fill_(7.0)  # what was loaded is a copy
    assert residuals.state_dict()[0]["residual"].tolist() == [1.0] * 3
    residuals.load_state_dict(saved)
    assert residuals.state_dict()[0]["residual"].tolist() == [7.0] * 3


def test_residuals_of_another_model_are_refused() -> None:
    other = [Remainder(residual=torch.zeros(3), kept=None)]
    residuals = Residuals(Memory)
    residuals.load_state_dict(other)
    with pytest.raises(UserError, match="residuals of another model"):
        residuals.of(0, PARAMETERS[1:2], ALL)
    residuals = Residuals(Memory)
    residuals.of(0, PARAMETERS, ALL)
    with pytest.raises(UserError, match="residuals of another model"):
        residuals.load_state_dict(other)


def test_lossy_codecs_of_this_file_are_all_there_are() -> None:
    assert {read_product(f"data(1, codec={c})") and c.split("(")[0] for c in LOSSY} == {*CODECS} - {
        "identity"
    }
