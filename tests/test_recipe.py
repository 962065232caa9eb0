"""Recipes in files: parameters by model, layer and name, layers that are stacked, other words."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from commands import merge as command
from safetensors.torch import load_file, save_file
from torch import Tensor

from allfuse.base.errors import MergeError, UserError
from allfuse.merge import outline as outlining
from allfuse.merge.arrangement import find_stacks
from allfuse.merge.learned import LEARNED
from allfuse.merge.merge import merge
from allfuse.merge.outline import outline
from allfuse.merge.recipe import Recipe
from allfuse.merge.recipe_file import read_recipe
from allfuse.rule import METHODS

Model = dict[str, Tensor]
LAYERS, WORDS, WIDTH = 4, 12, 8
EMBED, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
Q, UP = "self_attn.q_proj.weight", "mlp.up_proj.weight"
CONFIG = {
    "num_hidden_layers": LAYERS,
    "vocab_size": WORDS,
    "layer_types": ["full", "slide", "full", "slide"],
    "torch_dtype": "float32",
    "max_window_layers": LAYERS,
}


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outlining, "BLOCK", 32)


def layer(number: int, rest: str) -> str:
    return f"model.layers.{number}.{rest}"


def make(seed: int, layers: int = LAYERS, words: int = WORDS, base: Model | None = None) -> Model:
    chance = torch.Generator().manual_seed(seed)
    shapes = {EMBED: (words, WIDTH), NORM: (WIDTH,), HEAD: (words, WIDTH)}
    for number in range(layers):
        shapes |= {layer(number, Q): (WIDTH, WIDTH), layer(number, UP): (3 * WIDTH, WIDTH)}
    model = {name: torch.randn(shape, generator=chance) for name, shape in shapes.items()}
    if base is None:
        return model
    return {name: base[name] + 0.1 * change for name, change in model.items()}


def save(model: Model, folder: Path, config: Mapping[str, Any] = CONFIG) -> Path:
    folder.mkdir()
    save_file(model, folder / "model.safetensors")
    words = {"vocab_size": len(model[EMBED])} if "vocab_size" in config else {}
    (folder / "config.json").write_text(json.dumps({**config, **words}))
    return folder


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to stand in with a base and two models that come from it: base, a, b."""
    monkeypatch.chdir(tmp_path)
    base = make(0)
    for name, seed in (("base", None), ("a", 1), ("b", 2)):
        save(base if seed is None else make(seed, base=base), tmp_path / name)
    return tmp_path


def write(said: Mapping[str, Any] | str) -> Path:
    path = Path("recipe.yml")
    path.write_text(said if isinstance(said, str) else yaml.safe_dump(dict(said)))
    return path


def fuse(said: Mapping[str, Any] | str, out: str = "out", **ours: Any) -> Model:
    """The result of a recipe in a file."""
    merge(read_recipe(write(said), **ours).recipe, Path(out), overwrite=True)
    return load(out)


def load(folder: str) -> Model:
    found: Model = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        found |= load_file(file)
    return found


def of(model: str, **parameters: Any) -> dict[str, Any]:
    return {"model": model, **({"parameters": parameters} if parameters else {})}


def constant(name: str, value: float, **sizes: int) -> None:
    save({key: torch.full_like(each, value) for key, each in make(0, **sizes).items()}, Path(name))


def shares(found: Model) -> dict[str, float]:
    """Of tensors that are one number everywhere, that number."""
    assert all((value == value.flatten()[0]).all() for value in found.values())
    return {name: round(float(value.flatten()[0]), 5) for name, value in found.items()}


def linear(weights: Any, **more: Any) -> dict[str, Any]:
    """zeros and ones, the ones with a weight: so what is fused is that weight."""
    own = of("ones", weight=weights)
    fixed = {"parameters": {"normalize": False, "weight": 1}}
    return {"merge_method": "linear", "models": [of("zeros"), own], **fixed, **more}


@pytest.fixture
def numbers(place: Path) -> Path:
    constant("zeros", 0.0)
    constant("ones", 1.0)
    return place


def test_a_gradient_is_drawn_along_the_layers(numbers: Path) -> None:
    found = shares(fuse(linear([0, 1.0, 0.4])))
    assert [found[layer(number, Q)] for number in range(4)] == [0, 0.66667, 0.8, 0.4]
    assert (found[EMBED], found[NORM], found[HEAD]) == (0, 0, 0)


def test_the_first_filter_that_fits_counts_and_may_have_a_gradient(numbers: Path) -> None:
    weights = [
        {"filter": "self_attn", "value": [0, 0.3]},
        {"filter": "mlp", "value": 0.7},
        {"value": 0.25},
    ]
    found = shares(fuse(linear(weights)))
    assert [found[layer(number, Q)] for number in range(4)] == [0, 0.1, 0.2, 0.3]
    assert {found[layer(number, UP)] for number in range(4)} == {0.7}
    assert (found[EMBED], found[HEAD]) == (0.25, 0.25)


