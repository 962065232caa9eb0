"""The constants of a link: measured right, equal on all peers, and remembered."""

from __future__ import annotations

import doctest
import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from allfuse.launcher.base import current_world
from allfuse.launcher.thread import first_failure, launch_threads
from allfuse.link import Link
from allfuse.link import costs as costs_module
from allfuse.link.costs import Costs
from allfuse.link.costs import Path as Way
from allfuse.link.memo import cache_folder, key_of, known_costs, look_up, remember
from allfuse.link.probe import MOST_PAIRS, confirm, crowds_between, crowds_inside, pairs, probe
from allfuse.link.thread import Script

TWO_HOSTS = ("a", "a", "b", "b")
WAY = Way(alpha_s=1e-4, gap_s=1e-5, beta_s_per_byte=1e-9, shared_s_per_byte=2e-9)
COSTS = Costs(inside=WAY, between=WAY, gamma_s_per_byte=0.1)


def open_link() -> Link:
    world = current_world()
    assert world is not None
    return world.link("probe", tuple(range(world.size)), torch.device("cpu"))


def on_threads(work: Callable[[Link], Any], n: int, script: Script | None = None) -> list[Any]:
    outcomes = launch_threads(lambda: work(open_link()), n, script=script)
    assert first_failure(outcomes) is None
    return outcomes


def test_all_peers_end_with_the_same_numbers() -> None:
    found = on_threads(lambda link: probe(link, TWO_HOSTS), 4)
    assert len({tuple(costs.numbers()) for costs in found}) == 1
    assert all(math.isfinite(number) and number >= 0 for number in found[0].numbers())


def test_a_slow_link_costs_its_delay() -> None:
    delay_s = 0.002
    script = Script(delay_s=lambda rank, count: delay_s)
    slow = on_threads(lambda link: probe(link, ("a", "b")), 2, script)[0]
    quick = on_threads(lambda link: probe(link, ("a", "b")), 2)[0]
    # A message there costs a delay where it is sent; the receive was posted meanwhile.
    assert delay_s <= slow.between.alpha_s < 3 * delay_s
    assert quick.between.alpha_s < delay_s
    assert 0.5 * delay_s < slow.between.gap_s < 2 * delay_s


def test_a_class_that_is_not_there_costs_what_the_other_does() -> None:
    found = on_threads(lambda link: probe(link, ("a", "b")), 2)[0]
    assert found.inside == found.between


def test_few_pairs_stand_for_all() -> None:
    hosts = tuple(str(rank // 8) for rank in range(800))
    for inside in (True, False):
        assert 0 < len(pairs(hosts, inside)) <= MOST_PAIRS
        for first, second in pairs(hosts, inside):
            assert (hosts[first] == hosts[second]) == inside
    assert [len(trial.pairs) for trial in crowds_inside(hosts)] == [4] * MOST_PAIRS
    assert [len(trial.pairs) for trial in crowds_between(hosts)] == [8] * MOST_PAIRS
    assert crowds_between(("a", "b")) == []


def believed(*_: object) -> bool:
    return True


def ask(folder: Path, measured: list[int]) -> Callable[[Link], tuple[Costs, bool]]:
    """Asks for the costs; who measures says so."""

    def measure(link: Link, hosts: Sequence[str], device: torch.device | str) -> Costs:
        measured.append(link.rank)
        return COSTS

    return lambda link: known_costs(link, TWO_HOSTS, folder=folder, measure=measure, holds=believed)


def test_what_was_measured_is_remembered(tmp_path: Path) -> None:
    measured: list[int] = []
    assert on_threads(ask(tmp_path / "new", measured), 4) == [(COSTS, True)] * 4
    assert sorted(measured) == [0, 1, 2, 3]
    assert on_threads(ask(tmp_path / "new", measured), 4) == [(COSTS, False)] * 4
    assert len(measured) == 4
    assert [path.name[:6] for path in (tmp_path / "new").iterdir()] == ["links-"]


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"\xff\xfe", b"null", b"[" * 100_000, b'{"key": "x", "numbers": []}'],
)
def test_a_damaged_or_foreign_file_is_measured_anew(tmp_path: Path, content: bytes) -> None:
    on_threads(ask(tmp_path, []), 4)
    (file,) = tmp_path.iterdir()
    file.write_bytes(content)
    assert on_threads(ask(tmp_path, []), 4) == [(COSTS, True)] * 4
    assert on_threads(ask(tmp_path, []), 4) == [(COSTS, False)] * 4


