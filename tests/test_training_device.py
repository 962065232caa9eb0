"""Which GPU a rank takes, where the count of GPUs and what processes see are made up."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

from allfuse.base.errors import PeerLost, UserError
from allfuse.launcher.torchrun import JoinedWorld
from allfuse.link.thread import Hub
from allfuse.training import device as devices
from allfuse.training.device import choose_device


class Started(JoinedWorld):
    """A process of torchrun that sees some GPUs, with a board in place of the store."""

    def __init__(self, board: Hub, place: int, count: int, sees: tuple[str, ...]) -> None:
        self.common, self.place, self.everybody = board, place, count
        self.rank, self.size, self.timeout_s = place, count, 5.0
        self.local_rank, self.local_size = place, count
        self.sees = sees
        self._keys = Counter()


def choose(monkeypatch: pytest.MonkeyPatch, name: str | None, *sees: tuple[str, ...]) -> list[str]:
    """What processes of one host choose that see these GPUs; an error in its place."""
    board = Hub(1)
    worlds = [Started(board, place, len(sees), each) for place, each in enumerate(sees)]
    here: dict[int, Started] = {}

    def seen() -> Started:
        from threading import get_ident

        return here[get_ident()]

    def work(world: Started) -> str:
        from threading import get_ident

        here[get_ident()] = world
        try:
            return str(choose_device(name, world))
        except (UserError, PeerLost) as error:
            return str(error)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(seen().sees))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(seen().sees))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid=seen().sees[index])
    )
    with ThreadPoolExecutor(len(worlds)) as pool:
        return list(pool.map(work, worlds))


@pytest.mark.parametrize("name", [None, "cuda"])
def test_each_takes_the_gpu_of_its_local_rank_where_all_see_all(
    monkeypatch: pytest.MonkeyPatch, name: str | None
) -> None:
    assert choose(monkeypatch, name, ("a", "b"), ("a", "b")) == ["cuda:0", "cuda:1"]


@pytest.mark.parametrize("name", [None, "cuda"])
def test_each_takes_its_first_gpu_where_none_sees_that_of_another(
    monkeypatch: pytest.MonkeyPatch, name: str | None
) -> None:
    assert choose(monkeypatch, name, ("a",), ("b",), ("c",)) == ["cuda:0"] * 3
    assert choose(monkeypatch, name, ("a", "b"), ("c", "d"), ("e", "f")) == ["cuda:0"] * 3


def test_workers_that_see_the_same_gpu_compute_on_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose(monkeypatch, None, ("a",), ("a",)) == ["cpu", "cpu"]
    assert choose(monkeypatch, None, ("a",), ("a",), ("b",)) == ["cpu", "cpu", "cuda:0"]
    assert choose(monkeypatch, None, (), ()) == ["cpu", "cpu"]


def test_a_gpu_that_is_asked_for_and_is_anothers_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first, second = choose(monkeypatch, "cuda", ("a",), ("a",))
    assert first == second
    assert "this process sees 1 GPUs for 2 workers, and others see the same" in first
    assert "--gpus-per-task=1" in first


def test_one_that_says_nothing_of_its_gpus_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(devices, "_identity", lambda index: "a")
    world = Started(Hub(1), 0, 2, ("a",))
    world.timeout_s = 0.05
    with pytest.raises(PeerLost, match="lost rank 1 in compare devices"):
        choose_device(None, world)