def test_where_no_filter_fits_what_is_said_for_all_counts(numbers: Path) -> None:
    said = linear([{"filter": "mlp", "value": 0.5}])
    found = shares(fuse(said))
    assert (found[layer(0, UP)], found[layer(0, Q)]) == (0.5, 1)


def test_parameters_of_a_source_come_before_its_slice_and_that_before_all(numbers: Path) -> None:
    def sources(first: int, **parameters: Any) -> list[dict[str, Any]]:
        end = first + 1
        return [
            {**of("zeros", weight=1), "layer_range": [first, end]},
            {**of("ones", **parameters), "layer_range": [first, end]},
        ]

    said = {
        "merge_method": "linear",
        "parameters": {"normalize": False, "weight": 0.125},
        "slices": [
            {"sources": sources(0, weight=0.5), "parameters": {"weight": 0.25}},
            {"sources": sources(1), "parameters": {"weight": 0.25}},
            {"sources": sources(2)},
        ],
    }
    found = shares(fuse(said))
    assert [found[layer(number, Q)] for number in range(3)] == [0.5, 0.25, 0.125]


def test_numbers_without_a_point_and_in_quotes_are_numbers(numbers: Path) -> None:
    text = yaml.safe_dump(linear("WEIGHT")).replace("WEIGHT", "[1e-3, '0.5']")
    found = shares(fuse(text))
    assert (found[layer(0, Q)], found[layer(3, Q)]) == (0.001, 0.5)


def largest(change: Tensor, part: float) -> Tensor:
    """A change with that part of its numbers, the largest."""
    count = int(part * change.numel())
    kept = change.flatten().abs().topk(count).indices
    flat = torch.zeros_like(change).flatten()
    flat[kept] = change.flatten()[kept]
    return flat.view_as(change)


def test_each_model_has_its_own_density_by_layer_and_name(place: Path) -> None:
    density = [{"filter": "mlp", "value": [0.25, 1.0]}, {"value": 0.5}]
    found = fuse(
        {
            "merge_method": "breadcrumbs",
            "base_model": "base",
            "models": [of("a", density=density, weight=2), of("b")],
            "parameters": {"gamma": 0, "density": 1, "weight": 1, "lambda": 0.5},
        }
    )
    base, a, b = (load(name) for name in ("base", "a", "b"))
    for name, part in ((layer(0, UP), 0.25), (layer(1, UP), 0.5), (layer(0, Q), 0.5)):
        change = 2 * largest(a[name] - base[name], part) + (b[name] - base[name])
        torch.testing.assert_close(found[name], base[name] + 0.5 * change)


@pytest.mark.parametrize("method", ["ties", "dare_ties", "della_linear", "breadcrumbs_ties"])
def test_a_density_of_one_model_alone_leaves_the_other_whole(method: str, place: Path) -> None:
    models = [of("a", density=0.5, weight=0), of("b", density=1.0, epsilon=0, weight=1)]
    found = fuse({"merge_method": method, "base_model": "base", "models": models,
                  "parameters": {"epsilon": 0.1, "gamma": 0, "normalize": False}})  # fmt: skip
    for name, value in load("b").items():
        torch.testing.assert_close(found[name], value)


def stack(*ranges: tuple[str, int, int], **more: Any) -> dict[str, Any]:
    slices = [
        {"sources": [{"model": model, "layer_range": [first, end]}]} for model, first, end in ranges
    ]
    return {"merge_method": "passthrough", "slices": slices, **more}


def test_layers_are_stacked_and_counted_anew(place: Path) -> None:
    found = fuse(stack(("a", 0, 3), ("b", 1, 4)))
    a, b = load("a"), load("b")
    chosen = [(a, 0), (a, 1), (a, 2), (b, 1), (b, 2), (b, 3)]
    for number, (model, own) in enumerate(chosen):
        for rest in (Q, UP):
            assert torch.equal(found[layer(number, rest)], model[layer(own, rest)])
    assert len(found) == 3 + 2 * len(chosen)
    assert torch.equal(found[EMBED], a[EMBED])  # what comes before the layers: of the first slice
    assert torch.equal(found[HEAD], b[HEAD])
    assert torch.equal(found[NORM], b[NORM])
    said = json.loads(Path("out/config.json").read_text())
    assert said["num_hidden_layers"] == 6
    assert said["layer_types"] == ["full", "slide", "full", "slide", "full", "slide"]
    assert said["max_window_layers"] == LAYERS


def test_an_empty_last_slice_says_whose_head_it_is(place: Path) -> None:
    found = fuse(stack(("a", 0, 4), ("b", 4, 4)))
    assert torch.equal(found[layer(3, Q)], load("a")[layer(3, Q)])
    assert torch.equal(found[HEAD], load("b")[HEAD])


