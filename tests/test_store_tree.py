from __future__ import annotations

import json
import math
import random
from collections import Counter, OrderedDict
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from allfuse.base.errors import CheckpointError
from allfuse.store.tensorfile import NAMES
from allfuse.store.tree import pack, unpack

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf:UserWarning")

DTYPES = sorted(
    {d for d in vars(torch).values() if isinstance(d, torch.dtype) and not d.is_complex}
    - {torch.qint8, torch.quint8, torch.qint32, torch.quint4x2, torch.quint2x4},
    key=str,
)


def through_json(state: Any) -> Any:
    skeleton, tensors = pack(state)
    assert set(NAMES) >= {tensor.dtype for tensor in tensors.values()}
    return unpack(json.loads(json.dumps(skeleton, allow_nan=False)), tensors)


PLAIN = [
    None,
    True,
    False,
    0,
    -1,
    2**63,
    -(2**64),
    10**5000,
    0.1,
    -0.0,
    5e-324,
    math.inf,
    -math.inf,
    "",
    "naïve\x00\ud800",
    b"",
    bytes(range(256)),
    [],
    (),
    {},
    (1,),
    [[1, (2, [3])]],
    {"tensor": "x"},
    {"a": 1, 2: "b", True: 0, (1, "x", (None, 2.5)): [None], None: {}},
    OrderedDict(b=1, a=2),
    Counter({30: 2, 80: 1}),
    random.Random(0).getstate(),
]


@pytest.mark.parametrize(
    "value", PLAIN, ids=lambda value: repr(value)[:20] if value != 10**5000 else "big"
)
def test_plain_values_come_back_equal_and_of_the_same_type(value: Any) -> None:
    back = through_json({"x": value})["x"]
    assert back == value
    assert type(back) is type(value)
    if isinstance(value, float):
        assert math.copysign(1, back) == math.copysign(1, value)


def test_types_inside_containers_come_back() -> None:
    back = through_json({1: (1, 1.0, True), "1": [b"x"]})
    assert [type(key) for key in back] == [int, str]
    assert [type(item) for item in back[1]] == [int, float, bool]
    assert math.isnan(through_json(math.nan))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3, 4)], ids=str)
def test_tensors_of_every_type_come_back_bit_for_bit(dtype: torch.dtype, shape: Any) -> None:
    raw = torch.randint(0, 2, (*shape, dtype.itemsize), dtype=torch.uint8)
    tensor = raw.view(dtype).reshape(shape) if shape else raw.view(dtype)[0]
    back = through_json(tensor)
    assert (back.dtype, back.shape) == (dtype, tensor.shape)
    assert bits(back) == bits(tensor)


@pytest.mark.parametrize("dtype", [torch.complex32, torch.complex64, torch.complex128], ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3, 4)], ids=str)
def test_complex_tensors_come_back_conjugated_ones_too(dtype: torch.dtype, shape: Any) -> None:
    tensor = torch.randn(shape, dtype=torch.complex128).to(dtype)
    for each in (tensor, tensor.conj()):
        back = through_json(each)
        assert back.dtype == dtype
        assert bits(back) == bits(each.resolve_conj())


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6.0).reshape(2, 3),
        np.asfortranarray(np.arange(6).reshape(2, 3)),
        np.arange(6)[::-2],
        np.array(3.5),
        np.zeros((0, 3), np.float16),
        np.array([1, 2], ">i4"),
        np.array([1 + 2j]),
        np.array(["ab", "c"]),
        np.array([b"ab", b""]),
        np.array(["2024-01-01"], "datetime64[D]"),
        np.array([True, False]),
        np.array([1.5], np.longdouble),
        np.array([2**64 - 1], np.uint64),
    ],
    ids=lambda array: f"{array.dtype}{array.shape}",
)
def test_arrays_come_back_equal_and_are_copied_at_once(array: np.ndarray[Any, Any]) -> None:
    skeleton, tensors = pack(array)
    expected = array.copy()
    if array.size:
        array[...] = array.flat[0]
    back = unpack(skeleton, tensors)
    assert back.dtype == expected.dtype
    assert back.shape == expected.shape
    np.testing.assert_array_equal(back, expected)


@pytest.mark.parametrize(
    "scalar",
    [
        np.float32(0.1),
        np.float64(math.inf),
        np.int8(-3),
        np.bool_(True),
        np.complex64(1j),
        np.str_("abc"),
        np.str_(""),
        np.bytes_(b"x"),
        np.datetime64("2024-01-01"),
        np.uint64(7),
    ],
    ids=repr,
)
def test_numpy_scalars_come_back_of_the_same_type(scalar: np.generic) -> None:
    back = through_json(scalar)
    assert back == scalar
    assert type(back) is type(scalar)


def test_names_of_tensors_are_readable_and_unique() -> None:
    zero = torch.zeros(1)
    state = {
        "model": {"layer.weight": zero, "a/b": zero, "a~1b": zero},
        "optimizer": {"state": {0: {"exp_avg": zero}, "0": {"exp_avg": zero}}},
        "__metadata__": zero,
        "residuals": [zero, zero],
    }
    _, tensors = pack(state)
    assert list(tensors) == [
        "model/layer.weight",
        "model/a~1b",
        "model/a~01b",
        "optimizer/state/0/exp_avg",
        "optimizer/state/0/exp_avg#2",
        "__metadata__#2",
        "residuals/0",
        "residuals/1",
    ]


