"""Models on disk are read as others write them: files of PyTorch, distributed checkpoints."""

from __future__ import annotations

import json
import pickle
import random
import subprocess
import sys
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from typer.testing import CliRunner

from allfuse.base.errors import MergeError, UserError
from allfuse.cli.app import app
from allfuse.merge.blocks import Files
from allfuse.merge.merge import merge
from allfuse.merge.recipe import Recipe
from allfuse.merge.source import Source, open_source
from allfuse.rule import METHODS
from allfuse.store.checkpoint import Checkpoints
from allfuse.store.model_files import find_ingredients
from allfuse.store.run import RunFolder
from allfuse.store.tensorfile import DTYPES, NAMES

Model = dict[str, Tensor]


def make_model(seed: int = 0) -> Model:
    chance = torch.Generator().manual_seed(seed)
    shapes = {"emb": (23, 40), "up.weight": (40, 70), "conv": (5, 4, 3, 3), "one": (), "no": (0, 4)}
    model = {name: torch.randn(shape, generator=chance) for name, shape in shapes.items()}
    half = torch.randn(9, 3, generator=chance).bfloat16()
    return model | {"half": half, "seen": torch.tensor([seed, 7])}


def read(source: Source, block: int = 10**9) -> Model:
    """All tensors, read in blocks of so many numbers."""
    files = Files()
    try:
        found = {}
        for name, entry in source.entries.items():
            parts = [
                files.read(entry, begin, min(block, entry.count - begin))
                for begin in range(0, entry.count, block)
            ]
            found[name] = torch.cat([torch.zeros(0, dtype=DTYPES[entry.dtype]), *parts])
            found[name] = found[name].view(entry.shape)
        return found
    finally:
        files.close()


def assert_same(found: Model, wanted: Model) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype, name
        assert found[name].shape == value.shape, name
        assert torch.equal(found[name], value), name


class Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 2)


def save_old(content: Any, path: Path) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize("save", [torch.save, save_old])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda model: model,
        OrderedDict,
        lambda model: {"model": model, "step": torch.tensor(3), "optimizer": {"state": {}}},
        lambda model: {"state_dict": model, "hyper_parameters": {"lr": 0.1, "names": {"a"}}},
        lambda model: {"model_state_dict": OrderedDict(model), "epoch": 4},
        lambda model: {n: nn.Parameter(t, requires_grad=t.is_floating_point() and n != "half")
                       if t.is_floating_point() else t for n, t in model.items()},
    ],
)  # fmt: skip
def test_a_file_of_torch_save_holds_the_model_wherever_it_is_in_it(
    save: Callable[..., None], wrap: Callable[[Model], Any], tmp_path: Path
) -> None:
    model = make_model()
    save(wrap(model), tmp_path / "model.pt")
    assert_same(read(open_source(tmp_path / "model.pt")), model)


@pytest.mark.parametrize("name", ["modèle.pt", "模型.pt", "a.b c.ckpt"])
def test_a_file_may_have_any_name(name: str, tmp_path: Path) -> None:
    """It is in the archive, too, by which its parts are found."""
    torch.save(make_model(), tmp_path / name)
    assert_same(read(open_source(tmp_path / name)), make_model())


@pytest.mark.parametrize("save", [torch.save, save_old])
def test_the_state_dict_of_a_module_is_read_with_what_it_carries(
    save: Callable[..., None], tmp_path: Path
) -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    save({"state_dict": module.state_dict(), "args": __import__("argparse").Namespace(lr=1)},
         tmp_path / "a.ckpt")  # fmt: skip
    assert_same(read(open_source(tmp_path / "a.ckpt")), dict(module.state_dict()))


def test_tensors_of_every_type_are_read(tmp_path: Path) -> None:
    model = {
        str(dtype).removeprefix("torch."): torch.arange(12).remainder(2).to(dtype).view(3, 4)
        for dtype in NAMES
    }
    torch.save(model, tmp_path / "all.pt")
    found = read(open_source(tmp_path / "all.pt"))
    assert found.keys() == model.keys()
    for name, value in model.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name].view(torch.uint8), value.view(torch.uint8)), name


