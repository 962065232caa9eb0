from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from allfuse.base.errors import CheckpointError
from allfuse.base.pages import let_go
from allfuse.store import tensorfile
from allfuse.store.tensorfile import (
    NAMES,
    FileRecord,
    check_file,
    read_metadata,
    read_model,
    read_tensors,
    write_model,
    write_tensors,
)


def every_type() -> dict[str, Tensor]:
    """Tensors of every type that the format holds, small types first."""
    torch.manual_seed(0)
    raw = torch.randint(0, 2, (5, 3, 8), dtype=torch.uint8)
    tensors = {}
    for dtype in sorted(NAMES, key=lambda dtype: dtype.itemsize):
        values = raw[..., : dtype.itemsize].contiguous().view(dtype)[..., 0]
        tensors[f"{NAMES[dtype]}.plain"] = values
        tensors[f"{NAMES[dtype]}.turned"] = values.t()
        tensors[f"{NAMES[dtype]}.empty"] = values[:0]
        tensors[f"{NAMES[dtype]}.scalar"] = values[1, 2]
    return tensors


def bits(tensor: Tensor) -> tuple[Any, ...]:
    flat = tensor.contiguous().reshape(-1).view(torch.uint8)
    return tensor.dtype, tuple(tensor.shape), flat.numpy().tobytes()


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert sorted(found) == sorted(expected)
    for name, tensor in expected.items():
        assert bits(found[name]) == bits(tensor), name


def test_tensors_of_every_type_layout_and_size_come_back(tmp_path: Path) -> None:
    path, tensors = tmp_path / "a.safetensors", every_type()
    record = write_tensors(path, tensors, {"key": 'näme "\n'})
    assert_same(read_tensors(path, record=record), tensors)
    assert read_metadata(path) == {"key": 'näme "\n'}
    assert record.name == "a.safetensors"
    assert record.bytes == path.stat().st_size


def test_the_safetensors_library_reads_what_we_write(tmp_path: Path) -> None:
    path, tensors = tmp_path / "a.safetensors", every_type()
    write_tensors(path, tensors, {})
    assert_same(safetensors.torch.load_file(path), tensors)


def test_we_read_what_the_safetensors_library_writes(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    tensors = {name: tensor.clone().contiguous() for name, tensor in every_type().items()}
    safetensors.torch.save_file(tensors, path, metadata={"a": "b"})
    assert_same(read_tensors(path), tensors)
    assert read_metadata(path) == {"a": "b"}


def test_every_tensor_starts_at_a_multiple_of_its_size(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_tensors(path, every_type(), {})
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    assert length % 8 == 0
    widths = {name: dtype.itemsize for dtype, name in NAMES.items()}
    for entry in json.loads(content[8 : 8 + length]).values():
        assert entry["data_offsets"][0] % widths[entry["dtype"]] == 0


def test_an_empty_file_holds_no_tensors(tmp_path: Path) -> None:
    record = write_tensors(tmp_path / "a", {}, {})
    assert read_tensors(tmp_path / "a", record=record) == {}


def test_only_the_named_tensors_are_read(tmp_path: Path) -> None:
    write_tensors(tmp_path / "a", {"x": torch.ones(2), "y": torch.zeros(2)}, {})
    assert list(read_tensors(tmp_path / "a", ["y"])) == ["y"]
    with pytest.raises(CheckpointError, match="no tensor named 'z'"):
        read_tensors(tmp_path / "a", ["z"])


def test_what_was_read_does_not_depend_on_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write_tensors(path, {"x": torch.ones(5000)}, {})
    found = read_tensors(path)["x"]
    path.write_bytes(bytes(path.stat().st_size))
    assert found.sum() == 5000


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("x", torch.zeros(2, dtype=torch.complex128)),
        ("x", torch.eye(2).to_sparse()),
        ("x", torch.empty(2, device="meta")),
        ("__metadata__", torch.zeros(2)),
    ],
    ids=["complex128", "sparse", "meta", "name"],
)
def test_what_the_format_lacks_is_refused_before_writing(
    tmp_path: Path, name: str, tensor: Tensor
) -> None:
    with pytest.raises(CheckpointError, match="safetensors file"):
        write_tensors(tmp_path / "a", {name: tensor}, {})
    assert list(tmp_path.iterdir()) == []


