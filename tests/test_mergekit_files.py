"""Recipes in files, against mergekit 0.1.5 where it is installed: one file, the same numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from allfuse.merge.merge import merge
from allfuse.merge.recipe_file import read_recipe
from allfuse.merge.vocabulary import read_tokens

config = pytest.importorskip(
    "mergekit.config", reason="needs mergekit, an optional peer, which is not installed"
)
running = pytest.importorskip("mergekit.merge")

Model = dict[str, Tensor]
LAYERS, WIDTH, INNER, WORDS = 5, 8, 16, 24
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": WIDTH,
    "intermediate_size": INNER, "num_hidden_layers": LAYERS, "num_attention_heads": 2,
    "num_key_value_heads": 2, "vocab_size": WORDS, "tie_word_embeddings": False,
    "torch_dtype": "float32",
}  # fmt: skip


TABLES = ("model.embed_tokens.weight", "lm_head.weight")


def shapes() -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (WORDS, WIDTH), "model.norm.weight": (WIDTH,),
        "lm_head.weight": (WORDS, WIDTH),
    }  # fmt: skip
    for number in range(LAYERS):
        at = f"model.layers.{number}."
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            found[f"{at}self_attn.{name}.weight"] = (WIDTH, WIDTH)
        for name in ("gate_proj", "up_proj"):
            found[f"{at}mlp.{name}.weight"] = (INNER, WIDTH)
        found[f"{at}mlp.down_proj.weight"] = (WIDTH, INNER)
        for name in ("input_layernorm", "post_attention_layernorm"):
            found[f"{at}{name}.weight"] = (WIDTH,)
    return found


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to stand in, with a tiny Llama and three that come from it."""
    monkeypatch.chdir(tmp_path)
    chance = torch.Generator().manual_seed(0)
    base, way = (
        {name: torch.randn(shape, generator=chance) for name, shape in shapes().items()}
        for _ in range(2)
    )
    for name in ("base", "a", "b", "c"):
        far = 0.0 if name == "base" else 0.1  # all some way in one direction, as training goes
        model = {
            n: v + far * (2 * way[n] + torch.randn(v.shape, generator=chance))
            for n, v in base.items()
        }
        Path(name).mkdir()
        save_file(model, Path(name, "model.safetensors"), metadata={"format": "pt"})
        Path(name, "config.json").write_text(json.dumps(LLAMA))
    return tmp_path


def load(folder: str) -> Model:
    found: Model = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        found |= load_file(file)
    return found