@pytest.mark.parametrize(
    "numbers",
    [
        [1.0],
        [-1.0] * 9,
        ["1"] * 9,
        [float("nan")] * 9,
        [float("inf")] * 9,
        [10**400] * 9,
        [True] * 9,
    ],
)
def test_numbers_that_cannot_be_costs_are_not_believed(tmp_path: Path, numbers: list[Any]) -> None:
    remember(tmp_path, "key", COSTS)
    (file,) = tmp_path.iterdir()
    assert look_up(tmp_path, "key") == COSTS
    file.write_text(json.dumps({"key": "key", "numbers": numbers}))
    assert look_up(tmp_path, "key") is None


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo], ids=["folder", "pipe"])
def test_what_is_no_file_in_its_place_is_no_error(
    tmp_path: Path, make: Callable[[Path], None]
) -> None:
    on_threads(ask(tmp_path, []), 2)
    (file,) = tmp_path.iterdir()
    file.unlink()
    make(file)
    assert on_threads(ask(tmp_path, []), 2)[0][0] == COSTS
    assert [each.name for each in tmp_path.iterdir()] == [file.name]


def test_what_is_remembered_of_another_link_is_measured_anew(tmp_path: Path) -> None:
    def work(link: Link) -> tuple[Costs, bool]:
        return known_costs(link, TWO_HOSTS, folder=tmp_path, measure=lambda *_: costs)

    for beta in (1e-3, 1e-16):  # a link much slower or faster than threads are
        way = Way(alpha_s=0.0, gap_s=0.0, beta_s_per_byte=beta, shared_s_per_byte=beta)
        costs = Costs(inside=way, between=way, gamma_s_per_byte=0.0)
        for _ in range(2):  # what was measured is wrong, so that it never holds
            assert on_threads(work, 4) == [(costs, True)] * 4


def test_what_a_link_costs_still_holds_for_all_peers_or_for_none() -> None:
    delay_s = 0.2  # far more than a busy machine adds

    def script() -> Script:
        return Script(delay_s=lambda rank, count: delay_s)

    hosts = ("a", "b")
    way = Way(alpha_s=2 * delay_s, gap_s=0.0, beta_s_per_byte=1e-9, shared_s_per_byte=1e-9)
    costs = Costs(inside=way, between=way, gamma_s_per_byte=0.0)
    told = on_threads(lambda link: confirm(costs, link, hosts), 2, script())
    assert told == [True] * 2
    told = on_threads(lambda link: confirm(costs, link, hosts), 2)
    assert told == [False] * 2


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("no folder")
    assert on_threads(ask(blocked / "allfuse", []), 4) == [(COSTS, True)] * 4
    assert blocked.read_text() == "no folder"


def test_other_hosts_ranks_or_kinds_have_other_numbers() -> None:
    def keys(link: Link) -> set[str]:
        return {
            key_of(link, TWO_HOSTS, "cpu"),
            key_of(link, ("a", "a", "a", "b"), "cpu"),
            key_of(link, ("a", "a"), "cpu"),
            key_of(link, TWO_HOSTS, "cuda"),
        }

    assert [len(found) for found in on_threads(keys, 2)] == [4, 4]


def test_the_cache_is_where_the_system_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", f"{os.sep}somewhere")
    assert cache_folder() == Path("/somewhere/allfuse")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # the standard has it ignored
    monkeypatch.setenv("HOME", "/home/me")
    assert cache_folder() == Path("/home/me/.cache/allfuse")


def test_the_examples_in_docstrings_are_true() -> None:
    found = doctest.testmod(costs_module)
    assert (found.failed, found.attempted > 0) == (0, True)