def test_scale_by_filter_changes_some_tensors_of_stacked_layers(place: Path) -> None:
    scale = [{"filter": "q_proj", "value": 0.5}, {"value": 1}]
    said = stack(("a", 0, 4), ("a", 2, 4))
    said["slices"][1]["sources"][0]["parameters"] = {"scale": scale}
    found, a = fuse(said), load("a")
    assert torch.equal(found[layer(4, Q)], 0.5 * a[layer(2, Q)])
    assert torch.equal(found[layer(4, UP)], a[layer(2, UP)])
    assert torch.equal(found[layer(2, Q)], a[layer(2, Q)])


def test_slices_may_be_fused_and_gradients_run_within_each(numbers: Path) -> None:
    def piece(first: int, end: int) -> dict[str, Any]:
        models = ("ones", "twos")
        return {"sources": [{"model": name, "layer_range": [first, end]} for name in models]}

    constant("twos", 2.0)
    said = {"merge_method": "slerp", "base_model": "ones", "parameters": {"t": [0.25, 0.75]},
            "slices": [piece(0, 3), piece(1, 3)]}  # fmt: skip
    found = shares(fuse(said))
    assert [found[layer(n, Q)] for n in range(5)] == [1.25, 1.5, 1.75, 1.25, 1.75]
    assert (found[EMBED], found[HEAD]) == (1.25, 1.25)


def test_slices_of_changes_name_the_base_and_one_of_it_alone_is_the_base(place: Path) -> None:
    def source(model: str, first: int, end: int, **parameters: Any) -> dict[str, Any]:
        return {**of(model, **parameters), "layer_range": [first, end]}

    slices = [
        {"sources": [source("base", 0, 2), source("a", 0, 2, weight=0.5)]},
        {"sources": [source("base", 2, 4)]},
    ]
    said = {"merge_method": "task_arithmetic", "base_model": "base", "slices": slices}
    found, base, a = fuse(said), load("base"), load("a")
    torch.testing.assert_close(found[layer(1, Q)], (base[layer(1, Q)] + a[layer(1, Q)]) / 2)
    assert torch.equal(found[layer(3, Q)], base[layer(3, Q)])
    assert torch.equal(found[HEAD], base[HEAD])
    slices[1]["sources"] = [source("a", 2, 4)]
    with pytest.raises(MergeError, match="slice 2 has 0 ranges of layers of the base"):
        fuse(said)