@pytest.mark.parametrize("block", [1, 7, 10**9])
@pytest.mark.parametrize("save", [torch.save, save_old])
def test_views_are_read_as_the_tensors_that_they_are(
    save: Callable[..., None], block: int, tmp_path: Path
) -> None:
    whole = torch.arange(120.0).view(4, 5, 6)
    model = {
        "transposed": whole[0].T,
        "permuted": whole.permute(2, 0, 1),
        "column": whole[:, 2, 3],
        "rows": whole[1:3],
        "stepped": whole[::2, 1::2, ::3],
        "spread": torch.tensor([1.0, 2.0])[:, None].expand(2, 3),
        "last": whole.to(memory_format=torch.contiguous_format).bfloat16().transpose(0, 1),
    }
    save(model, tmp_path / "views.pt")
    assert_same(read(open_source(tmp_path / "views.pt"), block), model)


def test_a_model_in_several_files_is_read_by_its_index(tmp_path: Path) -> None:
    model = make_model()
    places = {}
    for number, part in enumerate([list(model)[:3], list(model)[3:]]):
        file = f"pytorch_model-{number + 1:05d}-of-00002.bin"
        torch.save({name: model[name] for name in part}, tmp_path / file)
        places |= dict.fromkeys(part, file)
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    (tmp_path / "config.json").write_text("{}")
    torch.save({}, tmp_path / "training_args.bin")
    source = open_source(tmp_path)
    assert_same(read(source), model)
    assert [file.name for file in source.side_files()] == ["config.json"]
    (tmp_path / file).unlink()
    with pytest.raises(MergeError, match="no such file beside it"):
        open_source(tmp_path)


@pytest.mark.parametrize("save", [torch.save, save_old])
def test_two_names_of_one_tensor_are_tied(save: Callable[..., None], tmp_path: Path) -> None:
    shared, other = torch.randn(4, 3), torch.randn(4, 3)
    save({"head": shared, "embed": shared, "view": shared[:2], "other": other},
         tmp_path / "m.pt")  # fmt: skip
    source = open_source(tmp_path / "m.pt")
    assert source.tied == {"head": "embed"}
    assert source.files == {"model.safetensors": ["embed", "view", "other"]}


TIED: dict[str, Callable[[Path, Tensor], None]] = {
    "both": lambda path, w: torch.save({"embed": w, "head": w}, path.with_suffix(".pt")),
    "other way": lambda path, w: save_file({"head": w}, path, metadata={"embed": "head"}),
    "embed": lambda path, w: save_file({"embed": w}, path),
    "head": lambda path, w: save_file({"head": w}, path),
}


@pytest.mark.parametrize("first", ["both", "other way"])
@pytest.mark.parametrize("second", TIED)
def test_tied_weights_are_fused_under_whichever_name_a_model_has_them(
    first: str, second: str, tmp_path: Path
) -> None:
    ones = torch.ones(4, 3)
    for order in ((first, second), (second, first)):
        paths = []
        for number, form in enumerate(order):
            paths.append(tmp_path / f"{number}.safetensors")
            TIED[form](paths[-1], ones * number)
            if form == "both":
                paths[-1] = paths[-1].with_suffix(".pt")
        fuse(paths, tmp_path / "out")
        made = open_source(tmp_path / "out")
        assert made.entries.keys() == open_source(paths[0]).entries.keys()
        assert all(torch.equal(value, 0.75 * ones) for value in read(made).values())