FLAT: dict[str, dict[str, Any]] = {
    "a gradient of weights": {
        "merge_method": "linear",
        "models": [
            {"model": "a", "parameters": {"weight": [0, 0.3, 1]}},
            {"model": "b", "parameters": {"weight": 0.5}},
        ],
    },
    "filters, one with a gradient": {
        "merge_method": "linear",
        "models": [
            {
                "model": "a",
                "parameters": {
                    "weight": [
                        {"filter": "self_attn", "value": [0.1, 1.5]},
                        {"filter": "mlp", "value": 0.7},
                        {"filter": "lm_head", "value": 3},
                        {"value": 0.25},
                    ]
                },
            },
            {"model": "b", "parameters": {"weight": [{"filter": "mlp", "value": 0.2}]}},
        ],
        "parameters": {"weight": 0.9},
    },
    "a filter for all": {
        "merge_method": "linear",
        "models": [
            {"model": "a", "parameters": {"weight": [{"filter": "*", "value": [1, 2]}]}},
            {"model": "b", "parameters": {"weight": 1}},
        ],
        "parameters": {"normalize": False},
    },
    "a filter by a layer's number": {
        "merge_method": "linear",
        "models": [
            {
                "model": "a",
                "parameters": {"weight": [{"filter": "layers.1.", "value": 5}, {"value": 1}]},
            },
            {"model": "b", "parameters": {"weight": 1}},
        ],
    },
    "task arithmetic with the base among the models": {
        "merge_method": "task_arithmetic",
        "base_model": "base",
        "models": [
            {"model": "base"},
            {"model": "a", "parameters": {"weight": [0.2, 1]}},
            {"model": "b", "parameters": {"weight": -0.5}},
        ],
        "parameters": {"lambda": 0.7, "int8_mask": True},
    },
    "ties with densities of each model": {
        "merge_method": "ties",
        "base_model": "base",
        "models": [
            {"model": "a", "parameters": {"density": [1, 0.7, 0.1], "weight": 1.0}},
            {"model": "b", "parameters": {"density": 0.5, "weight": [0.1, 0.3, 0.7, 1]}},
            {
                "model": "c",
                "parameters": {
                    "density": 0.33,
                    "weight": [{"filter": "mlp", "value": 0.5}, {"value": 0}],
                },
            },
        ],
        "parameters": {"normalize": True, "int8_mask": True},
    },
    "breadcrumbs": {
        "merge_method": "breadcrumbs",
        "base_model": "base",
        "models": [
            {"model": "a", "parameters": {"density": 0.9, "gamma": [0.01, 0.1], "weight": 1}},
            {"model": "b", "parameters": {"density": [0.3, 0.6], "weight": 0.4}},
        ],
    },
    "breadcrumbs_ties": {
        "merge_method": "breadcrumbs_ties",
        "base_model": "base",
        "models": [
            {"model": "a", "parameters": {"density": 0.5, "weight": 1}},
            {"model": "b", "parameters": {"density": 0.8, "gamma": 0.1, "weight": 0.4}},
        ],
        "parameters": {"normalize": True},
    },
    "della without a density keeps all": {
        "merge_method": "della",
        "base_model": "base",
        "models": [{"model": "a"}, {"model": "b"}],
        "parameters": {"weight": 0.6, "epsilon": 0.1},
    },
    "slerp by filter and layer": {
        "merge_method": "slerp",
        "base_model": "b",
        "models": [{"model": "a"}, {"model": "b"}],
        "parameters": {
            "t": [
                {"filter": "self_attn", "value": [0, 0.5, 0.3, 0.7, 1]},
                {"filter": "mlp", "value": [1, 0.5, 0.7, 0.3, 0]},
                {"value": 0.5},
            ]
        },
    },
    "slerp with a gradient for all": {
        "merge_method": "slerp",
        "base_model": "a",
        "models": [{"model": "b"}],
        "parameters": {"t": [0.1, 0.9]},
    },
    "nuslerp": {
        "merge_method": "nuslerp",
        "models": [
            {"model": "a", "parameters": {"weight": [0, 0.7]}},
            {"model": "b", "parameters": {"weight": 0.5}},
        ],
    },
    "nuslerp of changes": {
        "merge_method": "nuslerp",
        "base_model": "base",
        "models": [
            {"model": "a", "parameters": {"weight": 0.3}},
            {"model": "b", "parameters": {"weight": 0.5}},
        ],
    },
    "multislerp": {
        "merge_method": "multislerp",
        "models": [
            {"model": name, "parameters": {"weight": weight}}
            for name, weight in (("a", 1), ("b", [0.1, 0.9]), ("c", 0.3))
        ],
    },
    "multislerp of changes": {
        "merge_method": "multislerp",
        "base_model": "base",
        "models": [
            {"model": name, "parameters": {"weight": weight}}
            for name, weight in (("a", 1), ("b", 0.9), ("c", 0.3))
        ],
    },
    "karcher": {
        "merge_method": "karcher",
        "models": [{"model": "a"}, {"model": "b"}, {"model": "c"}],
        "parameters": {"max_iter": 12, "tol": 1e-7},
    },
    "model_stock": {
        "merge_method": "model_stock",
        "base_model": "base",
        "models": [{"model": "a"}, {"model": "b"}, {"model": "c"}],
    },
    "nearswap": {
        "merge_method": "nearswap",
        "base_model": "a",
        "models": [{"model": "b"}],
        "parameters": {"t": [0.01, 0.1]},
    },
    "sce": {
        "merge_method": "sce",
        "base_model": "base",
        "models": [{"model": "a"}, {"model": "b"}, {"model": "c"}],
        "parameters": {"select_topk": [0.3, 0.8]},
    },
}


def source(model: str, first: int, end: int, **parameters: Any) -> dict[str, Any]:
    return {
        "model": model,
        "layer_range": [first, end],
        **({"parameters": parameters} if parameters else {}),
    }