def test_a_stack_of_a_model_in_several_files_has_files_of_that_size(place: Path) -> None:
    a, folder = load("a"), Path("parts")
    folder.mkdir()
    names = {name: f"model-{n % 2 + 1:05d}-of-00002.safetensors" for n, name in enumerate(a)}
    for file in set(names.values()):
        save_file({name: a[name] for name in a if names[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    found = fuse(stack(("parts", 0, 4), ("parts", 0, 4)))
    largest_bytes = max(file.stat().st_size for file in folder.glob("*.safetensors"))
    assert all(file.stat().st_size <= largest_bytes + 500 for file in Path("out").glob("model-*"))
    assert torch.equal(found[layer(7, UP)], a[layer(3, UP)])
    said = json.loads(Path("out/model.safetensors.index.json").read_text())["weight_map"]
    assert said.keys() == found.keys()


def test_files_are_cut_by_size_and_the_numbers_stay(place: Path) -> None:
    said = {"merge_method": "linear", "models": [of("a"), of("b")]}
    whole = fuse(said, "whole")
    found = fuse({**said, "shard_size": "1kB"}, "cut")
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[name], value) for name, value in whole.items())
    files = sorted(Path("cut").glob("model-*.safetensors"))
    assert len(files) > 3
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"


@pytest.mark.parametrize(
    ("ranges", "said"),
    [
        ([("a", 0, 5)], "layers 0 to 5 of a, which has 4 under model.layers"),
        ([("a", 2, 2)], "no layer at all"),
        ([("a", 0, 2), ("wide", 0, 2)], "layers of other widths"),
        ([("a", 0, 2), ("biased", 0, 2)], "1 tensors are in one of them alone"),
        ([("plain", 0, 1)], "cannot be told from their names"),
    ],
)
def test_a_stack_that_cannot_be_is_refused(
    ranges: Sequence[tuple[str, int, int]], said: str, place: Path
) -> None:
    wide = {name: torch.cat([value, value], dim=-1) for name, value in make(3).items()}
    save(wide, place / "wide")
    save({**make(3), layer(1, "self_attn.q_proj.bias"): torch.zeros(WIDTH)}, place / "biased")
    save({EMBED: torch.zeros(3, 2), "out.weight": torch.zeros(2)}, place / "plain")
    with pytest.raises(MergeError, match=said):
        fuse(stack(*ranges))
    assert not Path("out").exists()


def test_layers_are_the_outermost_numbers_of_which_there_are_several() -> None:
    def numbers(*names: str) -> dict[str, tuple[int, ...]]:
        return find_stacks(names).numbers

    experts = [f"m.layers.{n}.experts.{k}.w" for n in range(2) for k in range(5)]
    assert numbers(*experts, "m.norm") == {"m.layers.": (0, 1)}
    assert numbers("0.weight", "2.weight", "4.weight") == {"": (0, 2, 4)}
    assert numbers("enc.0.l.0.w", "enc.0.l.1.w", "dec.l.0.w", "dec.l.1.w") == {
        "enc.0.l.": (0, 1),
        "dec.l.": (0, 1),
    }
    assert numbers("a.weight", "b.weight") == {}
    assert numbers("m.layers.0.w", "m.norm") == {"m.layers.": (0,)}
    stacks = find_stacks(["0.weight", "2.weight", "4.weight", "emb.weight", "head.weight"])
    assert [stacks.at(name) for name in ("0.weight", "2.weight", "4.weight")] == [0, 0.5, 1]
    assert (stacks.at("emb.weight"), stacks.at("head.weight")) == (0, 0)
    assert find_stacks(["m.layers.0.w"]).at("m.layers.0.w") == 1


def taller(name: str, words: int, seed: int, base: Model | None = None) -> Model:
    """A model with more words than others, that agrees with none."""
    model = make(seed, words=words)
    if base is not None:
        for key, value in base.items():
            model[key][: len(value)] = value + 0.1 * model[key][: len(value)]
    save(model, Path(name))
    return model


def test_other_vocabularies_are_refused_with_the_option_that_pads(place: Path) -> None:
    taller("tall", WORDS + 3, 5)
    models = {"merge_method": "linear", "models": [of("a"), of("tall")]}
    with pytest.raises(MergeError, match=r"differ by 3 rows; next: --pad-vocabulary"):
        fuse(models)
    with pytest.raises(MergeError, match="of other shapes"):
        other = make(5)
        other[layer(0, UP)] = torch.zeros(3 * WIDTH, WIDTH + 1)
        save(other, place / "other")
        fuse({**models, "models": [of("a"), of("other")], "pad_vocabulary": True})


def test_a_row_that_a_model_lacks_is_the_mean_of_those_that_have_it(place: Path) -> None:
    tall, taller_ = taller("tall", WORDS + 3, 5), taller("taller", WORDS + 5, 6)
    models = [of("a", weight=1), of("tall", weight=3), of("taller", weight=2)]
    found = fuse({"merge_method": "linear", "models": models, "pad_vocabulary": True})
    a = load("a")
    for name in (EMBED, HEAD):
        rows = found[name].split([WORDS, 3, 2])
        want = (a[name] + 3 * tall[name][:WORDS] + 2 * taller_[name][:WORDS]) / 6
        torch.testing.assert_close(rows[0], want)
        both = (3 * tall[name][WORDS:] + 2 * taller_[name][WORDS : WORDS + 3]) / 5
        torch.testing.assert_close(rows[1], both)
        torch.testing.assert_close(rows[2], taller_[name][WORDS + 3 :])
    assert json.loads(Path("out/config.json").read_text())["vocab_size"] == WORDS + 5


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "dare_ties", "model_stock"])
def test_a_row_that_only_one_model_has_is_kept_whole_by_rules_of_changes(
    method: str, place: Path
) -> None:
    base = load("base")
    tall = taller("tall", WORDS + 3, 5, base)
    models = [of("a", weight=0.3), of("tall", weight=0.3)]
    said = {"merge_method": method, "base_model": "base", "models": models, "pad_vocabulary": True}
    found = fuse(said)
    torch.testing.assert_close(found[EMBED][WORDS:], tall[EMBED][WORDS:])


def test_a_row_that_the_base_has_and_a_model_lacks_is_no_change(place: Path) -> None:
    base = load("base")
    longer = taller("longer", WORDS + 2, 5, base)
    tall = make(6, words=WORDS + 2)
    save(tall, place / "tall")
    models = [of("a", weight=0.5), of("tall", weight=0.25)]
    said = {"merge_method": "task_arithmetic", "base_model": "longer", "models": models}
    found = fuse({**said, "pad_vocabulary": True})
    rows = longer[HEAD][WORDS:]
    torch.testing.assert_close(found[HEAD][WORDS:], rows + 0.25 * (tall[HEAD][WORDS:] - rows))