def test_tied_weights_stay_tied_in_several_files(tmp_path: Path) -> None:
    shared = torch.ones(4, 3)
    torch.save({"a": torch.zeros(9), "embed": shared, "head": shared}, tmp_path / "m.pt")
    recipe = Recipe(
        models=[tmp_path / "m.pt"], rule=METHODS["mean"](), weights=[1.0], shard_bytes=40
    )
    merge(recipe, tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 2
    assert open_source(tmp_path / "out").tied == {"head": "embed"}


def test_names_that_are_tied_in_one_model_and_not_in_the_other_are_refused(tmp_path: Path) -> None:
    TIED["both"](tmp_path / "a.pt", torch.ones(4, 3))
    save_file({"embed": torch.ones(4, 3), "head": torch.zeros(4, 3)}, tmp_path / "b.safetensors")
    for paths in (["a.pt", "b.safetensors"], ["b.safetensors", "a.pt"]):
        with pytest.raises(MergeError, match="tied weights"):
            fuse([tmp_path / path for path in paths], tmp_path / "out")


def fuse(models: list[Path], out: Path) -> bytes:
    recipe = Recipe(models=models, rule=METHODS["linear"](), weights=[1.0, 3.0][: len(models)])
    merge(recipe, out, overwrite=True)
    return (out / "model.safetensors").read_bytes()


def test_models_of_different_forms_are_fused_to_the_same_bytes(tmp_path: Path) -> None:
    one, two = make_model(1), make_model(2)
    save_file(one, tmp_path / "one.safetensors")
    save_file(two, tmp_path / "two.safetensors")
    torch.save({"model": two}, tmp_path / "two.pt")
    (tmp_path / "two").mkdir()
    save_distributed({"model": two}, tmp_path / "two")
    first = tmp_path / "one.safetensors"
    wanted = fuse([first, tmp_path / "two.safetensors"], tmp_path / "out")
    for other in ("two.pt", "two"):
        assert fuse([first, tmp_path / other], tmp_path / "out") == wanted


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("save", [torch.save, save_old])
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (lambda path: Evil(path), "would run code"),
        (lambda path: {"state_dict": make_model(), "more": Evil(path)}, "would run code"),
        (lambda path: Wrapped(), r"test_inputs\.Wrapped: to read it would run code"),
        (lambda path: {"a": 3, "b": "text"}, "holds no weights: there is a, b"),
        (lambda path: [torch.zeros(3)], "holds a list and no tensors by their names"),
        (lambda path: {"w": torch.eye(3).to_sparse()}, "w is a sparse tensor"),
        (lambda path: {"w": torch.zeros(3, dtype=torch.complex128)}, "which safetensors files do"),
    ],
)
def test_a_file_that_holds_no_model_or_code_is_refused_and_no_code_runs(
    content: Callable[[Path], Any], said: str, save: Callable[..., None], tmp_path: Path
) -> None:
    save(content(tmp_path / "touched"), tmp_path / "m.pt")
    with pytest.raises(MergeError, match=said):
        open_source(tmp_path / "m.pt")
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize(
    "payload",
    [
        b"cos\nsystem\n(S'touch TOUCHED'\ntR.",
        b'cbuiltins\neval\n(S\'open("TOUCHED", "w")\'\ntR.',
        b"ccollections\nOrderedDict.__init__.__globals__\n.",
        b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\rtouch TOUCHED\x85R.",
        b"\x80\x02\x82\x01.",
        b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.",
        b"\x80\x02r\xff\xff\xff\x7f.",
        b"ctorch\nfloat32\n}S'code'\nS'F64'\nsb.",
        b"ccollections\nOrderedDict\nN}S'kind'\nS'x'\ns\x86b.",
    ],
)
def test_pickles_made_by_hand_run_nothing(
    payload: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import zipfile

    monkeypatch.chdir(tmp_path)
    with zipfile.ZipFile("m.pt", "w") as archive:
        archive.writestr("m/data.pkl", payload)
    with pytest.raises(MergeError):
        open_source(Path("m.pt"))
    assert not Path("TOUCHED").exists()


def test_a_torchscript_program_is_refused(tmp_path: Path) -> None:
    traced = torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2))
    traced.save(str(tmp_path / "m.pt"))
    with pytest.raises(MergeError, match="is a TorchScript program"):
        open_source(tmp_path / "m.pt")


@pytest.mark.parametrize("save", [torch.save, save_old])
def test_a_file_that_was_cut_off_is_refused(save: Callable[..., None], tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    save(make_model(), path)
    data = path.read_bytes()
    for length in (0, 1, 2, 50, len(data) // 3, len(data) - 300, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(MergeError, match=r"m\.pt is damaged or no PyTorch checkpoint"):
            open_source(path)


@pytest.mark.parametrize("form", ["new", "old", "distributed"])
def test_damaged_bytes_are_refused_or_give_numbers_and_never_another_error(
    form: str, tmp_path: Path
) -> None:
    path = tmp_path / "m.pt"
    if form == "distributed":
        path = tmp_path / "folder"
        path.mkdir()
        save_distributed({"model": make_model()}, path)
        victim = path / ".metadata"
    else:
        (torch.save if form == "new" else save_old)(make_model(), path)
        victim = path
    data, chance, refused = victim.read_bytes(), random.Random(form), 0
    for _ in range(60):
        bad = bytearray(data)
        for _ in range(chance.choice((1, 1, 4))):
            place = chance.randrange(min(len(bad), 3000))
            bad[place] = chance.randrange(256)
        victim.write_bytes(bad)
        try:
            read(open_source(path))
        except MergeError:
            refused += 1
    assert refused > 5


def save_distributed(state: dict[str, Any], folder: Path) -> None:
    with warnings.catch_warnings(action="ignore"):  # that it is a single process
        dcp.save(state, checkpoint_id=folder, no_dist=True)


def test_a_distributed_checkpoint_holds_the_model_beside_an_optimizer(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 0.1}]}
    state = {"model": module.state_dict(), "optimizer": optimizer, "step": 4}
    save_distributed(state, tmp_path)
    source = open_source(tmp_path)
    assert_same(read(source), dict(module.state_dict()))
    assert source.side_files() == []


