"""Checkpoints that one process writes from values that are elsewhere."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from allfuse.base.errors import CheckpointError
from allfuse.link.post import Malformed
from allfuse.roles.blueprint import Blueprint
from allfuse.roles.cutting import PIECE_BYTES
from allfuse.roles.snapshots import Snapshots
from allfuse.roles.versions import Version, write_version
from allfuse.roles.wrapping import unwrap, wrap
from allfuse.store.checkpoint import Checkpoints
from allfuse.store.tree import pack, unpack
from allfuse.store.writing import StandIns, write_checkpoint


def test_values_are_read_one_at_a_time_when_they_are_written(tmp_path: Path) -> None:
    values = {f"w{n}": torch.randn(3, n) for n in range(5)}
    asked: list[str] = []
    standins = StandIns()

    def stand_in(name: str) -> Tensor:
        def read() -> Tensor:
            asked.append(name)
            return values[name]

        return standins.make(torch.float32, tuple(values[name].shape), read)

    state = {"held": {name: stand_in(name) for name in values}, "own": torch.arange(3)}
    assert not asked
    write_checkpoint(tmp_path, 7, state, note={"plan": "data(1)"}, score=0.5, fill=standins.fill)
    found, note = Checkpoints(tmp_path).read(7)
    assert all(torch.equal(found["held"][name], values[name]) for name in values)
    assert torch.equal(found["own"], torch.arange(3))
    assert (note, Checkpoints(tmp_path).best()) == ({"plan": "data(1)"}, 7)
    assert sorted(asked) == [f"w{n}" for n in range(1, 5)], "none of the empty one"


def test_a_checkpoint_that_cannot_be_filled_leaves_those_before(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 1, {"own": torch.ones(2)}, note={})
    standins = StandIns()
    state = {"held": standins.make(torch.float32, (2,), lambda: torch.ones(3))}
    with pytest.raises(CheckpointError, match=r"\(3,\) came instead of torch.float32 of \(2,\)"):
        write_checkpoint(tmp_path, 2, state, note={}, fill=standins.fill)
    assert Checkpoints(tmp_path).steps() == [1]
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_a_state_travels_in_pieces_as_it_is() -> None:
    large = torch.randint(0, 255, (PIECE_BYTES + 5,), dtype=torch.uint8)
    state = {"a": large, "b": [torch.tensor(3), torch.empty(0, 2)], "c": torch.rand(3).bfloat16()}
    skeleton, tensors = pack(state)
    messages = wrap({"state": skeleton}, tensors, sequence=4, done=2, score=None)
    assert [m.piece for m in messages] == [0, 1]
    content, back = unwrap(messages)
    found = unpack(content["state"], back)
    assert torch.equal(found["a"], large)
    assert torch.equal(found["c"], state["c"])
    assert found["b"][1].shape == (0, 2)


@pytest.mark.parametrize("content", ["", "[]", '{"skeleton": 1, "layout": [["a", "F32", [9]]]}'])
def test_pieces_that_do_not_fit_are_malformed(content: str) -> None:
    (message,) = wrap({}, {"a": torch.ones(2)}, sequence=0, done=0, score=None)
    with pytest.raises(Malformed):
        unwrap([replace(message, content=content)])
    with pytest.raises(Malformed):
        unwrap([replace(message, tensors=(torch.ones(2),))])


@pytest.mark.parametrize("servers", [1, 2, 3, 7, 40])
def test_what_is_cut_for_servers_is_read_as_one_again(tmp_path: Path, servers: int) -> None:
    shapes = {"a": (3, 5), "b": (4,), "c": (), "d": (7, 2)}
    parameters = [(n, torch.nn.Parameter(torch.randn(s))) for n, s in shapes.items()]
    optimizer = torch.optim.Adam([p for _, p in parameters])
    buffers = [("mean", torch.randn(6, dtype=torch.float64))]
    blueprint = Blueprint.of_gradients(optimizer, parameters, buffers)
    weights = {**dict(parameters), **dict(buffers)}
    kept = {
        name: {
            "step": torch.tensor(4.0),
            "exp_avg": torch.randn(shape),
            "exp_avg_sq": torch.rand(shape),
        }
        for name, shape in shapes.items()
        if name != "b"  # it was never stepped
    }
    write_version(
        tmp_path, blueprint, servers, 9, lambda n: weights[n].detach(), lambda n: kept.get(n, {})
    )
    paths = [Snapshots(tmp_path, index, servers).path(9) for index in range(servers)]
    version = Version(blueprint, paths)
    for name, tensor in weights.items():
        assert torch.equal(version.weights(name), tensor.detach())
    for name, shape in shapes.items():
        expected = kept.get(name, {"exp_avg": torch.zeros(shape)})
        assert version.states(name)["exp_avg"] == (torch.float32, shape)
        assert torch.equal(version.state(name, "exp_avg"), expected["exp_avg"])
        assert float(version.state(name, "step")) == 4
    assert version.states("mean") == {}


def test_weights_of_another_shape_are_refused(tmp_path: Path) -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    blueprint = Blueprint.of_gradients(torch.optim.SGD([parameter], lr=1.0), [("w", parameter)])
    with pytest.raises(CheckpointError, match=r"w is \(4,\) in the checkpoint, and \(3,\)"):
        write_version(tmp_path, blueprint, 1, 0, lambda name: torch.ones(4), lambda name: {})