def test_padded_tables_are_the_same_whatever_the_blocks(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taller("tall", WORDS + 3, 5)
    taller("taller", WORDS + 5, 6)
    models = [of(name) for name in ("a", "taller", "tall")]
    said = {"merge_method": "linear", "models": models, "pad_vocabulary": True}
    fuse(said, "small")
    monkeypatch.setattr(outlining, "BLOCK", 1 << 18)
    fuse(said, "large")
    small, large = (Path(name, "model.safetensors").read_bytes() for name in ("small", "large"))
    assert small == large


def tokenizer(folder: str, tokens: Sequence[str]) -> None:
    said = {"model": {"vocab": {token: number for number, token in enumerate(tokens)}}}
    Path(folder, "tokenizer.json").write_text(json.dumps(said))
    Path(folder, "tokenizer_config.json").write_text(json.dumps({"of": folder}))


def test_the_tokenizer_is_that_of_the_model_named(place: Path) -> None:
    for folder in ("a", "b"):
        tokenizer(folder, ["x", "y"])
    said = {"merge_method": "linear", "models": [of("a"), of("b")]}
    for source, owner in ((None, "a"), ("base", "a"), ("b", "b"), ("model:b", "b"), ("union", "a")):
        fuse({**said, **({} if source is None else {"tokenizer_source": source})})
        assert json.loads(Path("out/tokenizer_config.json").read_text()) == {"of": owner}
    save(make(3), place / "c")  # which has none
    fuse({**said, "models": [of("a"), of("c")], "tokenizer_source": "c"})
    assert json.loads(Path("out/tokenizer_config.json").read_text()) == {"of": "a"}
    fuse({**said, "tokenizer": {"source": "b"}})
    assert json.loads(Path("out/tokenizer_config.json").read_text()) == {"of": "b"}


def test_a_union_of_tokenizers_is_that_of_the_model_with_all_tokens(place: Path) -> None:
    taller("tall", WORDS + 1, 5)
    tokenizer("a", [f"w{n}" for n in range(WORDS)])
    tokenizer("tall", [f"w{n}" for n in range(WORDS + 1)])
    said = {"merge_method": "linear", "models": [of("a"), of("tall")], "tokenizer_source": "union"}
    found = fuse(said)
    assert json.loads(Path("out/tokenizer_config.json").read_text()) == {"of": "tall"}
    assert len(found[EMBED]) == WORDS + 1
    tokenizer("tall", [f"w{n}" for n in range(WORDS - 1)] + ["other", "more"])
    with pytest.raises(MergeError, match="tokens have other numbers: 'other' is 11 in tall"):
        fuse(said)
    with pytest.raises(MergeError, match="tokens have other numbers"):
        fuse({**said, "tokenizer_source": "a", "pad_vocabulary": True})
    del said["tokenizer_source"]
    with pytest.raises(MergeError, match="tokens have other numbers"):
        fuse({**said, "pad_vocabulary": True})
    Path("tall/tokenizer.json").unlink()
    with pytest.raises(MergeError, match="no tokenizer that can be read"):
        fuse({**said, "tokenizer_source": "union"})
    notes = outline(read_recipe(write({**said, "pad_vocabulary": True})).recipe).notes
    assert any("tall has no tokenizer that can be read" in note for note in notes)


def test_types_are_pytorchs_and_out_dtype_counts_first(place: Path) -> None:
    said = {"merge_method": "linear", "models": [of("a"), of("b")], "dtype": "float16"}
    assert fuse(said)[EMBED].dtype == torch.float16
    assert json.loads(Path("out/config.json").read_text())["torch_dtype"] == "float16"
    assert fuse({**said, "out_dtype": "bfloat16"})[EMBED].dtype == torch.bfloat16
    assert fuse(said, dtype="F64")[EMBED].dtype == torch.float64
    assert fuse({**said, "dtype": "auto"})[EMBED].dtype == torch.float32


def test_the_base_of_slerp_is_the_first_wherever_it_stands(place: Path) -> None:
    said = {"merge_method": "slerp", "base_model": "a", "parameters": {"t": 0}}
    for models in ([of("a"), of("b")], [of("b"), of("a")], [of("b")]):
        torch.testing.assert_close(fuse({**said, "models": models})[Q_0], load("a")[Q_0])


Q_0 = layer(0, Q)


def test_a_base_that_a_rule_has_none_for_is_a_model_like_others(numbers: Path) -> None:
    said = {"merge_method": "linear", "base_model": "ones", "models": [of("zeros", weight=1)],
            "parameters": {"weight": 0.5, "normalize": False}}  # fmt: skip
    assert shares(fuse(said))[HEAD] == 0.5
    assert "ones is fused like the other models" in read_recipe(write(said)).notes[0]
    said = {**said, "merge_method": "passthrough"}
    assert "base_model has no effect" in " ".join(read_recipe(write(said)).notes)


def test_nuslerp_fuses_changes_where_there_is_a_base(place: Path) -> None:
    said = {"merge_method": "nuslerp", "models": [of("a", weight=1), of("b", weight=0)]}
    torch.testing.assert_close(fuse(said)[Q_0], load("a")[Q_0])
    base, a, b = (load(name)[Q_0] for name in ("base", "a", "b"))
    said["models"] = [of("a", weight=1), of("b", weight=1)]
    found = fuse({**said, "base_model": "base"})[Q_0] - base
    one, two = a - base, b - base
    angle = torch.arccos((one * two).sum() / (one.norm() * two.norm()))
    want = (torch.sin(angle / 2) / torch.sin(angle)) * (one + two)
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-6)