def test_a_distributed_checkpoint_may_be_the_state_dict_itself(tmp_path: Path) -> None:
    model = make_model()
    save_distributed(model, tmp_path)
    assert_same(read(open_source(tmp_path)), model)


def write_pieces(folder: Path, pieces: list[tuple[tuple[int, int], Tensor]], **about: Any) -> None:
    """A checkpoint of one tensor in pieces by offset, each in a file of its own, as from a mesh."""
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    places, chunks = {}, []
    for number, (offsets, piece) in enumerate(pieces):
        file = f"__{number}_0.distcp"
        torch.save(piece, folder / file)
        index = MetadataIndex("model.w", offsets)
        places[index] = _StorageInfo(file, 0, (folder / file).stat().st_size)
        chunks.append(ChunkStorageMetadata(torch.Size(offsets), piece.shape))
    size = about.get("size", torch.Size([6, 10]))
    tensor = TensorStorageMetadata(TensorProperties(pieces[0][1].dtype), size, chunks)
    metadata = Metadata({"model.w": tensor}, {"model.w": ("model", "w")}, places)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


WHOLE = torch.arange(60.0).view(6, 10)
CUT = [
    ((row, column), WHOLE[row : row + 3, column : column + width].clone())
    for row in (0, 3)
    for column, width in ((0, 4), (4, 6))
]


@pytest.mark.parametrize("block", [1, 7, 20, 10**9])
def test_a_tensor_in_pieces_over_several_files_is_put_together(block: int, tmp_path: Path) -> None:
    write_pieces(tmp_path, [(at, piece.T.contiguous().T) for at, piece in CUT])
    assert torch.equal(read(open_source(tmp_path), block)["w"], WHOLE)


@pytest.mark.parametrize(
    ("pieces", "about", "said"),
    [
        (CUT[:3], {}, "are more or less than"),
        ([*CUT[:3], ((3, 5), CUT[3][1])], {}, "lies outside of it"),
        ([*CUT[:3], ((2, 4), CUT[3][1])], {}, "the pieces of model.w overlap"),
        (CUT, {"size": torch.Size([6, 11])}, "are more or less than"),
        (CUT, {"size": torch.Size([5, 10])}, "lies outside of it"),
    ],
)
def test_pieces_that_do_not_make_a_tensor_are_refused(
    pieces: Any, about: dict[str, Any], said: str, tmp_path: Path
) -> None:
    write_pieces(tmp_path, pieces, **about)
    with pytest.raises(MergeError, match=said):
        read(open_source(tmp_path))


def test_a_distributed_checkpoint_that_lacks_a_file_or_holds_code_is_refused(
    tmp_path: Path,
) -> None:
    write_pieces(tmp_path, CUT)
    (tmp_path / "__2_0.distcp").unlink()
    with pytest.raises(MergeError, match=r"__2_0\.distcp cannot be read: No such file"):
        open_source(tmp_path)
    touched = tmp_path / "touched"
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Evil(touched)))
    with pytest.raises(MergeError, match="would run code"):
        open_source(tmp_path)
    assert not touched.exists()


