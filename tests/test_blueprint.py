"""What servers hold: which optimizers, in which blocks, shards and pieces."""

from __future__ import annotations

from math import prod
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import Parameter
from torch.optim import Optimizer

from allfuse.base.errors import PlanError, UserError
from allfuse.link.post import Malformed
from allfuse.roles.blueprint import Blueprint
from allfuse.roles.cutting import (
    FINE_BYTES,
    GRAIN,
    cut,
    cut_at_grains,
    cut_pieces,
    cut_shards,
    find_places,
    overlaps,
    view_all,
)
from allfuse.roles.elementwise import PER_ELEMENT
from allfuse.roles.shard import Shard

REFUSED = ["Adafactor", "LBFGS", "Muon", "SparseAdam"]


def odd_model() -> nn.Module:
    """Odd sizes, a 0-d and an empty tensor, three types, buffers of which one is a counter."""
    model = nn.Module()
    model.a = Parameter(torch.randn(7, 3))
    model.b = Parameter(torch.randn(5, dtype=torch.float64))
    model.c = Parameter(torch.tensor(2.0))
    model.d = Parameter(torch.empty(0, 4))
    model.e = Parameter(torch.randn(13).bfloat16())
    model.register_buffer("mean", torch.randn(3))
    model.register_buffer("seen", torch.tensor(0))
    return model


def odd_blueprint(**options: Any) -> Blueprint:
    model = odd_model()
    optimizer = torch.optim.SGD(
        [{"params": [model.a, model.b]}, {"params": [model.c, model.d, model.e], "lr": 0.5}], lr=0.1
    )
    return Blueprint.of_gradients(
        optimizer, model.named_parameters(), model.named_buffers(), **options
    )


@pytest.mark.parametrize("name", PER_ELEMENT)
def test_optimizers_that_are_per_element_are_taken(name: str) -> None:
    model = nn.Linear(3, 2)
    optimizer = getattr(torch.optim, name)(model.parameters(), lr=0.1)
    blueprint = Blueprint.of_gradients(optimizer, model.named_parameters())
    assert blueprint.groups[0].optimizer == name


def test_every_optimizer_of_torch_is_taken_or_refused_for_a_reason() -> None:
    found = [
        name
        for name in torch.optim.__all__
        if isinstance(cls := getattr(torch.optim, name), type) and issubclass(cls, Optimizer)
    ]
    assert sorted(set(found) - {"Optimizer"}) == sorted([*PER_ELEMENT, *REFUSED])


@pytest.mark.parametrize("name", REFUSED)
def test_other_optimizers_are_refused_with_the_reason(name: str) -> None:
    model = nn.Linear(3, 2, bias=False)
    optimizer = getattr(torch.optim, name)(model.parameters(), lr=0.1)
    with pytest.raises(UserError, match=rf"{name} cannot run on servers: it .* allowed: Adadelta"):
        Blueprint.of_gradients(optimizer, model.named_parameters())


def test_an_optimizer_class_of_the_user_is_refused_even_under_the_name_of_one_of_torch() -> None:
    class Adam(torch.optim.Adam):
        pass

    model = nn.Linear(3, 2)
    with pytest.raises(UserError, match="is not of torch, and servers run no other code"):
        Blueprint.of_gradients(Adam(model.parameters()), model.named_parameters())


def test_codecs_whose_messages_are_sums_are_refused() -> None:
    with pytest.raises(PlanError, match="summed by all peers"):
        odd_blueprint(codec="lowrank(4)")
    with pytest.raises(PlanError, match="there is no codec of that name"):
        odd_blueprint(codec="int9")


def test_a_parameter_that_the_model_does_not_name_is_refused() -> None:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD([*model.parameters(), Parameter(torch.zeros(9))], lr=0.1)
    with pytest.raises(UserError, match=r"shape \(9,\) that the model does not name"):
        Blueprint.of_gradients(optimizer, model.named_parameters())


