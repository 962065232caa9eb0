"""LoRA adapters on their base are models like any other."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from allfuse.base.errors import MergeError
from allfuse.cli.app import app
from allfuse.merge.blocks import Files
from allfuse.merge.source import Source, open_source

SHAPES = {
    "model.emb.weight": (50, 12),
    "model.layers.0.q.weight": (40, 24),
    "model.layers.0.q.bias": (40,),
    "model.layers.0.conv.weight": (6, 4, 3, 3),
    "model.norm.weight": (24,),
}
Q = "model.layers.0.q"


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    folder.mkdir()
    tensors = {name: draw(*shape) for name, shape in SHAPES.items()}
    save_file(tensors | {"count": torch.tensor([3])}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


def write(folder: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    """An adapter as peft writes it."""
    folder.mkdir(exist_ok=True)
    plain = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "init_lora_weights": True}
    (folder / "adapter_config.json").write_text(json.dumps(plain | config))
    own = {f"base_model.model.{n}": t.contiguous() for n, t in tensors.items()}
    save_file(own, folder / "adapter_model.safetensors")
    return folder


def linear(module: str = Q, rank: int = 4, rows: int = 40, columns: int = 24) -> dict[str, Tensor]:
    return {
        f"{module}.lora_A.weight": draw(rank, columns, seed=1),
        f"{module}.lora_B.weight": draw(rows, rank, seed=2),
    }


def read(source: Source, name: str, block: int = 10**9) -> Tensor:
    files, entry = Files(), source.entries[name]
    try:
        parts = [
            files.read(entry, begin, min(block, entry.count - begin))
            for begin in range(0, entry.count, block)
        ]
        return torch.cat(parts).view(entry.shape)
    finally:
        files.close()


def check(base: Path, folder: Path, name: str, change: Tensor) -> None:
    """Compare a tensor of base + adapter with what it should be."""
    own = load_file(base / "model.safetensors")
    source = open_source(Path(f"{base}+{folder}"))
    torch.testing.assert_close(
        read(source, name).double(), own[name].double() + change, rtol=1e-6, atol=1e-6
    )
    others = [each for each in own if each != name]
    assert all(torch.equal(read(source, each), own[each]) for each in others)


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({}, 2.0),
        ({"lora_alpha": 3}, 0.75),
        ({"use_rslora": True}, 8 / math.sqrt(4)),
        ({"alpha_pattern": {"layers.0.q": 2}}, 0.5),
        ({"alpha_pattern": {"^model.layers.0.q": 2}, "rank_pattern": {"q": 4}}, 0.5),
        ({"alpha_pattern": {"0.qq": 2, "^layers.0.q": 2}}, 2.0),
    ],
)
def test_a_linear_layer_gets_scale_times_b_a(
    config: dict[str, Any], scale: float, base: Path, tmp_path: Path
) -> None:
    made = linear()
    folder = write(tmp_path / "lora", made, **config)
    a, b = (made[f"{Q}.lora_{side}.weight"].double() for side in "AB")
    check(base, folder, f"{Q}.weight", scale * b @ a)


def test_a_layer_that_keeps_its_weight_the_other_way_gets_the_transposed(
    base: Path, tmp_path: Path
) -> None:
    made = linear(rows=24, columns=40)
    folder = write(tmp_path / "lora", made, fan_in_fan_out=True)
    a, b = (made[f"{Q}.lora_{side}.weight"].double() for side in "AB")
    check(base, folder, f"{Q}.weight", 2 * (b @ a).T)


def test_an_embedding_gets_the_transposed(base: Path, tmp_path: Path) -> None:
    a, b = draw(4, 50, seed=1), draw(12, 4, seed=2)
    made = {"model.emb.lora_embedding_A": a, "model.emb.lora_embedding_B": b}
    folder = write(tmp_path / "lora", made)
    check(base, folder, "model.emb.weight", 2 * (b.double() @ a.double()).T)


def test_a_convolution_gets_the_product_of_its_matrices(base: Path, tmp_path: Path) -> None:
    a, b = draw(4, 4, 3, 3, seed=1), draw(6, 4, 1, 1, seed=2)
    conv = "model.layers.0.conv"
    folder = write(tmp_path / "lora", {f"{conv}.lora_A.weight": a, f"{conv}.lora_B.weight": b})
    change = torch.einsum("or,rihw->oihw", b[:, :, 0, 0].double(), a.double())
    check(base, folder, f"{conv}.weight", 2 * change)


@pytest.mark.parametrize("block", [1, 24, 7 * 24, 100, 33 * 24])
def test_how_a_tensor_is_cut_into_blocks_does_not_change_a_bit(
    block: int, base: Path, tmp_path: Path
) -> None:
    source = open_source(Path(f"{base}+{write(tmp_path / 'lora', linear())}"))
    whole = read(source, f"{Q}.weight")
    assert torch.equal(read(source, f"{Q}.weight", block), whole)


def test_whole_tensors_of_an_adapter_take_the_place_of_the_bases(
    base: Path, tmp_path: Path
) -> None:
    bias, norm, head = draw(40, seed=5), draw(24, seed=6), draw(3, 24, seed=7)
    more = {f"{Q}.base_layer.bias": bias, "model.norm.weight": norm, "head.weight": head}
    folder = write(tmp_path / "lora", linear() | more, bias="all", modules_to_save=["norm"])
    source = open_source(Path(f"{base}+{folder}"))
    assert torch.equal(read(source, f"{Q}.bias"), bias)
    assert torch.equal(read(source, "model.norm.weight"), norm)
    assert torch.equal(read(source, "head.weight"), head)
    assert "head.weight" in source.files["model.safetensors"]


@pytest.mark.parametrize("said", ["absolute", "beside"])
def test_an_adapter_that_names_its_base_is_a_model(said: str, base: Path, tmp_path: Path) -> None:
    named = str(base) if said == "absolute" else "../base"
    folder = write(tmp_path / "lora", linear(), base_model_name_or_path=named)
    alone, both = open_source(folder), open_source(Path(f"{base}+{folder}"))
    assert torch.equal(read(alone, f"{Q}.weight"), read(both, f"{Q}.weight"))
    assert [file.name for file in alone.side_files()] == ["config.json"]


def test_adapters_are_added_one_after_the_other(base: Path, tmp_path: Path) -> None:
    one = write(tmp_path / "one", linear())
    two = write(tmp_path / "two", linear(), lora_alpha=4)
    both = open_source(Path(f"{base}+{one}+{two}"))
    own = load_file(base / "model.safetensors")[f"{Q}.weight"]
    a, b = (linear()[f"{Q}.lora_{side}.weight"].double() for side in "AB")
    torch.testing.assert_close(
        read(both, f"{Q}.weight").double(), own.double() + 3 * b @ a, rtol=1e-6, atol=1e-6
    )


def test_a_base_named_without_its_first_part_is_understood(base: Path, tmp_path: Path) -> None:
    """As transformers names the tensors of a model without a head."""
    folder = write(tmp_path / "lora", linear(f"whole.{Q}"))
    source = open_source(Path(f"{base}+{folder}"))
    assert not torch.equal(
        read(source, f"{Q}.weight"), load_file(base / "model.safetensors")[f"{Q}.weight"]
    )


def test_the_weights_may_be_a_file_of_torch(base: Path, tmp_path: Path) -> None:
    folder = write(tmp_path / "lora", linear())
    wanted = read(open_source(Path(f"{base}+{folder}")), f"{Q}.weight")
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    assert torch.equal(read(open_source(Path(f"{base}+{folder}")), f"{Q}.weight"), wanted)


def test_tied_weights_change_together(base: Path, tmp_path: Path) -> None:
    tensors = load_file(base / "model.safetensors")
    save_file(tensors, base / "model.safetensors", metadata={"head.weight": f"{Q}.weight"})
    for module in (Q, "head"):
        source = open_source(Path(f"{base}+{write(tmp_path / module, linear(module))}"))
        assert torch.equal(read(source, f"{Q}.weight"), read(source, "head.weight"))
        assert not torch.equal(read(source, "head.weight"), tensors[f"{Q}.weight"])
    with pytest.raises(MergeError, match="twice"):
        open_source(Path(f"{base}+{write(tmp_path / 'both', linear(Q) | linear('head'))}"))


@pytest.mark.parametrize(
    ("tensors", "config", "said"),
    [
        (linear(), {"use_dora": True}, "DoRA changes the length of each row"),
        (linear(), {"peft_type": "VERA"}, "adapter of the kind VERA; allowed: LORA"),
        (linear(), {"init_lora_weights": "pissa"}, "changed the model that it was trained on"),
        (linear(), {"layer_replication": [[0, 2]]}, "it copies layers"),
        (linear(), {"lora_alpha": "much"}, "lora_alpha 'much'; allowed: a number"),
        (linear(), {"alpha_pattern": {"(a+)+$": 2}}, "no regular expressions"),
        (linear(columns=25), {}, "do not fit model.layers.0.q.weight"),
        (linear(rows=24, columns=40), {}, "fan_in_fan_out in adapter_config.json"),
        (linear("model.layers.7.q"), {}, "base has no such tensor"),
        ({f"{Q}.lora_A.weight": draw(4, 24)}, {}, "has A of model.layers.0.q and not the other"),
        (linear() | {f"{Q}.lora_magnitude_vector": draw(40)}, {}, "neither A nor B"),
        (linear() | {f"{Q}.bias": draw(41)}, {}, r"q.bias is \[41\], and \[40\] in"),
        ({f"{Q}.lora_A.weight": draw(0, 24), f"{Q}.lora_B.weight": draw(40, 0)}, {}, "do not fit"),
    ],
)
def test_an_adapter_that_is_another_or_does_not_fit_is_refused(
    tensors: dict[str, Tensor], config: dict[str, Any], said: str, base: Path, tmp_path: Path
) -> None:
    folder = write(tmp_path / "lora", tensors, **config)
    with pytest.raises(MergeError, match=said):
        open_source(Path(f"{base}+{folder}"))


def test_an_adapter_without_its_base_or_its_weights_is_refused(base: Path, tmp_path: Path) -> None:
    folder = write(tmp_path / "lora", linear(), base_model_name_or_path="someone/model-7b")
    with pytest.raises(MergeError, match=r"someone/model-7b.*next: .*BASE\+"):
        open_source(folder)
    itself = write(tmp_path / "itself", linear(), base_model_name_or_path=str(tmp_path / "itself"))
    with pytest.raises(MergeError, match="is no file or folder here"):
        open_source(itself)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(MergeError, match="and no weights; allowed: adapter_model"):
        open_source(Path(f"{base}+{folder}"))
    (folder / "adapter_config.json").write_text("[1]")
    with pytest.raises(MergeError, match="is no JSON object"):
        open_source(Path(f"{base}+{folder}"))


def test_the_command_fuses_adapters_of_one_base(base: Path, tmp_path: Path) -> None:
    one, two = write(tmp_path / "one", linear()), write(tmp_path / "two", linear(), lora_alpha=4)
    models = [f"{base}+{one}", f"{base}+{two}"]
    out = tmp_path / "out"
    said = ["--base", str(base), "--rule", "task_arithmetic", "--out", str(out), "-q"]
    done = CliRunner().invoke(app, ["merge", *models, *said])
    assert done.exit_code == 0, done.output
    own = load_file(base / "model.safetensors")[f"{Q}.weight"]
    a, b = (linear()[f"{Q}.lora_{side}.weight"].double() for side in "AB")
    torch.testing.assert_close(
        load_file(out / "model.safetensors")[f"{Q}.weight"].double(),
        own.double() + 3 * b @ a,
        rtol=1e-5,
        atol=1e-5,
    )
    assert (out / "config.json").exists()
    inside = CliRunner().invoke(app, ["merge", *models, "--out", str(one / "out"), "-q"])
    assert isinstance(inside.exception, MergeError)
    assert "lies inside the model" in str(inside.exception)