def test_arguments_that_are_only_ours_stand_in_the_method(place: Path) -> None:
    models = [of("a", weight=1), of("b", weight=3)]
    said = {"base_model": "base", "models": models}
    paper = fuse({**said, "merge_method": "ties(preset=paper)"})
    usual = fuse({**said, "merge_method": "ties"})
    assert not torch.equal(paper[Q_0], usual[Q_0])
    again = fuse({**said, "merge_method": "ties", "parameters": {"preset": "paper"}})
    assert torch.equal(paper[Q_0], again[Q_0])


def test_what_has_no_effect_is_told(place: Path) -> None:
    said = {
        "merge_method": "slerp",
        "base_model": "a",
        "models": [of("a", weight=0.3), of("b", t=0.1)],
        "parameters": {"int8_mask": True, "density": 0.4, "t": 0.5},
    }
    notes = read_recipe(write(said)).notes
    assert sorted(notes) == [
        "density has no effect on slerp",
        "int8_mask saves memory in mergekit, and changes no number",
        "t is of the whole merge: it has no effect as one model's",
        "weight has no effect on slerp",
    ]


def test_a_filter_that_fits_no_tensor_is_told_with_its_place(place: Path) -> None:
    density = [{"filter": "atention", "value": 0.2}, {"filter": "mlp", "value": 0.5}]
    models = [of("a", density=density), of("b")]
    said = {"merge_method": "ties", "base_model": "base", "models": models}
    scales = {"parameters": {"lambda": [{"filter": "nrom", "value": 0.5}, {"value": 1}]}}
    notes = outline(read_recipe(write({**said, **scales})).recipe).notes
    assert notes == (
        "recipe.yml: parameters.lambda has the filter 'nrom', which no tensor that is fused has in "
        "its name",
        "recipe.yml: models[0].parameters.density has the filter 'atention', which no tensor that "
        "is fused has in its name",
    )
    assert "filter 'atention'" in command(str(write(said)), "--out", "out")


def test_a_filter_is_of_the_layers_of_its_slice(place: Path) -> None:
    said = stack(("a", 0, 2), ("b", 2, 4))
    scale = [{"filter": "layers.3.", "value": 0.5}, {"value": 1}]
    said["slices"][1]["parameters"] = {"scale": scale}
    assert "filter" not in "".join(outline(read_recipe(write(said)).recipe).notes)
    said["slices"][0]["parameters"] = {"scale": scale}
    notes = "".join(outline(read_recipe(write(said)).recipe).notes)
    assert "slices[0].parameters.scale has the filter 'layers.3.'" in notes


def test_parameters_are_checked_for_tensors_that_are_fused(place: Path) -> None:
    """A counter has neither weight nor density."""
    for name, value in (("low", 0.0), ("high", 1.0)):
        model = {key: torch.full_like(each, value) for key, each in make(0).items()}
        save({**model, "a.seen": torch.tensor(3)}, place / name)
    cases = [{"filter": "seen", "value": 0}, {"value": 1}]
    said = {"merge_method": "linear", "models": [of("low", weight=cases), of("high", weight=cases)]}
    assert shares(fuse(said))[HEAD] == 0.5
    with pytest.raises(MergeError, match=r"the weights of lm_head\.weight are 0, 0"):
        fuse({**said, "models": [of("low", weight=0), of("high", weight=0)]})


def test_a_stack_of_whole_and_floating_point_numbers_is_refused(place: Path) -> None:
    whole = load("b")
    whole[layer(1, Q)] = whole[layer(1, Q)].to(torch.int8)
    save(whole, place / "whole")
    sources = [{"model": name, "layer_range": [0, 2]} for name in ("a", "whole")]
    said = {"merge_method": "linear", "slices": [{"sources": sources}]}
    with pytest.raises(MergeError, match=rf"{layer(1, Q)} is F32 in a and I8 in whole"):
        fuse(said)