def test_frozen_parameters_and_counters_are_not_held() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    model[0].weight.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    blueprint = Blueprint.of_gradients(
        optimizer, model.named_parameters(), model.named_buffers(), share=0.25
    )
    names = [held.name for held in blueprint.tensors]
    assert names == ["0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var"]
    assert blueprint.groups[1].options == {"lr": 0.25}
    assert blueprint.groups[1].pushed == "change"


def test_a_blueprint_goes_into_plain_values_and_back() -> None:
    blueprint = odd_blueprint(codec="topk(0.1)")
    back = Blueprint.from_plain(blueprint.plain())
    assert back == blueprint
    assert back.digest == blueprint.digest
    assert back.digest != odd_blueprint(codec="int8").digest


BAD: list[tuple[str, Any]] = [
    ("tensors", [["a", [-1], "float32", 0]]),
    ("tensors", [["a", [2], "int64", 0]]),
    ("tensors", [["a", [2], "float32", 9]]),
    ("tensors", [["a", [1 << 60], "float32", 0]]),
    ("tensors", [["a", [2], "float32", 0], ["a", [2], "float32", 0]]),
    ("tensors", [["a", 2, "float32", 0]]),
    ("tensors", None),
    ("groups", [{"optimizer": "load", "options": {}, "pushed": "gradient"}]),
    ("groups", [{"optimizer": "Optimizer", "options": {}, "pushed": "gradient"}]),
    ("groups", [{"optimizer": "LBFGS", "options": {}, "pushed": "gradient"}]),
    ("groups", [{"optimizer": "SGD", "options": {"lr": "x"}, "pushed": "gradient"}]),
    ("groups", [{"optimizer": "SGD", "options": {"rate": 1.0}, "pushed": "gradient"}]),
    ("groups", [{"optimizer": "SGD", "options": {"lr": 1.0}, "pushed": "weights"}]),
    ("codec", "randomk(0.1)"),
    ("codec", "__import__('os')"),
    ("codec", 3),
]


@pytest.mark.parametrize(("entry", "value"), BAD)
def test_plain_values_that_are_no_blueprint_are_malformed(entry: str, value: Any) -> None:
    plain = {**odd_blueprint().plain(), entry: value}
    with pytest.raises(Malformed):
        Blueprint.from_plain(plain)


@pytest.mark.parametrize("servers", [1, 2, 3, 5, 1000])
def test_shards_hold_every_element_once_and_equal_bytes(servers: int) -> None:
    blocks = odd_blueprint().blocks
    shards = cut_shards(blocks, servers)
    for number, block in enumerate(blocks):
        spans = [span for shard in shards for span in shard if span.block == number]
        elements = [place for span in spans for place in range(span.start, span.stop)]
        assert elements == list(range(block.elements))
    sizes = [sum(s.elements * blocks[s.block].dtype.itemsize for s in shard) for shard in shards]
    assert max(sizes) - min(sizes) < 2 * 8


def test_pieces_are_small_and_end_to_end() -> None:
    blocks = odd_blueprint().blocks
    (spans,) = cut_shards(blocks, 1)
    pieces = cut_pieces(blocks, spans, most_bytes=24)
    sizes = [sum(s.elements * blocks[s.block].dtype.itemsize for s in piece) for piece in pieces]
    assert max(sizes) <= 24
    assert sum(sizes) == sum(block.bytes for block in blocks)
    assert min(sizes[:-1]) > 24 - 8


def test_a_shard_without_elements_has_one_empty_piece() -> None:
    assert ((),) in [tuple(pieces) for pieces in cut(odd_blueprint().blocks, 1000)]


def test_tensors_are_views_of_their_blocks_where_their_places_say() -> None:
    blueprint = odd_blueprint()
    flats = [torch.arange(block.elements).to(block.dtype) for block in blueprint.blocks]
    views = view_all(blueprint.blocks, flats)
    places = find_places(blueprint.blocks)
    for held in blueprint.tensors:
        place = places[held.name]
        assert views[held.name].shape == held.shape
        assert place.elements == prod(held.shape)
        flat = flats[place.block][place.start : place.stop]
        assert torch.equal(views[held.name].reshape(-1), flat)
    flats[0].zero_()
    assert not views["a"].any()


