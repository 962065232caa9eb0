"""One merge by several ranks: the same bytes, whoever is lost and however many go on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_merge import Broken, break_off, fuse, make_model, make_rule, recipe_of, write_models

from allfuse.base.errors import MergeError, PeerLost
from allfuse.launcher import current_world
from allfuse.launcher.thread import launch_threads
from allfuse.merge import outline as outlining
from allfuse.merge.journal import Journal
from allfuse.merge.merge import Merged, merge
from allfuse.merge.outline import outline
from allfuse.merge.recipe import Recipe
from allfuse.merge.together import Together, share


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outlining, "BLOCK", 512)


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    return write_models(tmp_path)


def merge_by(ranks: int, recipe: Recipe, out: Path, timeout_s: float = 20.0) -> list[Any]:
    """What each rank returned, or raised."""

    def work() -> Any:
        return merge(recipe, out, world=current_world(), threads=1)

    return launch_threads(work, ranks, timeout_s=timeout_s)


@pytest.mark.parametrize("name", ["linear", "slerp", "ties", "dare_ties", "model_stock"])
@pytest.mark.parametrize("ranks", [2, 3])
def test_any_number_of_ranks_gives_the_same_bytes(
    name: str, ranks: int, models: list[Path], tmp_path: Path
) -> None:
    rule = make_rule(name)
    whole = fuse(rule, models, tmp_path / "whole")
    done = merge_by(ranks, recipe_of(rule, models), tmp_path / "out")
    assert all(isinstance(each, Merged) for each in done), done
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == whole
    assert not list(tmp_path.glob(".partial*"))


def test_tensors_are_shared_whole_and_evenly(models: list[Path]) -> None:
    tasks = outline(recipe_of(make_rule("ties"), models)).tasks
    shares = share(tasks, 3)
    assert sorted(task.number for own in shares for task in own) == [t.number for t in tasks]
    loads = [sum(task.target.bytes for task in own) for own in shares]
    assert max(loads) - min(loads) <= max(task.target.bytes for task in tasks)
    assert share(tasks, 1) == [list(tasks)]


@pytest.mark.parametrize("fails", [0, 1])
def test_what_ranks_left_behind_is_gone_on_with_by_any_number(
    fails: int, models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rule, out, told, seen = make_rule("ties"), tmp_path / "out", Together.told, []
    whole = fuse(rule, models, tmp_path / "whole")

    def told_or_broken(together: Together, nbytes: int) -> None:
        if together.rank == fails:
            seen.append(nbytes)
            if len(seen) == 4:
                raise Broken
        told(together, nbytes)

    with monkeypatch.context() as patch:
        patch.setattr(Together, "told", told_or_broken)
        done = merge_by(2, recipe_of(rule, models), out, timeout_s=0.3)
    assert isinstance(done[fails], Broken)
    assert isinstance(done[1 - fails], PeerLost) or fails == 0
    assert not out.exists()
    again = merge_by(3, recipe_of(rule, models), out)
    assert again[0].resumed_blocks >= 3
    assert (out / "model.safetensors").read_bytes() == whole


def test_a_rank_that_is_silent_is_named(models: list[Path], tmp_path: Path) -> None:
    recipe, out = recipe_of(make_rule("linear"), models), tmp_path / "out"

    def work() -> Any:
        world = current_world()
        assert world is not None
        return None if world.rank == 2 else merge(recipe, out, world=world, threads=1)

    done = launch_threads(work, 3, timeout_s=0.3)
    assert isinstance(done[0], PeerLost)
    assert done[0].peer == 2
    assert isinstance(done[1], Merged)


def test_a_rank_that_hears_nothing_of_the_files_gives_up(
    models: list[Path], tmp_path: Path
) -> None:
    recipe, out = recipe_of(make_rule("linear"), models), tmp_path / "out"
    out.mkdir()  # rank 0 refuses it
    done = merge_by(2, recipe, out, timeout_s=0.3)
    assert isinstance(done[0], MergeError)
    assert isinstance(done[1], PeerLost)


def test_what_all_ranks_write_is_told_to_the_first(models: list[Path], tmp_path: Path) -> None:
    told: list[int] = []

    def work() -> Any:
        world = current_world()
        assert world is not None

        def tell(name: str, **data: int) -> None:
            if world.rank == 0 and name == "merged":
                told.append(data["bytes"])

        return merge(recipe_of(make_rule("mean"), models), tmp_path / "out", world=world, tell=tell)

    launch_threads(work, 3)
    assert sum(told) == sum(v.nbytes for v in make_model(0).values())


def test_a_journal_takes_up_what_all_ranks_wrote_and_drops_a_line_that_was_cut(
    tmp_path: Path,
) -> None:
    first = Journal(tmp_path, "this merge")
    second = Journal(tmp_path, "this merge", rank=1)
    first.add(0, 0, 7)
    second.add(3, 1, 8)
    second.close()
    with open(tmp_path / "journal-1", "a") as file:
        file.write("3 2 9")
    again = Journal(tmp_path, "this merge")
    assert again.goes_on
    assert again.done == {(0, 0): 7, (3, 1): 8}
    assert [file.name for file in tmp_path.iterdir()] == ["journal"]
    assert Journal(tmp_path, "this merge", rank=2).done == again.done
    other = Journal(tmp_path, "another merge")
    assert not other.goes_on
    assert not other.done


def test_one_rank_goes_on_where_several_threads_left(models: list[Path], tmp_path: Path) -> None:
    rule, out = make_rule("dare_ties"), tmp_path / "out"
    whole = fuse(rule, models, tmp_path / "whole")
    break_off(recipe_of(rule, models), out, 3)
    done = merge_by(2, recipe_of(rule, models), out)
    assert done[0].resumed_blocks >= 3
    assert (out / "model.safetensors").read_bytes() == whole
