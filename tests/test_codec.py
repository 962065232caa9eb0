"""Codecs: what they declare of bytes and errors, alone on a block of values."""

from __future__ import annotations

import itertools
from dataclasses import replace
from math import prod

import numpy as np
import pytest
import torch
from torch import Tensor

from allfuse.base.errors import PlanError
from allfuse.codec import CODECS, Codec, Identity, MessageCodec, SumCodec
from allfuse.codec.base import WORD_BYTES
from allfuse.codec.bf16 import Bf16
from allfuse.codec.fp16 import Fp16
from allfuse.codec.int4 import Int4
from allfuse.codec.int8 import Int8
from allfuse.codec.lowrank import LowRank
from allfuse.codec.memory import Memory
from allfuse.codec.randomk import RandomK
from allfuse.codec.sign import Sign
from allfuse.codec.topk import TopK
from allfuse.plan import as_plan

ARGUMENTS: dict[str, list[dict[str, object]]] = {
    "int8": [{}, {"stochastic": True}, {"block": 8}],
    "int4": [{}, {"stochastic": True}],
    "topk": [{"fraction": 0.05}, {"fraction": 1}],
    "randomk": [{"fraction": 0.1}],
    "lowrank": [{"rank": 1}, {"rank": 3}],
}


def variants() -> list[Codec]:
    """Every codec of the table, with all arguments that change what it does."""
    return [
        cls(**arguments) for name, cls in CODECS.items() for arguments in ARGUMENTS.get(name, [{}])
    ]


ALL = variants()
LOSSY = [codec for codec in ALL if not codec.lossless]
MESSAGE = [codec for codec in ALL if isinstance(codec, MessageCodec)]
SUM = [codec for codec in ALL if isinstance(codec, SumCodec)]