def test_a_tensor_overlaps_the_pieces_that_hold_its_elements_and_no_others() -> None:
    blocks = odd_blueprint().blocks
    shards = [cut_pieces(blocks, spans, 16) for spans in cut_shards(blocks, 3)]
    places, found = find_places(blocks), overlaps(blocks, shards)
    for name, place in places.items():
        expected = [
            (server, number)
            for server, pieces in enumerate(shards)
            for number, piece in enumerate(pieces)
            if any(
                set(range(span.start, span.stop)) & set(range(place.start, place.stop))
                for span in piece
                if span.block == place.block
            )
        ]
        assert found[name] == expected
    assert found["d"] == []


def test_changed_options_are_those_that_a_schedule_changed() -> None:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer)
    blueprint = Blueprint.of_gradients(optimizer, model.named_parameters())
    assert blueprint.changed_options(optimizer) == [{}]
    optimizer.step()
    schedule.step()
    lr = optimizer.param_groups[0]["lr"]
    assert blueprint.changed_options(optimizer) == [{"lr": lr}]
    optimizer.add_param_group({"params": [Parameter(torch.zeros(1))]})
    with pytest.raises(UserError, match="2 groups, servers hold 1"):
        blueprint.changed_options(optimizer)


BITS = {
    "AdamW": {"lr": 0.01},
    "Adam": {"lr": 0.01, "weight_decay": 0.1},
    "SGD": {"lr": 0.1, "momentum": 0.9, "nesterov": True},
    "Adagrad": {"lr": 0.1},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", BITS)
@pytest.mark.parametrize(("elements", "servers"), [(100_003, 3), (33_333, 2), (1001, 4)])
def test_shards_step_to_the_same_bits_as_the_whole(
    name: str, dtype: torch.dtype, elements: int, servers: int
) -> None:
    chance = torch.Generator().manual_seed(elements)
    start, *gradients = torch.randn(6, elements, generator=chance).to(dtype)
    model = nn.ParameterDict({"weight": Parameter(start.clone())})
    made = getattr(torch.optim, name)(model.parameters(), **BITS[name])
    blueprint = Blueprint.of_gradients(made, model.named_parameters())
    shards = [Shard(blueprint, index, servers) for index in range(servers)]
    fused = all(cut_at_grains(blueprint.blocks, servers))
    whole = Parameter(start.clone())
    optimizer = getattr(torch.optim, name)([whole], **BITS[name], fused=fused)
    for shard in shards:
        for number, (span,) in enumerate(shard.pieces):
            shard.put(number, (start[span.start : span.stop],))
    for gradient in gradients:
        whole.grad = gradient.clone()
        optimizer.step()
        for shard in shards:
            for number, (span,) in enumerate(shard.pieces):
                shard.update(number, [(1.0, (gradient[span.start : span.stop],))], [])
    held = [shard.read(number)[0] for shard in shards for number in range(len(shard.pieces))]
    assert torch.equal(torch.cat(held), whole.detach())
    assert fused == (elements * dtype.itemsize // servers >= FINE_BYTES)


@pytest.mark.parametrize("servers", [1, 2, 3, 7])
def test_large_blocks_are_cut_at_grains_and_shards_differ_by_two_of_them(servers: int) -> None:
    model = nn.Sequential(nn.Linear(331, 317), nn.Linear(317, 503))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    blocks = Blueprint.of_gradients(optimizer, model.named_parameters()).blocks
    shards = cut_shards(blocks, servers)
    sizes = [sum(span.elements for span in spans) for spans in shards]
    assert sum(sizes) == sum(block.elements for block in blocks)
    assert max(sizes) - min(sizes) < 2 * GRAIN
    for spans in shards:
        for piece in cut_pieces(blocks, spans, FINE_BYTES):
            for span in piece:
                assert span.stop % GRAIN == 0 or span.stop == blocks[span.block].elements
    assert cut_at_grains(blocks, servers) == [True] * len(blocks)