def test_a_model_is_looked_for_beside_the_file_too(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write({"merge_method": "linear", "models": [of("a"), of("b")]}).resolve()
    (place / "elsewhere").mkdir()
    monkeypatch.chdir(place / "elsewhere")
    merge(read_recipe(path).recipe, Path("out"))
    assert Path("out/model.safetensors").exists()


def test_other_parameters_of_one_tensor_begin_a_merge_anew(place: Path) -> None:
    def recipe(density: float) -> Recipe:
        values = [{"filter": "lm_head", "value": density}, {"value": 1}]
        models = [of("a", density=values), of("b")]
        return read_recipe(
            write({"merge_method": "ties", "base_model": "base", "models": models})
        ).recipe

    class Broken(Exception):
        pass

    def stop(name: str, **data: Any) -> None:
        if name == "merged":
            raise Broken

    with pytest.raises(Broken):
        merge(recipe(0.5), Path("out"), tell=stop)
    assert merge(recipe(0.6), Path("out")).resumed_blocks == 0


GOOD = "merge_method: ties\nbase_model: base\nmodels:\n  - model: a\n  - model: b\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (GOOD + "paramters: {}\n", "paramters is no key of a recipe; did you mean 'parameters'"),
        (GOOD + "parameters: {densty: 0.5}\n", "densty is no parameter of ties; did you mean"),
        (GOOD.replace("ties", "tise"), "there is no rule of that name; did you mean 'ties'"),
        (GOOD.replace("merge_method: ties", ""), "merge_method is None; allowed: mean"),
        (GOOD.replace("model: a", "modle: a"), r"models\[0\].modle is no key"),
        (GOOD.replace("model: a", "model: a\n    weight: 1"), "it belongs under parameters"),
        (GOOD.replace("model: a", "model: org/a-7b"), "'org/a-7b', which is no file or folder"),
        (GOOD.replace("base_model: base", ""), "ties fuses what models learned since a base"),
        (GOOD + "parameters: {density: 1.5}\n", "density is the part that is kept"),
        (
            GOOD.replace("model: a", "model: a\n    parameters: {density: [0.5, 1.5]}"),
            r"recipe.yml: models\[0\].parameters.density is .* of a: ties\(density=1.*the part",
        ),
        (GOOD + "parameters: {weight: 1e300}\n", "yml: parameters.weight is 1e[+]300; allowed: 0"),
        (GOOD + f"parameters: {{weight: {10**400}}}\n", "yml: parameters.weight is 1000"),
        (GOOD + "parameters: {lambda: 1e-300}\n", "yml: parameters.lambda is 1e-300; allowed: 0"),
        *(
            (GOOD.replace("ties", name), f"merge_method: rule {re.escape(name)}: it looks at data")
            for name in LEARNED
        ),
        (GOOD.replace("ties", "fisher(x=1)"), r"--rule \"fisher\(x=1\)\" --job"),
        (GOOD + "parameters: {density: [0.5, 0]}\n", "density is the part that is kept"),
        (GOOD + "parameters: {density: .nan}\n", "density is nan; allowed: a number"),
        (GOOD + "parameters: {weight: .inf}\n", "weight is inf; allowed: a number"),
        (GOOD + "parameters: {density: much}\n", "density is 'much'; allowed: a number"),
        (GOOD + "parameters: {density: []}\n", "density is an empty list"),
        (GOOD + "parameters: {density: [{filter: mlp}]}\n", "a filter and a value, or a value"),
        (GOOD + "parameters: {density: [{pattern: mlp, value: 1}]}\n", "a filter and a value"),
        (GOOD + "parameters: {normalize: [true, false]}\n", "normalize differs by layer"),
        (GOOD + "parameters: {normalize: maybe}\n", "normalize is 'maybe'; allowed: true or false"),
        (GOOD + "parameters: [1]\n", "parameters takes names with values"),
        (GOOD + "dtype: bfloat61\n", "dtype is 'bfloat61'; did you mean 'bfloat16'"),
        (GOOD + "dtype: [x]\n", r"dtype is \['x'\]"),
        (GOOD + "slices: []\n", "models, slices: allowed: one of them"),
        (GOOD + "modules: {}\n", "modules is not done here"),
        (GOOD + "chat_template: auto\n", "chat_template is not done here"),
        (GOOD + "tokenizer: {tokens: {x: 1}}\n", "tokenizer.tokens is not done here"),
        (GOOD + "tokenizer_source: nobody\n", "tokenizer_source is 'nobody'"),
        (GOOD + "shard_size: much\n", "shard_size is 'much' is no size"),
        (GOOD + "seed: 1.5\n", "seed is 1.5; allowed: a whole number"),
        (GOOD + "dtype: F16\ndtype: F32\n", "line 7, column 1: 'dtype' is said twice"),
        (GOOD + "parameters: {a: [1\n", r"recipe.yml, line 7, column 1: "),
        (GOOD + "---\n" + GOOD, "a second merge, after another one"),
        ("- a\n", "keys with values"),
        ("!!python/object/apply:os.system [ls]\n", "could not determine a constructor"),
        ("\x00", "is no YAML|special characters"),
        (GOOD.replace("- model: b", "- model: base"), None),
        (GOOD.replace("model: a", "model: base").replace("  - model: b\n", ""), "none beside"),
        (
            "merge_method: dare_linear\nbase_model: base\nmodels: [{model: a}]\n"
            "parameters: {rescale: false}\n",
            "rescale is False; dare_linear allows true alone",
        ),
        (GOOD + "parameters: {rescale: true}\n", "rescale is True; ties allows false alone"),
        (
            "merge_method: linear\nmodels: [{model: a}, {model: b}]\nparameters: {weight: 0}\n",
            "parameters.weight is 0; the weights of lm_head.weight are 0, 0, and linear divides",
        ),
        ("merge_method: slerp\nmodels: [{model: a}]\n", "slerp fuses 2 models, received 1"),
        (
            "merge_method: passthrough\nslices: [{sources: [{model: a, layer_range: [3, 1]}]}]\n",
            "layer_range is",
        ),
        (
            "merge_method: passthrough\nslices: [{sources: [{model: a, layer_range: [0, 1]},"
            "{model: b, layer_range: [0, 1]}]}]\n",
            "passthrough fuses 1 models, received 2 in slice 1",
        ),
        (
            "merge_method: linear\nslices: [{sources: [{model: a, layer_range: [0, 1]},"
            "{model: b, layer_range: [0, 2]}]}]\n",
            "slice 1 takes 1, 2 layers",
        ),
        ("merge_method: passthrough\nslices: [{sources: []}]\n", "a list of one or more"),
        (
            "merge_method: passthrough\n"
            f"slices: [{{sources: [{{model: a, layer_range: [0, {10**30}]}}]}}]\n",
            "layer_range is",
        ),
    ],
)
def test_a_file_that_cannot_be_done_is_refused_by_name(
    text: str, said: str | None, place: Path
) -> None:
    path = write(text)
    if said is None:
        outline(read_recipe(path).recipe)
        return
    with pytest.raises(UserError, match=said):
        outline(read_recipe(path).recipe)