def drawn(size: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    chance = torch.Generator().manual_seed(seed)
    return torch.randn(size, generator=chance, dtype=torch.float64).to(dtype)


def through(codec: MessageCodec, values: Tensor, seed: int = 0) -> Tensor:
    """What a message of these values decodes to."""
    decoded = torch.full_like(values, 7.0)
    codec.decode(codec.encode(values, seed), decoded)
    return decoded


def fuse(codec: SumCodec, values: Tensor, memory: Memory, seed: int = 0) -> list[Tensor]:
    """What n peers (rows) end with and what each did not send: the program, played serially."""
    blocks = [row.clone() for row in values]
    errors = [torch.full_like(row, 9.0) for row in values]
    memories = [Memory(memory.shapes, values.dtype, values.device) for _ in values]
    for each in memories:
        each.kept = {n: kept.clone() for n, kept in memory.kept.items()}
    programs = [
        codec.rounds(block, error, own, seed)
        for block, error, own in zip(blocks, errors, memories, strict=True)
    ]
    for sent in zip(*programs, strict=True):
        total = torch.stack(sent).sum(0)
        for each in sent:
            each.copy_(total)
    memory.kept = memories[0].kept
    assert all(torch.equal(block, blocks[0]) for block in blocks)
    return [blocks[0], torch.stack(errors)]


@pytest.mark.parametrize("codec", MESSAGE, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_messages_have_the_bytes_declared_and_values_come_back_in_any_size(
    codec: MessageCodec, dtype: torch.dtype
) -> None:
    for size in (1, 2, 7, 8, 63, 64, 65, 256, 257, 1009, 5000):
        values = drawn(size, size, dtype)
        message = codec.encode(values.clone(), 5)
        assert message.dtype == torch.uint8
        assert message.shape == (codec.encoded_bytes(size),)
        assert len(message) % WORD_BYTES == 0
        assert codec.payload_bytes([(size,)], 4) == codec.encoded_bytes(size)
        decoded = through(codec, values, 5)
        assert decoded.dtype == dtype
        lost, held = float((values - decoded).norm()), float(values.norm())
        assert lost < held or codec.error == "unbiased", size
        nothing = torch.zeros(size, dtype=dtype)
        assert torch.equal(through(codec, nothing), nothing)


@pytest.mark.parametrize("codec", MESSAGE, ids=str)
def test_messages_say_the_same_when_they_lie_anywhere(codec: MessageCodec) -> None:
    first, second = drawn(33, 1), drawn(70, 2)
    together = torch.cat([codec.encode(first, 0), codec.encode(second, 0)])
    for values, message in (
        (first, together[: codec.encoded_bytes(33)]),
        (second, together[codec.encoded_bytes(33) :]),
    ):
        decoded = torch.empty_like(values)
        codec.decode(message, decoded)
        assert torch.equal(decoded, through(codec, values))


@pytest.mark.parametrize("codec", MESSAGE, ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_does_not_decode_to_something_finite(
    codec: MessageCodec, bad: float
) -> None:
    values = drawn(300)
    values[123] = bad
    assert not bool(through(codec, values).isfinite().all())


@pytest.mark.parametrize(
    ("codec", "bound"),
    [(Bf16(), 2.0**-8), (Fp16(), 2.0**-11), (Int8(), 1 / 254), (Int4(), 1 / 14)],
    ids=str,
)
def test_rounding_errors_are_within_their_bound(codec: MessageCodec, bound: float) -> None:
    values = drawn(4096, 3)
    largest = values.abs()
    if isinstance(codec, Int8 | Int4):
        largest = largest.view(-1, codec.block).amax(1, keepdim=True).expand(-1, codec.block)
        largest = largest.reshape(-1)
    assert bool(((values - through(codec, values)).abs() <= bound * largest * (1 + 1e-5)).all())


def test_half_precision_cuts_off_what_it_cannot_hold() -> None:
    assert float(through(Fp16(), torch.tensor([1e6, -1e6]))[1]) == -65504


@pytest.mark.parametrize("codec", [Int8(stochastic=True), Int4(stochastic=True)], ids=str)
def test_stochastic_rounding_is_right_on_the_average(codec: MessageCodec) -> None:
    values = drawn(256, 4)
    rounds = 4000
    mean = torch.stack([through(codec, values, seed) for seed in range(rounds)]).mean(0)
    scale = float(values.abs().max()) / codec.steps  # type: ignore[attr-defined]
    assert float((mean - values).abs().max()) < 5 * scale / 2 / rounds**0.5
    assert not torch.equal(through(codec, values, 1), through(codec, values, 2))
    assert torch.equal(through(codec, values, 1), through(codec, values, 1))


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("size", [1, 3, 100, 1009])
def test_topk_keeps_what_a_sort_puts_first(fraction: float, size: int) -> None:
    codec, values = TopK(fraction), drawn(size, size)
    k = max(1, round(fraction * size))
    order = np.argsort(-np.abs(values.numpy()), kind="stable")[:k]
    expected = np.zeros(size, dtype=np.float32)
    expected[order] = values.numpy()[order]
    assert torch.equal(through(codec, values), torch.from_numpy(expected))


def test_a_place_that_is_not_there_is_refused() -> None:
    codec = TopK(0.5)
    message = codec.encode(drawn(100), 0)
    with pytest.raises(ValueError, match="not one of 10"):
        codec.decode(message, torch.zeros(10))


def test_signs_come_back_with_the_mean_size_of_their_block() -> None:
    codec, values = Sign(block=8), drawn(20, 6)
    expected = torch.cat(
        [part.sign() * part.abs().mean() for part in (values[:8], values[8:16], values[16:])]
    )
    torch.testing.assert_close(through(codec, values), expected)


@pytest.mark.parametrize("codec", SUM, ids=str)
@pytest.mark.parametrize("n", [1, 2, 5])
def test_what_is_sent_and_what_is_not_is_all_there_was(codec: SumCodec, n: int) -> None:
    shapes = [(6, 9), (4,), (), (5, 2, 7), (3, 3), (0, 4)]
    memory = Memory(shapes, torch.float64, torch.device("cpu"))
    for round in range(4):
        seeds = range(10 * round, 10 * round + n)
        values = torch.stack([drawn(sum(memory.sizes), s, torch.float64) for s in seeds])
        fused, errors = fuse(codec, values, memory, seed=round)
        torch.testing.assert_close(fused + errors.sum(0), values.sum(0))
        assert float(errors.norm()) < float(values.norm())


@pytest.mark.parametrize("codec", SUM, ids=str)
def test_as_many_values_are_summed_as_declared(codec: SumCodec) -> None:
    for shapes in ([(40, 30), (7,)], [(5,)], [(2, 2)], [(64, 3, 3, 3), (64,), (10, 640)]):
        memory = Memory(shapes, torch.float32, torch.device("cpu"))
        block = drawn(sum(memory.sizes))
        sent = codec.rounds(block, torch.zeros_like(block), memory, 0)
        assert sum(len(part) for part in sent) == codec.summed_elements(shapes)


@pytest.mark.parametrize("size", [1, 2, 10, 999])
def test_random_places_are_all_different_in_range_and_alike_on_all_peers(size: int) -> None:
    codec = RandomK(0.1)
    drawn_places = [codec.places(size, seed, torch.zeros(1)) for seed in range(200)]
    for places in drawn_places:
        assert len(places.unique()) == len(places) == codec.kept(size)
        assert int(places.min()) >= 0
        assert int(places.max()) < size
    assert torch.equal(drawn_places[3], codec.places(size, 3, torch.zeros(1)))
    if size == 999:  # every place has its turn
        counts = torch.bincount(torch.cat(drawn_places), minlength=size)
        assert int((counts > 0).sum()) > 0.999 * size


def powersgd(matrices: list[np.ndarray], q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Algorithm 1 of the paper for one matrix of each peer, with Gram-Schmidt written out."""
    p = sum(m @ q for m in matrices)
    for column in range(p.shape[1]):
        for before in range(column):
            p[:, column] -= (p[:, column] @ p[:, before]) * p[:, before]
        p[:, column] /= np.linalg.norm(p[:, column])
    q = sum(m.T @ p for m in matrices)
    return p @ q.T, q


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_lowrank_is_the_papers_algorithm_with_a_warm_start(rank: int) -> None:
    codec, shape = LowRank(rank), (12, 20)
    memory = Memory([shape], torch.float64, torch.device("cpu"))
    q = first_q(codec, shape)
    for round in range(4):
        values = torch.stack([drawn(prod(shape), 7 * round + i, torch.float64) for i in range(3)])
        matrices = [row.view(shape).numpy() for row in values]
        expected, q = powersgd([m.copy() for m in matrices], q)
        fused, _ = fuse(codec, values, memory)
        np.testing.assert_allclose(fused.view(shape).numpy(), expected, atol=1e-9)


def first_q(codec: LowRank, shape: tuple[int, int]) -> np.ndarray:
    """What the program begins with, read from what it sends of unit matrices."""
    columns = []
    for column in range(shape[1]):
        unit = torch.zeros(shape, dtype=torch.float64)
        unit[0, column] = 1.0
        memory = Memory([shape], torch.float64, torch.device("cpu"))
        sent = next(codec.rounds(unit.reshape(-1), torch.zeros(prod(shape)).double(), memory, 0))
        columns.append(sent.view(shape[0], codec.rank)[0].numpy().copy())
    return np.stack(columns)


def test_lowrank_loses_nothing_of_a_matrix_of_that_rank() -> None:
    left, right = drawn(12 * 2, 1, torch.float64).view(12, 2), drawn(20 * 2, 2, torch.float64)
    values = (left @ right.view(2, 20)).reshape(1, -1)
    memory = Memory([(12, 20)], torch.float64, torch.device("cpu"))
    fused, errors = fuse(LowRank(2), values, memory)
    torch.testing.assert_close(fused, values[0])
    assert float(errors.norm()) < 1e-9 * float(values.norm())


def test_lowrank_survives_gradients_of_zero() -> None:
    memory = Memory([(12, 20)], torch.float64, torch.device("cpu"))
    assert not fuse(LowRank(2), torch.zeros(2, 240).double(), memory)[0].any()
    values = drawn(480, 3, torch.float64).view(2, 240)
    fused, errors = fuse(LowRank(2), values, memory)
    assert float(fused.norm()) > 0
    torch.testing.assert_close(fused + errors.sum(0), values.sum(0))


@pytest.mark.parametrize(
    "text",
    [
        "topk(0)", "topk(1.5)", "topk(yes)", "randomk(-1)", "randomk(true)", "lowrank(0)",
        "lowrank(1.5)", "int8(block=7)", "int8(block=0)", "sign(block=100000000)", "topk", "int9",
        "identity(warm=1)", "sign(64, 1)", "topk(0.1, 1)",
    ],
)  # fmt: skip
def test_arguments_that_make_no_sense_are_refused(text: str) -> None:
    with pytest.raises(PlanError):
        as_plan(f"data(4, codec={text})")


@pytest.mark.parametrize("codec", LOSSY, ids=str)
@pytest.mark.parametrize("warm", [-1, 1.5, True, "auto"])
def test_warm_rounds_that_cannot_be_counted_are_refused(codec: Codec, warm: object) -> None:
    with pytest.raises(PlanError, match="a whole number from 0"):
        replace(codec, warm=warm)  # type: ignore[call-arg]


@pytest.mark.parametrize("codec", LOSSY, ids=str)
def test_the_first_rounds_are_not_encoded_and_all_others_are(codec: Codec) -> None:
    later = replace(codec, warm=3)  # type: ignore[call-arg]
    assert [later.encodes(round) for round in range(5)] == [False] * 3 + [True] * 2
    assert codec.encodes(0)
    assert not Identity().encodes(0)


WARM = [replace(codec, warm=50) for codec in LOSSY]  # type: ignore[call-arg]


@pytest.mark.parametrize("codec", [*ALL, *WARM], ids=str)
def test_codecs_stand_in_plans_and_come_back(codec: Codec) -> None:
    plan = as_plan(f"data(4, codec={codec})")
    assert as_plan(str(plan)) == plan
    assert as_plan(plan.to_nest()) == plan
    assert plan.axes[0].codec == codec  # type: ignore[attr-defined]
    assert plan.promise == ("exact" if codec.lossless else "replayed")


def test_warm_rounds_are_written_after_what_a_codec_says_itself() -> None:
    assert str(as_plan("data(4, codec=topk(warm=50, fraction=0.01))")) == (
        "data(4, codec=topk(0.01, warm=50))"
    )
    assert as_plan("data(4, codec=topk(0.01, warm=50))").to_nest() == [
        {"data": {"n": 4, "codec": {"topk": {"fraction": 0.01, "warm": 50}}}}
    ]


def test_codecs_that_cannot_travel_are_refused_with_what_can() -> None:
    cases = [
        ("data(4, topology=native, codec=int8)", "topology=central"),
        ("site(4, topology=gossip, codec=int8)", "codec=identity"),
        ("data(4, rule=median, codec=topk(0.1))", "codec=identity"),
        ("data(4, rule=vote, codec=sign)", "codec=identity"),
    ]
    for text, nearest in cases:
        with pytest.raises(PlanError, match=nearest):
            as_plan(text)
    for topology, codec in itertools.product(("native", "ring"), ("randomk(0.1)", "lowrank(2)")):
        as_plan(f"data(4, topology={topology}, codec={codec})")