FLAT["a base that linear has none for"] = {
    "merge_method": "linear",
    "base_model": "c",
    "models": [{"model": "a", "parameters": {"weight": 2}}, {"model": "b"}],
    "parameters": {"weight": 0.5},
}
STACKED: dict[str, dict[str, Any]] = {
    "layers of two models": {
        "merge_method": "passthrough",
        "slices": [{"sources": [source("a", 0, 4)]}, {"sources": [source("b", 2, 5)]}],
    },
    "layers twice, scaled by filter": {
        "merge_method": "passthrough",
        "slices": [
            {"sources": [source("a", 0, 3)]},
            {
                "sources": [
                    source("a", 1, 4, scale=[{"filter": "o_proj", "value": 0.5}, {"value": 1.0}])
                ]
            },
            {"sources": [source("a", 4, 5)]},
        ],
    },
    "an empty slice for the head": {
        "merge_method": "linear",
        "slices": [
            {"sources": [source("a", 0, 5), source("b", 0, 5)]},
            {"sources": [source("c", 5, 5)]},
        ],
        "parameters": {"weight": 1.0},
    },
    "gradients within slices, and a slice of one layer": {
        "merge_method": "linear",
        "slices": [
            {"sources": [source("a", 0, 3, weight=[0.1, 1]), source("b", 0, 3, weight=0.5)]},
            {"sources": [source("a", 3, 4, weight=[0.2, 2]), source("b", 2, 3, weight=0.5)]},
            {"sources": [source("c", 2, 5), source("b", 1, 4, weight=[1, 3])]},
        ],
        "parameters": {"weight": 0.9},
    },
    "parameters of slices": {
        "merge_method": "slerp",
        "base_model": "a",
        "slices": [
            {"sources": [source("a", 0, 2), source("b", 0, 2)], "parameters": {"t": [0, 0.4]}},
            {"sources": [source("b", 2, 5), source("a", 1, 4)]},
        ],
        "parameters": {"t": [{"filter": "mlp", "value": [0.3, 0.9]}, {"value": 0.2}]},
    },
    "changes in slices": {
        "merge_method": "ties",
        "base_model": "base",
        "slices": [
            {"sources": [source("base", 0, 3), source("a", 0, 3), source("b", 0, 3, weight=2)]},
            {"sources": [source("base", 3, 5), source("a", 3, 5, density=[0.2, 0.9])]},
        ],
        "parameters": {"density": 0.5, "weight": 1.0},
    },
    "a filter by a layer's number in a stack": {
        "merge_method": "passthrough",
        "slices": [{"sources": [source("a", 0, 3)]}, {"sources": [source("b", 1, 4)]}],
        "parameters": {"scale": [{"filter": "layers.3.", "value": 0.5}, {"value": 1.0}]},
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("name", [*FLAT, *STACKED])
def test_a_file_gives_the_numbers_that_mergekit_makes_of_it(name: str, place: Path) -> None:
    said = {**FLAT, **STACKED}[name]
    Path("recipe.yml").write_text(yaml.safe_dump({**said, "dtype": "float32"}))
    merge(read_recipe(Path("recipe.yml")).recipe, Path("ours"))
    given = config.MergeConfiguration.model_validate(yaml.safe_load(Path("recipe.yml").read_text()))
    running.run_merge(
        given, "theirs", running.MergeOptions(copy_tokenizer=False, write_model_card=False)
    )
    ours, theirs = load("ours"), load("theirs")
    assert ours.keys() == theirs.keys()
    torch.testing.assert_close(ours, theirs, rtol=0.0, atol=3e-6)
    layers = [json.loads(Path(f, "config.json").read_text()) for f in ("ours", "theirs")]
    assert layers[0]["num_hidden_layers"] == layers[1]["num_hidden_layers"]


def taller(name: str, words: int, seed: int) -> None:
    """A model like `a` with more words, and a tokenizer beside it and the others."""
    chance = torch.Generator().manual_seed(seed)
    model = load("a")
    for table in TABLES:
        more = torch.randn(words - WORDS, WIDTH, generator=chance)
        model[table] = torch.cat([model[table] + 0.1, more])
    Path(name).mkdir()
    save_file(model, Path(name, "model.safetensors"), metadata={"format": "pt"})
    Path(name, "config.json").write_text(json.dumps({**LLAMA, "vocab_size": words}))
    for folder, count in ((name, words), ("base", WORDS), ("a", WORDS), ("b", WORDS)):
        vocabulary = {f"w{number}": number for number in range(count)}
        own = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "w0"}
        said = {"version": "1.0", "model": own, "added_tokens": []}
        Path(folder, "tokenizer.json").write_text(json.dumps(said))
        about = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "w0"}
        Path(folder, "tokenizer_config.json").write_text(json.dumps(about))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ties"])
def test_words_that_some_models_lack_get_the_rows_that_mergekit_gives_them(
    method: str, place: Path
) -> None:
    taller("tall", WORDS + 3, 1)
    taller("taller", WORDS + 5, 2)
    base = {} if method == "linear" else {"base_model": "base"}
    models = [{"model": name} for name in ("a", "tall", "taller")]
    said = {"merge_method": method, "models": models, "parameters": {"weight": 0.5}, **base,
            "tokenizer_source": "union", "dtype": "float32"}  # fmt: skip
    Path("recipe.yml").write_text(yaml.safe_dump(said))
    merge(read_recipe(Path("recipe.yml")).recipe, Path("ours"))
    options = running.MergeOptions(write_model_card=False)
    running.run_merge(config.MergeConfiguration.model_validate(said), "theirs", options)
    numbers, theirs = read_tokens(Path("theirs")), load("theirs")
    assert numbers is not None
    order = [numbers[f"w{number}"] for number in range(WORDS + 5)]  # new ones come in any order
    for table in TABLES:
        theirs[table] = theirs[table][order]
    torch.testing.assert_close(load("ours"), theirs, rtol=0.0, atol=3e-6)
    assert json.loads(Path("ours/config.json").read_text())["vocab_size"] == WORDS + 5