def test_a_bomb_of_aliases_is_refused_at_once(place: Path) -> None:
    lines = ["a0: &a0 [x, x]"] + [f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 60)]
    with pytest.raises(MergeError, match="a0 is no key"):
        read_recipe(write("\n".join(lines)))
    text = GOOD + f"parameters:\n  density: &d [x]\n  weight: {'[' * 500}{']' * 500}\n"
    with pytest.raises(MergeError):
        read_recipe(write(text))


def test_a_recipe_is_merged_by_the_command(place: Path) -> None:
    write(GOOD + "parameters: {density: 0.5, int8_mask: true}\n")
    said = command("recipe.yml", "--out", "dry", "--dry-run")
    assert "by ties of 2 models" in said
    assert "note: int8_mask saves memory" in said
    assert not Path("dry").exists()
    command("recipe.yml", "--out", "out", "--dtype", "bfloat16")
    assert load("out")[EMBED].dtype == torch.bfloat16
    told = json.loads(command("recipe.yml", "--out", "o", "--json", "--quiet").splitlines()[-1])
    assert told["notes"] == ["int8_mask saves memory in mergekit, and changes no number"]
    for option in (["--rule", "mean"], ["--weights", "1,2"], ["--base", "base"]):
        with pytest.raises(UserError, match=rf"{option[0]} .* recipe.yml says it"):
            command("recipe.yml", *option, "--out", "x")
    for option in (["--search", "greedy"], ["--rule", "fisher"]):
        with pytest.raises(UserError, match=r"recipe\.yml is a recipe; next: name its models"):
            command("recipe.yml", *option, "--out", "x")
    with pytest.raises(UserError, match="it alone"):
        command("recipe.yml", "a", "--out", "x")


def test_the_command_pads_and_cuts_by_options(place: Path) -> None:
    taller("tall", WORDS + 3, 5)
    models = ("a", "tall", "--out", "out", "--shard-size", "1kB")
    with pytest.raises(MergeError, match="--pad-vocabulary"):
        command(*models)
    assert "with rows that some models lack: lm_head.weight" in command(
        *models, "--pad-vocabulary", "--dry-run"
    )
    command(*models, "--pad-vocabulary")
    assert len(load("out")[EMBED]) == WORDS + 3
    assert len(list(Path("out").glob("model-*.safetensors"))) > 3


@pytest.mark.parametrize("name", METHODS)
def test_a_recipe_with_nothing_to_say_is_the_plain_merge(name: str, place: Path) -> None:
    """The same bytes by a file as by options."""
    rule = METHODS[name]()
    names = ["a"] if rule.models == 1 else ["a", "b"]
    said: dict[str, Any] = {"merge_method": name, "models": [of(each) for each in names]}
    base = Path("base") if rule.of_changes else None
    if base is not None:
        said["base_model"] = "base"
    fuse(said)
    models = [Path(each) for each in names]
    merge(Recipe(models=models, rule=rule, weights=[1.0] * len(models), base=base), Path("plain"))
    same = [Path(folder, "model.safetensors").read_bytes() for folder in ("out", "plain")]
    assert same[0] == same[1]