def flip(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (flip, "its bytes give crc32:"),
        (lambda content: content[:-1], "bytes, .* were written"),
        (lambda content: content + b"x", "bytes, .* were written"),
        (lambda _: b"", "it has 0 bytes"),
    ],
    ids=["flipped bit", "truncated", "longer", "empty"],
)
def test_a_damaged_file_is_told_from_its_record(
    tmp_path: Path, change: Callable[[bytes], bytes], what: str
) -> None:
    path = tmp_path / "a"
    record = write_tensors(path, {"x": torch.randn(1000)}, {})
    check_file(path, record)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(CheckpointError, match=f"{path}.*{what}.*earlier checkpoint"):
        read_tensors(path, record=record)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not a tensor file at all",
        (2**62).to_bytes(8, "little") + b"{}",
        (8).to_bytes(8, "little") + b'{"a":1} ',
        (66).to_bytes(8, "little")
        + b'{"x":{"dtype":"F32","shape":[9000000000],"data_offsets":[0,4]}}   '
        + b"1234",
    ],
    ids=["empty", "text", "absurd header", "wrong header", "absurd shape"],
)
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(CheckpointError, match="cannot be read as a safetensors file"):
        read_tensors(tmp_path / "a")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    record = FileRecord(name="a", bytes=1, digest="crc32:00000000")
    for given in (None, record):
        with pytest.raises(CheckpointError, match=str(tmp_path / "a")):
            read_tensors(tmp_path / "a", record=given)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.again = nn.Linear(4, 7, bias=True)
        self.head.weight = self.embed.weight
        self.again.weight = self.embed.weight
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))


def test_a_model_with_tied_weights_comes_back_under_all_names(tmp_path: Path) -> None:
    path, model = tmp_path / "model.safetensors", Tied()
    record = write_model(path, model.state_dict())
    check_file(path, record)
    assert len(read_tensors(path)) == 3
    found = read_model(path)
    other = Tied()
    other.load_state_dict(found, strict=True)
    assert_same(dict(other.state_dict()), dict(model.state_dict()))
    assert found["head.weight"] is found["embed.weight"]


def test_the_safetensors_library_loads_our_models_and_we_load_its(tmp_path: Path) -> None:
    path, model, other = tmp_path / "model.safetensors", Tied(), Tied()
    write_model(path, model.state_dict())
    safetensors.torch.load_model(other, path)
    assert_same(dict(other.state_dict()), dict(model.state_dict()))
    safetensors.torch.save_model(model, str(path))
    Tied().load_state_dict(read_model(path), strict=True)


def test_parameters_that_are_slices_of_one_block_are_not_taken_for_tied(tmp_path: Path) -> None:
    block = torch.arange(8.0)
    state = {"a": block[:4], "b": block[4:], "c": block, "e": block[:0], "f": block[:0]}
    write_model(tmp_path / "m", state)
    assert_same(read_model(tmp_path / "m"), state)


def test_a_model_file_that_cannot_be_written_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m"
    write_model(path, {"a": torch.ones(2)})

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tensorfile.os, "fsync", full)
    with pytest.raises(CheckpointError, match="disk is full"):
        write_model(path, {"a": torch.zeros(2)})
    monkeypatch.undo()
    assert read_model(path)["a"].tolist() == [1, 1]
    assert [file.name for file in tmp_path.iterdir()] == ["m"]


def test_a_model_with_something_else_in_its_state_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"'norm\._extra_state' of the model is a dict"):
        write_model(tmp_path / "m", {"norm._extra_state": {}})


def resident_bytes(tensor: Tensor) -> int:
    """How much of the memory in which a tensor lies is there, of its file's or its own."""
    found, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            begin, end = (int(part, 16) for part in first.split("-"))
            inside = begin < tensor.data_ptr() + tensor.nbytes and tensor.data_ptr() < end
        elif inside and first == "Rss:":
            found += int(line.split()[1]) * 1024
    return found


def test_a_tensor_of_a_file_that_is_let_go_leaves_memory_and_keeps_its_numbers(
    tmp_path: Path,
) -> None:
    values = torch.arange(2_000_000.0)
    write_tensors(tmp_path / "a", {"x": values}, {})
    mapped = read_tensors(tmp_path / "a", mapped=True)["x"]
    assert torch.equal(mapped, values)
    assert resident_bytes(mapped) > 7_000_000
    let_go(mapped)
    assert resident_bytes(mapped) < 1_000_000
    assert torch.equal(mapped, values)


def test_numbers_that_lie_in_no_file_are_kept_when_they_are_let_go() -> None:
    values = torch.arange(2_000_000.0)
    let_go(values)
    assert torch.equal(values, torch.arange(2_000_000.0))
