"""Encoded fusions between peers: nothing is lost in the end, all are equal, bytes as declared."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from math import prod
from typing import Any

import pytest
import torch
from _pytest.mark import ParameterSet
from test_codec import LOSSY, MESSAGE
from test_execute import all_fine, open_link
from test_topology import EXACT
from torch import Tensor

from allfuse.base.errors import BadMessage, DistributedError, PeerLost, PlanError
from allfuse.codec import Codec, Identity, MessageCodec
from allfuse.codec.int8 import Int8
from allfuse.codec.lowrank import LowRank
from allfuse.codec.memory import Memory
from allfuse.codec.sign import Sign
from allfuse.codec.topk import TopK
from allfuse.execute import segments_of
from allfuse.fusion import Fuser, Fusion, choose
from allfuse.launcher.thread import launch_threads
from allfuse.link.thread import Script
from allfuse.rule.mean import Mean
from allfuse.sync import Bsp
from allfuse.topology import Layout, Topology
from allfuse.topology.central import Central
from allfuse.topology.exchange import Exchange
from allfuse.topology.ring import Ring

SHAPES = [(40, 23), (7,), (3, 5, 11), (1,)]
SIZE = sum(map(prod, SHAPES))
CPU = torch.device("cpu")
SLOW = pytest.mark.slow


def fits(topology: Topology, codec: Codec) -> bool:
    try:
        Fusion(topology=topology, codec=codec)
    except PlanError:
        return False
    return True


PAIRS = [(t, c) for t in EXACT for c in LOSSY if fits(t, c)]
names = [f"{topology}-{codec}" for topology, codec in PAIRS]


def thinned(every: int, first: int = 0) -> list[ParameterSet]:
    """All pairs, of which `make test` takes so many that each topology and each codec is tried.

    Of each topology every so many codecs, another one first from topology to topology.
    """
    pairs = []
    for (topology, codec), name in zip(PAIRS, names, strict=True):
        taken = (EXACT.index(topology) + LOSSY.index(codec)) % every == first
        pairs.append(pytest.param(topology, codec, marks=() if taken else SLOW, id=name))
    return pairs


def test_what_is_thinned_still_tries_each_topology_and_each_codec() -> None:
    for every, first in ((3, 0), (4, 1), (4, 3)):
        taken = [pair.values for pair in thinned(every, first) if not pair.marks]
        assert {topology for topology, _ in taken} == {topology for topology, _ in PAIRS}
        assert {codec for _, codec in taken} == {codec for _, codec in PAIRS}


def values(rank: int, round: int, dtype: torch.dtype = torch.float64) -> Tensor:
    chance = torch.Generator().manual_seed(1000 * round + rank)
    return torch.randn(SIZE, generator=chance, dtype=torch.float64).to(dtype)


def fuse_rounds(
    topology: Topology,
    codec: Codec,
    n: int,
    rounds: int,
    same: bool = False,
    dtype: torch.dtype = torch.float64,
    first: int = 0,
) -> list[tuple[list[Tensor], Tensor, int]]:
    """What each peer ended each round with, its residual at the end, and the bytes it sent.

    Of round 0 on, or of the `first` one.
    """

    def work() -> tuple[list[Tensor], Tensor, int]:
        link = open_link()
        with closing(Fuser(Fusion(topology=topology, codec=codec), link, seed=3)) as fuser:
            memory = fuser.memory(SHAPES, dtype, "cpu") or Memory(SHAPES, dtype, CPU)
            fused = []
            for round in range(first, first + rounds):
                own = values(link.rank, 0 if same else round, dtype)
                block = torch.cat([own, torch.tensor([1.0, 2.5, link.rank]).to(dtype)])
                kept = None if codec.lossless else memory
                fuser.start(block, "test", round=round, memory=kept, tail=3).wait()
                assert block[-3:].tolist() == [
                    n,
                    2.5 * n,
                    n * (n - 1) / 2,
                ]
                fused.append(block[:-3])
            return fused, memory.residual, link.sent_bytes

    return all_fine(launch_threads(work, n))


@pytest.mark.parametrize(("topology", "codec"), PAIRS, ids=names)
def test_what_arrives_and_what_is_left_is_all_there_was(topology: Topology, codec: Codec) -> None:
    for n in (2, 3, 5):
        outcomes = fuse_rounds(topology, codec, n, rounds=3)
        first = outcomes[0][0]
        for fused, _, _ in outcomes:
            assert all(torch.equal(a, b) for a, b in zip(fused, first, strict=True))
        told = sum(values(rank, round) for rank in range(n) for round in range(3))
        left = sum(residual for _, residual, _ in outcomes)
        torch.testing.assert_close(sum(first) + left, told)


@pytest.mark.parametrize(
    ("topology", "codec", "dtype"),
    [
        pytest.param(*pair.values, dtype, marks=pair.marks, id=f"{pair.id}-{dtype}")
        for first, dtype in ((1, torch.float64), (3, torch.bfloat16))
        for pair in thinned(4, first)
    ],
)
def test_warm_rounds_are_those_of_no_codec_and_the_next_ones_as_if_there_were_none_before(
    topology: Topology, codec: Codec, dtype: torch.dtype
) -> None:
    n, warm = 3, 2
    later = replace(codec, warm=warm)  # type: ignore[call-arg]
    outcomes = fuse_rounds(topology, later, n, rounds=warm + 2, dtype=dtype)
    messages = isinstance(topology, Exchange) and isinstance(codec, MessageCodec)
    whole = fuse_rounds(Central() if messages else topology, Identity(), n, warm, dtype=dtype)
    coded = fuse_rounds(topology, codec, n, rounds=2, dtype=dtype, first=warm)
    for (fused, residual, sent), plain, then in zip(outcomes, whole, coded, strict=True):
        for own, expected in zip(fused, [*plain[0], *then[0]], strict=True):
            assert torch.equal(own, expected)
        assert torch.equal(residual, then[1])
        assert sent == plain[2] + then[2]


def test_whole_values_do_not_go_to_everybody_where_that_would_send_more_bytes() -> None:
    n = 5
    sent = [each[2] for each in fuse_rounds(Exchange(), TopK(0.01, warm=1), n, 1)]
    whole = Central().bytes_per_peer(Layout.of(n), 8 * (SIZE + 3))
    assert max(sent) == pytest.approx(whole, rel=0.02)


@pytest.mark.parametrize(("topology", "codec"), thinned(3))
def test_the_average_of_many_rounds_comes_to_the_truth(topology: Topology, codec: Codec) -> None:
    n, rounds = 3, 120 if codec.payload_bytes(SHAPES, 4) < SIZE / 2 else 40
    outcomes = fuse_rounds(topology, codec, n, rounds, same=True)
    truth = sum(values(rank, 0) for rank in range(n))
    assert isinstance(truth, Tensor)
    averages = torch.stack(outcomes[0][0]).cumsum(0) / torch.arange(1, rounds + 1)[:, None]
    errors = (averages - truth).norm(dim=1) / truth.norm()
    assert float(errors[-1]) < 0.6  # of topk(0.05) and the like; the others come far closer
    rate = 0.75 if isinstance(codec, Sign) else 0.62  # 0.5 is reached after a thousand rounds
    assert float(errors[-1]) < rate * float(errors[rounds // 2 - 1]) + 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("codec", [Int8(), TopK(0.1), LowRank(2)], ids=str)
def test_short_types_are_encoded_and_all_end_equal(codec: Codec, dtype: torch.dtype) -> None:
    outcomes = (
        fuse_rounds(Central(), codec, 3, 2, dtype=dtype)
        if isinstance(codec, MessageCodec)
        else fuse_rounds(Ring(), codec, 3, 2, dtype=dtype)
    )
    for fused, residual, _ in outcomes:
        assert residual.dtype == torch.float32
        assert all(torch.equal(a, b) for a, b in zip(fused, outcomes[0][0], strict=True))


@pytest.mark.parametrize("codec", MESSAGE, ids=str)
def test_bytes_on_the_link_are_those_of_topology_and_codec(codec: MessageCodec) -> None:
    elements, n = 8192, 4
    for topology in EXACT:
        if not fits(topology, codec):
            continue

        def work(topology: Topology = topology) -> int:
            link = open_link()
            with closing(Fuser(Fusion(topology=topology, codec=codec), link)) as fuser:
                memory = fuser.memory([(elements,)], torch.float32, "cpu")
                fuser.start(torch.randn(elements), "test", memory=memory).wait()
                return link.sent_bytes

        sent = max(all_fine(launch_threads(work, n)))
        whole = codec.payload_bytes([(elements,)], 4)
        declared = min(t.bytes_per_peer(Layout.of(n), whole) for t in (topology, Exchange()))
        assert sent == pytest.approx(declared, rel=0.02), topology  # topk rounds in each chunk


def test_whichever_sends_fewer_bytes_is_taken() -> None:
    """Two peers tell each other everything: one encoding, one phase, the bytes of a ring."""
    outcomes = fuse_rounds(Ring(), Sign(), 2, 1)
    own = [values(rank, 0) for rank in range(2)]
    for rank in range(2):
        decoded = torch.empty_like(own[rank])
        Sign().decode(Sign().encode(own[rank], 0), decoded)
        torch.testing.assert_close(outcomes[rank][1], own[rank] - decoded)


@pytest.mark.parametrize("codec", [Int8(), TopK(0.05), LowRank(2)], ids=str)
def test_large_blocks_are_cut_into_segments_without_a_difference_in_what_is_kept(
    codec: Codec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("allfuse.execute.SEGMENT_BYTES", 50)
    topology = Central() if isinstance(codec, MessageCodec) else Ring()
    assert segments_of(topology, codec.payload_bytes(SHAPES, 8)) > 5
    outcomes = fuse_rounds(topology, codec, 3, rounds=2)
    told = sum(values(rank, round) for rank in range(3) for round in range(2))
    left = sum(residual for _, residual, _ in outcomes)
    torch.testing.assert_close(sum(outcomes[0][0]) + left, told)


@pytest.mark.parametrize("codec", [Int8(), TopK(0.1)], ids=str)
@pytest.mark.parametrize("topology", [Ring(), Central(), Exchange()], ids=str)
@pytest.mark.parametrize("how", ["kill", "stall"])
def test_a_peer_lost_at_any_moment_is_named(topology: Topology, codec: Codec, how: str) -> None:
    n = 3

    def work() -> Tensor:
        link = open_link()
        link.timeout_s = 0.02 if how == "stall" else 10.0
        with closing(Fuser(Fusion(topology=topology, codec=codec), link)) as fuser:
            memory = fuser.memory(SHAPES, torch.float64, "cpu")
            block = values(link.rank, 0)
            fuser.start(block, "round 1", memory=memory).wait()
            return block

    whole = all_fine(launch_threads(work, n))[0] if how == "kill" else None
    for victim in range(n):
        for count in range(0, 8, 2 if how == "stall" else 1):
            outcomes = launch_threads(work, n, script=Script(**{how: {(victim, count)}}))
            for rank, outcome in enumerate(outcomes):
                if isinstance(outcome, DistributedError):
                    assert isinstance(outcome, PeerLost)
                    assert "round 1" in str(outcome)
                elif whole is not None and rank != victim:
                    assert torch.equal(outcome, whole)


def test_garbage_in_place_of_a_message_is_named() -> None:
    def work() -> Any:
        link = open_link()
        codec = TopK(0.1)
        if link.rank == 1:  # a message of the right size that points outside
            size = codec.encoded_bytes(100)
            for peer in (0,):
                link.send(torch.full((size,), 255, dtype=torch.uint8), peer, "test").wait()
            return None
        with closing(Fuser(Fusion(topology=Exchange(), codec=codec), link)) as fuser:
            memory = fuser.memory([(100,)], torch.float32, "cpu")
            fuser.start(torch.randn(100), "test", memory=memory).wait()
            return None

    outcome = launch_threads(work, 2)[0]
    assert isinstance(outcome, BadMessage)
    assert "rank 1" in str(outcome)


def test_peers_of_other_codecs_do_not_sum_in_silence() -> None:
    def work() -> None:
        link = open_link()
        codec = Int8() if link.rank else TopK(0.1)
        with closing(Fuser(Fusion(topology=Central(), codec=codec), link)) as fuser:
            memory = fuser.memory(SHAPES, torch.float32, "cpu")
            fuser.start(torch.randn(SIZE), "test", memory=memory).wait()

    outcomes = launch_threads(work, 2)
    assert any(isinstance(outcome, BadMessage) for outcome in outcomes)


def test_what_is_chosen_fits_the_codec() -> None:
    for codec in LOSSY:
        chosen, why = choose(Mean(), None, Bsp(), codec, 4)
        assert why is not None
        assert fits(chosen.topology, codec)
        if isinstance(codec, MessageCodec):
            few = isinstance(codec, TopK) and codec.fraction < 0.25  # a sum would lose most of it
            assert str(chosen.topology) == ("exchange" if few else "central")


def test_a_world_of_one_loses_nothing() -> None:
    def work() -> Tensor:
        with closing(Fuser(Fusion(topology=Central(), codec=Sign()), open_link())) as fuser:
            assert fuser.memory(SHAPES, torch.float32, "cpu") is None
            block = values(0, 0)
            fuser.start(block, "test").wait()
            return block

    assert torch.equal(all_fine(launch_threads(work, 1))[0], values(0, 0))
