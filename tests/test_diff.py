"""allfuse diff: where two models differ, against the same figures computed at once."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import allfuse
from safetensors.torch import load_file, save_file
from torch import Tensor

from allfuse.base.errors import MergeError, UserError
from allfuse.base.order import natural
from allfuse.merge import difference as differing
from allfuse.merge.difference import compare
from allfuse.merge.grouping import place_of
from allfuse.merge.sums import Sums
from allfuse.observe.heatmap import page

SHAPES = {
    "emb.weight": (30, 8),
    "layers.0.up.weight": (20, 30),
    "layers.0.up.bias": (20,),
    "layers.2.up.weight": (20, 30),
    "layers.10.up.weight": (20, 30),
    "scale": (),
    "none": (0, 3),
}


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(differing, "BLOCK", 128)


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    """A base and two that come from it."""
    paths = []
    chance = torch.Generator().manual_seed(0)
    base = {name: torch.randn(shape, generator=chance) for name, shape in SHAPES.items()}
    for number in range(3):
        changed = {
            name: value + (number > 0) * 0.1 * torch.randn(value.shape, generator=chance).round()
            for name, value in base.items()
        }
        paths.append(tmp_path / f"{number}.safetensors")
        save_file(changed | {"seen": torch.tensor([number, 2**40])}, paths[-1])
    return paths


def figures(x: Tensor, y: Tensor) -> dict[str, float]:
    """The figures of whole tensors in float64."""
    x, y = x.double().flatten(), y.double().flatten()
    k = max(1, int(0.1 * len(x)))
    signed = (x != 0) | (y != 0)
    tops = [set(v.abs().sort(descending=True, stable=True).indices[:k].tolist()) for v in (x, y)]
    nonzero = [{at for at in top if v[at] != 0} for top, v in zip(tops, (x, y), strict=True)]
    return {
        "distance": float((x - y).norm() / x.norm()),
        "cosine": float(x @ y / (x.norm() * y.norm())) if x.any() and y.any() else 0.0,
        "signs": float(((x.sign() == y.sign()) & signed).sum() / signed.sum()),
        "overlap": 2 * len(nonzero[0] & nonzero[1]) / (len(nonzero[0]) + len(nonzero[1])),
        "largest": float((x - y).abs().max()),
        "changed": float((x != y).double().mean()),
    }


@pytest.mark.parametrize("since", [False, True])
def test_figures_of_tensors_are_those_computed_at_once(since: bool, models: list[Path]) -> None:
    start, one, two = (load_file(path) for path in models)
    found = compare(models[1], models[2], models[0] if since else None)
    assert [each.name for each in found.tensors] == sorted([*SHAPES, "seen"], key=natural)
    for each in found.tensors:
        if each.name in ("none", "seen"):
            continue
        values = [one[each.name], two[each.name]]
        if since:
            values = [value - start[each.name] for value in values]
        assert each.sums.figures() == pytest.approx(figures(*values), rel=2e-6, abs=1e-7), each.name


def test_figures_of_the_whole_are_those_of_all_numbers_in_one(models: list[Path]) -> None:
    one, two = (load_file(path) for path in models[1:])
    names = [name for name in one if name != "seen"]
    both = [torch.cat([model[name].flatten() for name in names]) for model in (one, two)]
    found = compare(*models[1:])
    wanted = figures(*both)
    for name in ("distance", "cosine", "signs", "largest", "changed"):
        assert found.whole.figures()[name] == pytest.approx(wanted[name], rel=2e-6), name


def test_threads_do_not_change_a_figure(models: list[Path]) -> None:
    assert compare(*models[1:], threads=1) == compare(*models[1:], threads=4)


def test_a_model_and_itself_are_the_same(models: list[Path]) -> None:
    found = compare(models[1], models[1])
    assert found.same
    assert found.whole.figures() == {
        "distance": 0.0, "cosine": 1.0, "signs": 1.0, "overlap": 1.0, "largest": 0.0, "changed": 0.0
    }  # fmt: skip


def test_large_whole_numbers_that_differ_by_one_differ(tmp_path: Path) -> None:
    for number in (0, 1):
        save_file({"n": torch.tensor([2**40 + number])}, tmp_path / f"{number}.safetensors")
    found = compare(tmp_path / "0.safetensors", tmp_path / "1.safetensors")
    assert found.tensors[0].sums.largest == 1
    assert not found.same
    assert found.whole == Sums()  # a counter says nothing of weights


def test_numbers_that_are_not_finite_are_seen(models: list[Path]) -> None:
    model = load_file(models[2])
    model["layers.2.up.weight"][3, 4] = math.nan
    save_file(model, models[2])
    found = compare(*models[1:])
    bad = next(each for each in found.tensors if each.name == "layers.2.up.weight")
    assert math.isnan(bad.sums.distance)
    assert math.isnan(found.whole.largest)
    assert math.isnan(found.whole.cosine)


def test_models_of_zeros_have_figures(tmp_path: Path) -> None:
    for name, value in (("zeros", 0.0), ("ones", 1.0)):
        save_file({"w": torch.full((3,), value)}, tmp_path / f"{name}.safetensors")
    zeros, ones = tmp_path / "zeros.safetensors", tmp_path / "ones.safetensors"
    assert compare(zeros, zeros).whole.cosine == 1
    apart = compare(zeros, ones).whole
    assert (apart.distance, apart.cosine, apart.signs) == (math.inf, 0.0, 0.0)


def test_what_one_model_lacks_is_told_and_the_rest_compared(models: list[Path]) -> None:
    model = load_file(models[2])
    model["layers.0.up.bias"] = torch.zeros(21)
    model["new"] = model.pop("scale")
    save_file(model, models[2])
    found = compare(*models[1:])
    assert (found.only_first, found.only_second) == (["scale"], ["new"])
    assert found.shaped == ["layers.0.up.bias [20] and [21]"]
    assert len(found.tensors) == len(SHAPES) - 1
    assert not found.same


def test_models_without_a_common_tensor_and_a_base_that_lacks_one_are_refused(
    models: list[Path], tmp_path: Path
) -> None:
    save_file({"other": torch.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(MergeError, match="no tensor of the same name and shape in common"):
        compare(models[1], tmp_path / "other.safetensors")
    with pytest.raises(MergeError, match=r"has no emb\.weight \[30, 8\]"):
        compare(*models[1:], tmp_path / "other.safetensors")


def test_tied_weights_are_counted_once(tmp_path: Path) -> None:
    for number in (0, 1):
        save_file({"emb": torch.full((4,), float(number))}, tmp_path / f"{number}.safetensors",
                  metadata={"head": "emb"})  # fmt: skip
    found = compare(tmp_path / "0.safetensors", tmp_path / "1.safetensors")
    assert (found.whole.count, found.tied) == (4, 1)


def test_tensors_are_told_by_layer_and_kind(models: list[Path]) -> None:
    found = compare(*models[1:])
    assert [layer.name for layer in found.layers() if layer.name.startswith("layers")] == [
        "layers.0", "layers.2", "layers.10"
    ]  # fmt: skip
    cells = found.cells()
    own = {each.name: each.sums for each in found.tensors}
    assert cells["layers.10", "up.weight"] == own["layers.10.up.weight"]
    parts = [own["layers.0.up.bias"], own["layers.0.up.weight"]]
    assert found.layers()[1].sums.count == sum(part.count for part in parts)
    assert place_of("blocks.3.experts.11.w1.weight") == ("blocks.3", "experts.*.w1.weight")


def diff(*arguments: str) -> str:
    return allfuse("diff", *arguments)


def test_the_command_shows_the_whole_and_what_differs_most(models: list[Path]) -> None:
    said = diff(str(models[1]), str(models[2]))
    assert "2,061 numbers in 7 tensors" in said
    assert "1 of 1 tensors of whole numbers differ" in said
    whole = compare(*models[1:]).whole
    assert f"distance {whole.distance:.3g}, cosine {whole.cosine:.6f}" in said
    rows = [line.split()[0] for line in said.splitlines() if line.startswith("layers.")]
    assert {"layers.10", "layers.10.up.weight"} <= set(rows)
    assert "the same numbers everywhere" in diff(str(models[1]), str(models[1]))


def test_all_rows_are_shown_where_asked(tmp_path: Path) -> None:
    for number in (0, 1):
        tensors = {f"layers.{n}.w": torch.full((4,), 1.0 + number * n) for n in range(30)}
        save_file(tensors, tmp_path / f"{number}.safetensors")
    paths = [str(tmp_path / f"{number}.safetensors") for number in (0, 1)]
    few, every = diff(*paths), diff(*paths, "--all")
    assert "and 10 more: --all" in few
    assert "layers.3.w" not in few
    assert "layers.3.w" in every
    assert few.index("layers.29.w") < few.index("layers.28.w")


def test_json_has_the_figures(models: list[Path]) -> None:
    said = diff(str(models[1]), str(models[2]), "--base", str(models[0]), "--json", "-q")
    told = json.loads(said.splitlines()[-1])
    assert told["ok"] is True
    assert told["same"] is False
    found = compare(models[1], models[2], models[0])
    assert told["whole"]["cosine"] == pytest.approx(found.whole.cosine)
    assert {each["name"] for each in told["tensors"]} == {*SHAPES, "seen"}
    distances = [each["distance"] for each in told["tensors"] if each["distance"] is not None]
    assert distances == sorted(distances, reverse=True)


class Cells(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.titles: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        self.tags.add(tag)
        self.titles += [value for name, value in attributes if name == "title"]


def test_a_page_has_a_cell_for_each_layer_and_kind_and_no_script(
    models: list[Path], tmp_path: Path
) -> None:
    bad = "layers.0.<script>alert(1)</script>.weight"
    for path in models[1:]:
        save_file(load_file(path) | {bad: torch.ones(2)}, path)
    diff(str(models[1]), str(models[2]), "--html", str(tmp_path / "d.html"))
    text = (tmp_path / "d.html").read_text()
    cells = Cells()
    cells.feed(text)
    found = compare(*models[1:])
    assert text == page(found)
    assert len(cells.titles) == len(found.cells())
    assert any(title.startswith("layers.10.up.weight\ndistance") for title in cells.titles)
    assert "script" not in cells.tags


def test_a_picture_is_written(models: list[Path], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    diff(str(models[1]), str(models[2]), "--png", str(tmp_path / "d.png"))
    assert (tmp_path / "d.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--html", "a.safetensors"], "allowed: a name that ends with .html"),
        (["--png", "no/where.png"], "is no folder"),
        (["--threads", "0"], "1 or more"),
        (["--base", "gone"], "there is no gone"),
    ],
)
def test_bad_options_end_before_anything_is_computed(
    arguments: list[str], said: str, models: list[Path]
) -> None:
    with pytest.raises(UserError, match=said):
        diff(str(models[1]), str(models[2]), *arguments)


def test_a_picture_without_matplotlib_is_refused_with_what_to_do(
    models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match=r"pip install allfuse\[report\]"):
        diff(str(models[1]), str(models[2]), "--png", str(tmp_path / "d.png"))


@pytest.mark.slow
def test_a_comparison_takes_little_memory(tmp_path: Path) -> None:
    """Models of 300 MB, of which neither could be held in what is left beside Python and torch."""
    for number in range(2):
        values = {f"layers.{n}.w": torch.randn(8000, 1200).bfloat16() for n in range(16)}
        save_file(values, tmp_path / f"{number}.safetensors")
    command = [sys.executable, "-m", "allfuse", "diff", "-q", "--threads", "2"]
    command += [str(tmp_path / f"{number}.safetensors") for number in range(2)]
    script = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True); "
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    done = subprocess.run([sys.executable, "-c", script, *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.splitlines()[-1]) * 1024 <= 450e6