def test_shared_tensors_come_back_by_value() -> None:
    base = torch.arange(6.0)
    back = through_json({"all": base, "part": base[2:4], "turned": base.view(2, 3).t()})
    assert torch.equal(back["all"], base)
    assert torch.equal(back["part"], torch.tensor([2.0, 3.0]))
    assert torch.equal(back["turned"], base.view(2, 3).t())


def test_tensors_are_live_until_they_are_copied() -> None:
    weight = nn.Parameter(torch.zeros(2))
    _, tensors = pack({"weight": weight})
    with torch.no_grad():
        weight.add_(1)
    assert tensors["weight"].tolist() == [1.0, 1.0]
    assert not tensors["weight"].requires_grad


class Odd:
    pass


LOOP: list[Any] = []
LOOP.append(LOOP)


@pytest.mark.parametrize(
    ("value", "what"),
    [
        (Odd(), "Odd"),
        ({1, 2}, "set"),
        (torch.eye(2).to_sparse(), "sparse"),
        (torch.empty(2, device="meta"), "meta"),
        (np.array([object()]), "object"),
        (1 + 2j, "complex"),
        (torch.Size([2]), "Size"),
        (LOOP, "nested deeper"),
        ({Odd(): 1}, "Odd"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_unknown_types_are_refused_by_their_place(value: Any, what: str) -> None:
    with pytest.raises(CheckpointError, match=rf"(?s)at 'optimizer/groups/1.*{what}"):
        pack({"optimizer": {"groups": [0, value]}})


@pytest.mark.parametrize(
    "skeleton",
    [
        {},
        {"a": 1, "b": 2},
        {"eval": "1"},
        {"tuple": 3},
        {"tensor": "absent"},
        {"tensor": ["x"]},
        {"float": "1e400"},
        {"int": "zz"},
        {"bytes": "%"},
        {"dict": [1]},
        {"dict": [[[1], 2]]},
        {"Counter": [["a"]]},
        {"viewed": ["x", "float99"]},
        {"viewed": ["x", "load"]},
        {"viewed": ["x", "float64"]},
        {"viewed": ["x", "complex64"]},
        {"array": ["x", "O", [3]]},
        {"array": ["x", "f4", [10**12]]},
        {"array": ["x", "f4", ["3"]]},
        {"scalar": ["O", "00"]},
        {"scalar": ["f8", "00"]},
        {"scalar": ["nonsense", "00"]},
    ],
    ids=str,
)
def test_a_crafted_skeleton_is_an_error_and_nothing_else(skeleton: Any) -> None:
    with pytest.raises(CheckpointError, match="damaged"):
        unpack(skeleton, {"x": torch.zeros(3)})


def test_a_skeleton_nested_without_end_is_an_error() -> None:
    skeleton: Any = 0
    for _ in range(100_000):
        skeleton = [skeleton]
    with pytest.raises(CheckpointError, match="damaged"):
        unpack(skeleton, {})


@pytest.mark.parametrize(
    "make",
    [
        torch.optim.SGD,
        torch.optim.AdamW,
        torch.optim.Adagrad,
        torch.optim.RMSprop,
        torch.optim.NAdam,
        torch.optim.LBFGS,
        torch.optim.Adafactor,
        torch.optim.Rprop,
        torch.optim.ASGD,
    ],
)
def test_optimizers_go_on_from_their_packed_state(make: Any) -> None:
    model = nn.Linear(3, 2)
    optimizer = make(model.parameters(), lr=0.1)

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = model(torch.ones(4, 3)).square().mean()
        value.backward()
        return value

    optimizer.step(loss)
    expected = optimizer.state_dict()
    other = make(nn.Linear(3, 2).parameters(), lr=0.1)
    other.load_state_dict(through_json(expected))
    torch.testing.assert_close(other.state_dict(), expected, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:Detected call of")
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("MultiStepLR", {"milestones": [1, 3]}),
        ("OneCycleLR", {"max_lr": 1.0, "total_steps": 9}),
        ("CosineAnnealingWarmRestarts", {"T_0": 2}),
        ("ReduceLROnPlateau", {}),
        ("CyclicLR", {"base_lr": 0.1, "max_lr": 1.0, "cycle_momentum": False}),
        ("LambdaLR", {"lr_lambda": lambda step: 0.9**step}),
        ("LinearLR", {}),
    ],
)
def test_schedulers_go_on_from_their_packed_state(name: str, arguments: Any) -> None:
    def build() -> tuple[Any, Any]:
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5, momentum=0.9)
        return optimizer, getattr(torch.optim.lr_scheduler, name)(optimizer, **arguments)

    def advance(optimizer: Any, scheduler: Any) -> float:
        scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
        return float(optimizer.param_groups[0]["lr"])

    straight, resumed = build(), build()
    advance(*straight)
    for one, other in zip(straight, resumed, strict=True):
        other.load_state_dict(through_json(one.state_dict()))
    assert [advance(*straight) for _ in range(5)] == [advance(*resumed) for _ in range(5)]


def test_generators_go_on_from_their_packed_state() -> None:
    numpy_generator = np.random.default_rng(0)
    state = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "numpy generator": numpy_generator.bit_generator.state,
        "torch": torch.get_rng_state(),
    }
    back = through_json(state)
    expected = random.random(), np.random.rand(), numpy_generator.random(), torch.rand(1).item()
    random.setstate(back["python"])
    np.random.set_state(back["numpy"])
    numpy_generator.bit_generator.state = back["numpy generator"]
    torch.set_rng_state(back["torch"])
    assert expected == (
        random.random(),
        np.random.rand(),
        numpy_generator.random(),
        torch.rand(1).item(),
    )
