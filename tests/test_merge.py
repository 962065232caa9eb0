"""Models on disk become one: whatever is killed, cut, or done at the same time."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from allfuse.base.errors import MergeError
from allfuse.merge import outline as outlining
from allfuse.merge.folder import Stopped
from allfuse.merge.header import read_header
from allfuse.merge.merge import Merged, merge
from allfuse.merge.recipe import Recipe
from allfuse.rule import METHODS, Rule

Model = dict[str, Tensor]
SHAPES = {"emb": (23, 40), "up": (40, 70), "bias": (70,), "conv": (5, 4, 3, 3), "one": ()}


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outlining, "BLOCK", 512)


def make_model(seed: int, base: Model | None = None, dtype: torch.dtype = torch.float32) -> Model:
    chance = torch.Generator().manual_seed(seed)
    model = {name: torch.randn(shape, generator=chance) for name, shape in SHAPES.items()}
    if base is not None:
        model = {name: base[name].float() + 0.1 * change for name, change in model.items()}
    return {
        **{name: value.to(dtype) for name, value in model.items()},
        "seen": torch.tensor([seed, 7]),
    }


def write_models(folder: Path) -> list[Path]:
    """A base and three models that come from it, a file each."""
    base = make_model(0)
    made = [base, *(make_model(seed, base) for seed in (1, 2, 3))]
    paths = [folder / f"{number}.safetensors" for number in range(len(made))]
    for model, path in zip(made, paths, strict=True):
        save_file(model, path)
    return paths


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    return write_models(tmp_path)


def make_rule(name: str) -> Rule:
    return METHODS[name](
        **{"density": 0.5} if "density" in METHODS[name].__dataclass_fields__ else {}
    )


def recipe_of(rule: Rule, paths: Sequence[Path], **about: Any) -> Recipe:
    count = rule.models or len(paths) - 1
    about.setdefault("weights", [1.0, 2.0, 0.5][:count])
    base = paths[0] if rule.of_changes else None
    return Recipe(models=paths[1 : 1 + count], rule=rule, base=base, **about)


def fuse(rule: Rule, paths: Sequence[Path], out: Path, **about: Any) -> bytes:
    """The bytes of the result."""
    merge(recipe_of(rule, paths, **about), out, overwrite=True)
    return (out / "model.safetensors").read_bytes()


@pytest.mark.parametrize("name", METHODS)
def test_threads_and_memory_do_not_change_a_bit(
    name: str, models: list[Path], tmp_path: Path
) -> None:
    recipe, found = recipe_of(make_rule(name), models), []
    for workers, memory in ((1, 10**9), (4, 2 * 10**9)):
        out = tmp_path / f"out{workers}"
        merge(recipe, out, threads=workers, memory_bytes=memory)
        found.append((out / "model.safetensors").read_bytes())
    assert found[0] == found[1]


@pytest.mark.parametrize("name", METHODS)
def test_a_merge_that_was_broken_off_goes_on_to_the_same_bytes(
    name: str, models: list[Path], tmp_path: Path
) -> None:
    rule, chance = make_rule(name), random.Random(name)
    whole = fuse(rule, models, tmp_path / "whole")
    for number in range(3):
        out = tmp_path / f"out{number}"
        blocks = break_off(recipe_of(rule, models), out, chance.randrange(1, 12))
        assert not out.exists()
        done = merge(recipe_of(rule, models), out)
        assert done.resumed_blocks >= blocks
        assert (out / "model.safetensors").read_bytes() == whole
    assert not list(tmp_path.glob(".partial*"))


class Broken(Exception):
    pass


def break_off(recipe: Recipe, out: Path, after: int) -> int:
    """Begin a merge, and end it after so many blocks."""
    seen = 0

    def tell(name: str, **data: Any) -> None:
        nonlocal seen
        seen += name == "merged"
        if seen == after:
            raise Broken

    with pytest.raises(Broken):
        merge(recipe, out, tell=tell, threads=2)
    return seen


def test_a_block_that_never_reached_the_disk_is_made_again(
    models: list[Path], tmp_path: Path
) -> None:
    rule = make_rule("ties")
    whole = fuse(rule, models, tmp_path / "whole")
    break_off(recipe_of(rule, models), tmp_path / "out", 7)
    file = tmp_path / ".partial-out" / "model.safetensors"
    data = bytearray(file.read_bytes())
    begin = min(entry.begin for entry in read_header(file).entries.values())
    data[begin:] = bytes(len(data) - begin)
    file.write_bytes(data)
    merge(recipe_of(rule, models), tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == whole


def test_what_was_begun_of_another_recipe_is_not_gone_on_with(
    models: list[Path], tmp_path: Path
) -> None:
    break_off(recipe_of(make_rule("linear"), models), tmp_path / "out", 7)
    done = merge(recipe_of(make_rule("mean"), models, weights=[1.0, 1.0, 1.0]), tmp_path / "out")
    assert done.resumed_blocks == 0


def test_linear_is_the_weighted_mean(models: list[Path], tmp_path: Path) -> None:
    fuse(make_rule("linear"), models, tmp_path / "out")
    made, one, two, three = (
        load_file(p) for p in (tmp_path / "out/model.safetensors", *models[1:])
    )
    for name in SHAPES:
        want = (one[name].double() + 2 * two[name] + 0.5 * three[name]) / 3.5
        torch.testing.assert_close(made[name].double(), want, rtol=1e-6, atol=1e-7)
    assert torch.equal(made["seen"], one["seen"])  # whole numbers are those of the first


def split(model: Model, folder: Path, files: int) -> Path:
    """A model in several files with an index, and what stands beside it."""
    folder.mkdir()
    names = sorted(model)
    places = {
        name: f"model-{n % files + 1:05d}-of-{files:05d}.safetensors"
        for n, name in enumerate(names)
    }
    for file in set(places.values()):
        save_file({name: model[name] for name in names if places[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    (folder / "config.json").write_text('{"hidden": 40}')
    (folder / "pytorch_model.bin").write_bytes(b"weights of before")
    return folder


@pytest.mark.parametrize("name", ["linear", "slerp", "ties", "dare_linear"])
def test_how_a_model_is_cut_into_files_does_not_change_a_bit(
    name: str, models: list[Path], tmp_path: Path
) -> None:
    rule = make_rule(name)
    fuse(rule, models, tmp_path / "whole")
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    parts = [split(load_file(p), tmp_path / f"parts{n}", 3) for n, p in enumerate(models)]
    merge(recipe_of(rule, parts), tmp_path / "out")
    found: Model = {}
    for file in sorted((tmp_path / "out").glob("*.safetensors")):
        found |= load_file(file)
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[name], value) for name, value in whole.items())
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == whole.keys()
    assert (tmp_path / "out" / "config.json").read_text() == '{"hidden": 40}'
    assert not (tmp_path / "out" / "pytorch_model.bin").exists()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_types_are_those_of_the_models_and_arithmetic_is_in_float32(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    made = [make_model(seed, dtype=dtype) for seed in (1, 2)]
    for number, model in enumerate(made):
        save_file(model, tmp_path / f"{number}.safetensors")
    paths = [tmp_path / f"{number}.safetensors" for number in (0, 0, 1)]
    fuse(make_rule("mean"), paths, tmp_path / "out", weights=[1.0, 1.0])
    found = load_file(tmp_path / "out" / "model.safetensors")
    for name in SHAPES:
        want = (made[0][name].float() + made[1][name].float()) / 2
        assert torch.equal(found[name], want.to(dtype))


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    for number in (0, 1):
        save_file(make_model(number), tmp_path / f"{number}.safetensors", metadata={"head": "emb"})
    paths = [tmp_path / f"{number}.safetensors" for number in (0, 0, 1)]
    fuse(make_rule("mean"), paths, tmp_path / "out", weights=[1.0, 1.0])
    header = read_header(tmp_path / "out" / "model.safetensors")
    assert header.metadata["head"] == "emb"
    assert "head" not in header.entries


def test_an_empty_tensor_and_one_of_long_rows_are_fused(tmp_path: Path) -> None:
    for number in (0, 1):
        tensors = {"none": torch.zeros(0, 4), "long": torch.full((3, 1000), float(number))}
        save_file(tensors, tmp_path / f"{number}.safetensors")
    paths = [tmp_path / f"{number}.safetensors" for number in (0, 0, 1)]
    fuse(make_rule("mean"), paths, tmp_path / "out", weights=[1.0, 1.0])
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found["none"].shape == (0, 4)
    assert torch.equal(found["long"], torch.full((3, 1000), 0.5))


def damage(path: Path, how: Callable[[bytes], bytes]) -> None:
    path.write_bytes(how(path.read_bytes()))


@pytest.mark.parametrize(
    ("how", "said"),
    [
        (lambda data: data[:-5], "its tensors end at byte"),
        (lambda data: data + b"more", "its tensors end at byte"),
        (lambda data: data[:30], "its header would have"),
        (lambda data: data.replace(b"[40,70]", b"[40,71]"), "up of F32"),
        (lambda data: data.replace(b'"F32"', b'"F99"', 1), "F99"),
        (lambda data: b"\xff" * 16 + data, "its header would have"),
        (lambda data: (8).to_bytes(8, "little") + b"notjson!" + data, "no JSON"),
        (lambda data: b"", "its header would have"),
    ],
)
def test_a_damaged_file_is_refused_before_anything_is_written(
    how: Callable[[bytes], bytes], said: str, models: list[Path], tmp_path: Path
) -> None:
    damage(models[2], how)
    with pytest.raises(MergeError, match=said) as refused:
        fuse(make_rule("mean"), models, tmp_path / "out")
    assert str(models[2]) in str(refused.value)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".partial*"))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("no json", "no index of weights"),
        ('{"weight_map": {"emb": "../0.safetensors"}}', "files in other folders"),
        ('{"weight_map": {"emb": "gone.safetensors"}}', "no such file beside it"),
    ],
)
def test_an_index_that_is_none_is_refused(
    content: str, said: str, models: list[Path], tmp_path: Path
) -> None:
    folder = split(load_file(models[1]), tmp_path / "parts", 2)
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(MergeError, match=said):
        fuse(make_rule("mean"), [models[0], folder, *models[2:]], tmp_path / "out")


def test_models_of_other_names_and_shapes_are_refused_with_these(tmp_path: Path) -> None:
    one, two = make_model(1), make_model(2)
    two["emb"], two["other"] = torch.zeros(25, 40), torch.zeros(3)
    del two["bias"]
    for number, model in enumerate((one, two)):
        save_file(model, tmp_path / f"{number}.safetensors")
    paths = [tmp_path / f"{number}.safetensors" for number in (0, 0, 1)]
    with pytest.raises(MergeError) as refused:
        fuse(make_rule("mean"), paths, tmp_path / "out", weights=[1.0, 1.0])
    for said in ("bias", "other", "emb [23, 40] and [25, 40]", "vocabularies differ by 2 rows"):
        assert said in str(refused.value)


@pytest.mark.parametrize("name", ["mean", "ties", "slerp"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_is_named(
    name: str, bad: float, models: list[Path], tmp_path: Path
) -> None:
    model = load_file(models[2])
    model["up"][31, 5] = bad
    save_file(model, models[2])
    rule = make_rule(name)
    with pytest.raises(MergeError, match=rf"up has {bad} at index 2,175"):
        fuse(rule, models, tmp_path / "out")
    assert not list(tmp_path.glob("*out"))
    merge(recipe_of(rule, models, allow_nan=True), tmp_path / "out")


def test_a_file_that_cannot_be_read_now_is_said_and_the_next_call_goes_on(
    models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, seen = os.preadv, 0

    def preadv(*given: Any) -> int:
        nonlocal seen
        seen += 1
        if seen > 12:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(*given)

    recipe = recipe_of(make_rule("mean"), models)
    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", preadv)
        with pytest.raises(Stopped, match=r"cannot be read: .*the same command goes on"):
            merge(recipe, tmp_path / "out", threads=1)
    assert merge(recipe, tmp_path / "out").resumed_blocks > 0


def full(tmp_path: Path, *values: float, dtype: torch.dtype = torch.float32) -> list[Path]:
    """Models of one tensor that is one number everywhere, and the first of them again before."""
    paths = [tmp_path / f"{place}.safetensors" for place in range(len(values))]
    for path, value in zip(paths, values, strict=True):
        save_file({"w": torch.full((700,), value, dtype=dtype)}, path)
    return [paths[0], *paths]


@pytest.mark.parametrize(
    ("dtype", "value", "wider"),
    [
        ("F16", 1e6, "BF16 or F32"),
        ("F8_E4M3", 1e3, "BF16 or F32"),
        ("F8_E5M2", 1e5, "BF16 or F32"),
        ("BF16", 3.4e38, "F32"),
    ],
)
def test_a_number_that_the_type_written_cannot_hold_is_named(
    dtype: str, value: float, wider: str, tmp_path: Path
) -> None:
    tensor = torch.zeros(7, 100)
    tensor[6, 1] = -value  # in the second block
    save_file({"w": tensor}, tmp_path / "0.safetensors")
    paths, rule = [tmp_path / "0.safetensors"] * 2, make_rule("passthrough")
    said = rf"w would have -{value:g} at index 601, which {dtype} .*--dtype {wider}, or --allow"
    with pytest.raises(MergeError, match=said.replace("+", r"\+")):
        fuse(rule, paths, tmp_path / "out", dtype=dtype)
    assert not (tmp_path / "out").exists()
    fuse(rule, paths, tmp_path / "out", dtype=dtype, allow_nan=True)
    found = load_file(tmp_path / "out" / "model.safetensors")["w"]
    assert torch.equal(found.float(), tensor.to(found.dtype).float())


@pytest.mark.parametrize(
    ("dtype", "most"), [("F16", 65519.0), ("F8_E4M3", 460.0), ("BF16", 3.3895e38), ("F32", 3.4e38)]
)
def test_the_largest_numbers_of_a_type_are_written(dtype: str, most: float, tmp_path: Path) -> None:
    fuse(make_rule("passthrough"), full(tmp_path, most), tmp_path / "out", dtype=dtype)
    found = load_file(tmp_path / "out" / "model.safetensors")["w"].double()
    torch.testing.assert_close(found, torch.full_like(found, most), rtol=0.03, atol=0)


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        (METHODS["linear"](normalize=False), r"linear\(normalize=false\) with weights 1e\+30, 1"),
        (METHODS["task_arithmetic"](scale=1e30), r"task_arithmetic\(scale=1e\+30\) with weights"),
        (METHODS["ties"](scale=1e30), r"ties\(scale=1e\+30\) with weights"),
    ],
    ids=lambda given: getattr(given, "name", ""),
)
def test_a_rule_whose_arguments_lead_beyond_float32_is_named(
    rule: Rule, said: str, tmp_path: Path
) -> None:
    paths = full(tmp_path, 0.0, 1e10, 2e10)[1:]  # the base and two models
    with pytest.raises(MergeError, match=rf"w would have inf at index 0, and all .*{said}"):
        fuse(rule, paths, tmp_path / "out", weights=[1e30, 1.0])
    fuse(rule, paths, tmp_path / "out", weights=[1e30, 1.0], allow_nan=True)


def test_a_number_that_only_float64_holds_is_named_as_it_is(tmp_path: Path) -> None:
    paths = full(tmp_path, 1e300, dtype=torch.float64)
    with pytest.raises(MergeError, match=r"w has 1e\+300 at index 0, which float32 cannot hold"):
        fuse(make_rule("passthrough"), paths, tmp_path / "out")


def test_whole_numbers_in_one_model_and_floating_point_ones_in_another_are_refused(
    tmp_path: Path,
) -> None:
    save_file({"w": torch.ones(3), "n": torch.ones(3)}, tmp_path / "0.safetensors")
    save_file({"w": torch.ones(3), "n": torch.ones(3).long()}, tmp_path / "1.safetensors")
    for first, second, kinds in ((0, 1, "F32 and I64"), (1, 0, "I64 and F32")):
        paths = [tmp_path / f"{number}.safetensors" for number in (0, first, second)]
        with pytest.raises(MergeError, match=rf"in one of them alone: n {kinds}") as refused:
            fuse(make_rule("mean"), paths, tmp_path / "out", weights=[1.0, 1.0])
        assert "w F32" not in str(refused.value)


def test_of_two_types_of_whole_numbers_the_first_is_kept(tmp_path: Path) -> None:
    save_file({"n": torch.tensor([1]).short()}, tmp_path / "0.safetensors")
    save_file({"n": torch.tensor([2]).long()}, tmp_path / "1.safetensors")
    paths = [tmp_path / f"{number}.safetensors" for number in (0, 0, 1)]
    fuse(make_rule("mean"), paths, tmp_path / "out", weights=[1.0, 1.0])
    found = load_file(tmp_path / "out" / "model.safetensors")["n"]
    assert (found.dtype, found.tolist()) == (torch.int16, [1])


def test_a_vector_of_other_length_alone_is_no_vocabulary(tmp_path: Path) -> None:
    for number in (0, 1):
        save_file({"w": torch.ones(4, 4), "b": torch.ones(9 + number)},
                  tmp_path / f"{number}.safetensors")  # fmt: skip
    paths = [tmp_path / f"{number}.safetensors" for number in (0, 0, 1)]
    for pad in (False, True):
        with pytest.raises(MergeError, match=r"1 of other shapes: b \[9\] and \[10\]$"):
            fuse(make_rule("mean"), paths, tmp_path / "out", weights=[1.0, 1.0],
                 pad_vocabulary=pad)  # fmt: skip


def test_large_numbers_whose_sum_overflows_are_finite(tmp_path: Path) -> None:
    save_file({"w": torch.full((600,), 3e38)}, tmp_path / "0.safetensors")
    paths = [tmp_path / "0.safetensors"] * 3
    fuse(make_rule("median"), paths, tmp_path / "out", weights=[1.0, 1.0])
    assert load_file(tmp_path / "out" / "model.safetensors")["w"].isfinite().all()


def test_no_room_on_the_disk_is_said_before_it_begins(
    models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    with pytest.raises(MergeError, match=r"needs .* and 100 B are free"):
        fuse(make_rule("mean"), models, tmp_path / "out")
    assert not list(tmp_path.glob(".partial*"))


@pytest.mark.parametrize("name", ["linear", "ties"])
def test_a_disk_that_is_full_meanwhile_is_said_and_the_next_call_goes_on(
    name: str, models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rule, write, seen = make_rule(name), os.pwrite, 0
    whole = fuse(rule, models, tmp_path / "whole")

    def pwrite(*given: Any) -> int:
        nonlocal seen
        seen += 1
        if seen > 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(*given)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", pwrite)
        with pytest.raises(MergeError, match=r"the disk is full .*the same command goes on"):
            merge(recipe_of(rule, models), tmp_path / "out", threads=2)
    assert not (tmp_path / "out").exists()
    done = merge(recipe_of(rule, models), tmp_path / "out")
    assert done.resumed_blocks == 5
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == whole


def test_a_result_is_not_written_over_a_model_or_into_it(
    models: list[Path], tmp_path: Path
) -> None:
    folder = split(load_file(models[1]), tmp_path / "parts", 2)
    paths = [models[0], folder, *models[2:]]
    for out in (folder, folder / "inside", tmp_path):
        with pytest.raises(MergeError, match="lies inside the model"):
            merge(recipe_of(make_rule("mean"), paths), out, overwrite=True)
    fuse(make_rule("mean"), models, tmp_path / "out")
    with pytest.raises(MergeError, match="--overwrite"):
        merge(recipe_of(make_rule("mean"), models), tmp_path / "out")


def test_two_merges_do_not_write_to_one_place(models: list[Path], tmp_path: Path) -> None:
    def second(name: str, **data: Any) -> None:
        with pytest.raises(MergeError, match="another merge is at work"):
            merge(recipe_of(make_rule("mean"), models), tmp_path / "out")

    merge(recipe_of(make_rule("mean"), models), tmp_path / "out", tell=second, threads=1)


def test_memory_that_is_not_enough_is_refused_with_what_would_be(
    models: list[Path], tmp_path: Path
) -> None:
    with pytest.raises(MergeError, match=r"--memory .* or more"):
        merge(recipe_of(make_rule("mean"), models), tmp_path / "out", memory_bytes=10**8)


LINEAR: dict[str, Any] = {"rule": METHODS["linear"](), "base": None}


@pytest.mark.parametrize(
    ("about", "said"),
    [
        ({"rule": METHODS["ties"](), "base": None}, "--base"),
        ({"rule": METHODS["mean"]()}, "would not look at the base"),
        ({"rule": METHODS["slerp"](), "base": None}, "fuses 2 models, received 3"),
        ({"rule": METHODS["ties"](), "weights": [1.0]}, "1 weights for 3 models"),
        ({"rule": METHODS["ties"](), "dtype": "F23"}, "allowed: F64"),
        ({"rule": METHODS["ties"](scale=1e39)}, "scale is 1e[+]39; allowed: 0, or 1.2e-38 to"),
        ({"rule": METHODS["ties"](scale=1e-40)}, "scale is 1e-40; allowed: 0, or"),
        ({**LINEAR, "weights": [1e300, 1, 1]}, "--weights 1e[+]300,1,1: allowed: 0, or numbers of"),
        ({**LINEAR, "weights": [1e-300, 1, 1]}, "--weights 1e-300,1,1: allowed"),
        ({**LINEAR, "weights": [float("nan"), 1, 1]}, "--weights nan,1,1: allowed"),
        ({**LINEAR, "weights": [float("inf"), 1, 1]}, "--weights inf,1,1: allowed"),
        ({**LINEAR, "weights": [2e38, 2e38, 0]}, "2e[+]38,0: linear .* by their sum, 4e[+]38"),
        ({**LINEAR, "weights": [1, -1, 0]}, "--weights 1,-1,0: linear divides by their sum, 0"),
        ({"rule": METHODS["median"](), "base": None, "weights": [0] * 3}, "median divides by"),
    ],
)
def test_a_recipe_without_meaning_is_refused(
    about: dict[str, Any], said: str, models: list[Path]
) -> None:
    given = {"models": models[1:], "base": models[0], "weights": [1.0] * 3, **about}
    with pytest.raises(MergeError, match=said):
        Recipe(**given)


def test_a_merge_is_read_like_any_model(models: list[Path], tmp_path: Path) -> None:
    fuse(make_rule("mean"), models, tmp_path / "out")
    twice = [models[0], tmp_path / "out", tmp_path / "out"]
    again = fuse(make_rule("mean"), twice, tmp_path / "again", weights=[1.0, 1.0])
    assert again == (tmp_path / "out" / "model.safetensors").read_bytes()
    assert sorted(os.listdir(tmp_path / "again")) == ["model.safetensors"]


def test_what_was_done_is_told(models: list[Path], tmp_path: Path) -> None:
    done = merge(recipe_of(make_rule("mean"), models), tmp_path / "out")
    assert isinstance(done, Merged)
    assert done.parameters == sum(value.numel() for value in make_model(0).values())
    assert done.written_bytes == (tmp_path / "out" / "model.safetensors").stat().st_size