SHARDED = """
import sys, torch, torch.distributed as dist, torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=4)
mesh = init_device_mesh("cpu", (2, 2))
whole = torch.load(f"{folder}/whole.pt")
places = {"a": [Shard(0), Shard(1)], "b": [Replicate(), Shard(0)], "c": [Shard(1), Replicate()]}
state = {n: distribute_tensor(whole[n], mesh, p) for n, p in places.items()}
dcp.save({"model": state}, checkpoint_id=f"{folder}/cut")
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_a_checkpoint_of_four_ranks_on_a_mesh_is_read(tmp_path: Path) -> None:
    whole = {"a": torch.randn(7, 5), "b": torch.randn(9, 2, 3).bfloat16(), "c": torch.randn(4, 11)}
    torch.save(whole, tmp_path / "whole.pt")
    ranks = [
        subprocess.Popen([sys.executable, "-c", SHARDED, str(rank), str(tmp_path)])
        for rank in range(4)
    ]
    assert [rank.wait(timeout=120) for rank in ranks] == [0] * 4
    for block in (3, 10**9):
        assert_same(read(open_source(tmp_path / "cut"), block), whole)


def test_a_run_that_has_not_ended_gives_its_newest_checkpoint(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", {"plan": "data(1)"})
    with pytest.raises(MergeError, match="neither a model nor a checkpoint yet"):
        open_source(tmp_path / "run")
    checkpoints = Checkpoints(run.checkpoints)
    for step in (3, 12):
        state = {"models": {"model": make_model(step)}, "optimizers": {"o": torch.zeros(2)}}
        checkpoints.start(step, state)
        checkpoints.wait()
    checkpoints.close()
    run.close()
    assert_same(read(open_source(tmp_path / "run")), make_model(12))


def test_headers_are_read_without_torch(tmp_path: Path) -> None:
    (tmp_path / "cut").mkdir()
    save_distributed({"model": make_model()}, tmp_path / "cut")
    torch.save(make_model(), tmp_path / "a.pt")
    script = (
        "import sys; from typer.testing import CliRunner; from allfuse.cli.app import app; "
        f"found = CliRunner().invoke(app, ['merge', {str(tmp_path / 'cut')!r}, "
        f"{str(tmp_path / 'a.pt')!r}, '--out', {str(tmp_path / 'out')!r}, '--dry-run'], "
        "catch_exceptions=False); print('torch' in sys.modules, found.exit_code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60
    )
    assert done.stdout.strip() == "False 0", done.stderr


def test_what_is_no_model_is_refused_with_what_would_be(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    for place, said in [
        ("gone", "there is no"),
        ("empty", "holds no files of weights"),
        ("model.gguf", "is no model by its name"),
        ("gone+empty", "is no folder with an adapter_config"),
    ]:
        with pytest.raises(UserError, match=said) as refused:
            open_source(tmp_path / place)
        assert "allowed" in str(refused.value)


@pytest.mark.parametrize(
    ("files", "found"),
    [
        (["members/10/run.json", "members/9/run.json", "snapshots/a.safetensors", "run.json"],
         ["members/9", "members/10"]),
        (["snapshots/step-000100.safetensors", "snapshots/step-20.safetensors",
          "model.safetensors", "run.json"],
         ["snapshots/step-20.safetensors", "snapshots/step-000100.safetensors", "."]),
        (["model.safetensors", "other.safetensors"], ["."]),
        (["b.safetensors", "a10.safetensors", "a9.safetensors", "optimizer.pt"],
         ["a9.safetensors", "a10.safetensors", "b.safetensors"]),
        (["b.pt", "a.pt", "optimizer.pt"], ["a.pt", "b.pt"]),
        (["x/model.safetensors", "w/run.json", "v/adapter_config.json", "notes/text.md"],
         ["v", "w", "x"]),
        (["only.safetensors"], ["."]),
        (["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"], ["."]),
    ],
)  # fmt: skip
def test_the_models_in_a_folder_are_found_in_their_order(
    files: list[str], found: list[str], tmp_path: Path
) -> None:
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    assert find_ingredients(tmp_path) == [tmp_path / place for place in found]


def test_the_command_fuses_files_of_torch_and_ends_with_2_where_one_holds_code(
    tmp_path: Path,
) -> None:
    models = [str(tmp_path / name) for name in ("a.pt", "b.bin")]
    for model in models:
        torch.save(make_model(), model)
    done = CliRunner().invoke(app, ["merge", *models, "--out", str(tmp_path / "out"), "-q"])
    assert done.exit_code == 0, done.output
    assert_same(load_file(tmp_path / "out" / "model.safetensors"), load(models[0]))
    torch.save(Wrapped(), models[1])
    command = [sys.executable, "-m", "allfuse", "merge", *models, "--out", str(tmp_path / "no")]
    failed = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert failed.returncode == 2
    assert "to read it would run code" in failed.stderr
    assert "Traceback" not in failed.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pt", "b.bin", "out"]


def load(path: str) -> Model:
    loaded: Model = torch.load(path, weights_only=True)
    return loaded
