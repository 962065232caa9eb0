"""A model cut inside its layers gives the numbers of the whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sliced import (
    CASES,
    GatedUnit,
    GroupedAttention,
    Residual,
    TiedWords,
    Unpacked,
    assert_slices_equal_the_whole,
    plan_of,
)
from torch import Tensor, nn

from allfuse.base.errors import UserError
from allfuse.link.lone import LoneLink
from allfuse.split.record import record
from allfuse.split.request import Request, make_request
from allfuse.split.tensor.cut import Cut
from allfuse.split.tensor.slicing import slice_model
from allfuse.split.tensor.traffic import Slice


@pytest.mark.parametrize("name", CASES)
def test_slices_give_the_output_and_the_gradients_of_the_whole(name: str) -> None:
    case = CASES[name]
    batch = case.batch()
    plan = assert_slices_equal_the_whole(case.model(), lambda model: model(batch), case.n)
    assert set(case.cut) <= set(plan.cuts)
    assert any(case.cut[0] in columns for columns, _ in plan.regions), plan.reasons


UNEVEN = {
    "hidden channels": (nn.Sequential(nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 8)), (5, 8), 2),
    "convolutions": (
        nn.Sequential(nn.Conv1d(3, 7, 3), nn.BatchNorm1d(7), nn.ReLU(), nn.Conv1d(7, 4, 3)),
        (2, 3, 9),
        3,
    ),
    "halves": (Residual(GatedUnit(12, 7)), (5, 12), 3),
    "heads": (Residual(GroupedAttention(heads=3, groups=3, width=15)), (2, 5, 15), 2),
    "heads by their number": (Unpacked(15, 3), (2, 5, 15), 2),
    "heads of torch": (
        nn.TransformerEncoderLayer(20, 5, 13, dropout=0.0, batch_first=True),
        (2, 6, 20),
        3,
    ),
}


@pytest.mark.parametrize("name", UNEVEN)
def test_slices_are_uneven_where_n_does_not_divide(name: str) -> None:
    model, shape, n = UNEVEN[name]
    plan = assert_slices_equal_the_whole(model.double(), run_on(*shape), n)
    assert plan.regions
    assert not all(cut.is_even(n) for cut in plan.cuts.values())
    assert not plan.whole


def test_words_that_n_does_not_divide_are_cut_unevenly() -> None:
    words = torch.arange(25).view(5, 5)
    model = TiedWords(words=25).double()
    plan = assert_slices_equal_the_whole(model, lambda made: made(words), 3)
    assert plan.cuts["table.weight"] == Cut(0, (25,))


def run_on(*shape: int) -> Callable[[nn.Module], Tensor]:
    batch = torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return lambda model: model(batch)


def hugging(name: str) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    """A small model of Hugging Face's, with random weights, and how it is run."""
    transformers = pytest.importorskip("transformers")
    words = torch.randint(96, (2, 6), generator=torch.Generator().manual_seed(3))
    image = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3)).double()
    wide = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4}
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "vocab_size": 96}
    match name:
        case "Llama":
            config = transformers.LlamaConfig(**wide, **heads, **tokens, num_key_value_heads=2)
            model = transformers.LlamaForCausalLM(config)
        case "GPT2":
            config = transformers.GPT2Config(
                n_embd=32, n_layer=2, n_head=4, n_positions=8, **tokens
            )
            model = transformers.GPT2LMHeadModel(config)
        case "Bert":
            config = transformers.BertConfig(
                **wide, **heads, vocab_size=96, max_position_embeddings=8
            )
            model = transformers.BertForMaskedLM(config)
        case _:
            config = transformers.ViTConfig(**wide, **heads, image_size=8, patch_size=4)
            model = transformers.ViTForImageClassification(config)
    takes = {"pixel_values": image} if name == "ViT" else {"input_ids": words}
    return model.double().eval(), lambda made: made(**takes).logits


@pytest.mark.parametrize("name", ["Llama", "GPT2", "Bert", "ViT"])
def test_transformers_are_cut_nearly_whole_by_their_calls_alone(name: str) -> None:
    model, run = hugging(name)
    plan = assert_slices_equal_the_whole(model, run, 2)
    sizes = {k: p.numel() for k, p in model.named_parameters()}
    assert sum(sizes[k] for k in plan.cuts if k in sizes) >= 0.9 * sum(sizes.values())


def test_a_block_that_is_used_twice_is_cut_once() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Residual(nn.LayerNorm(12), GatedUnit())

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.block(self.block(x))
            return result

    plan = assert_slices_equal_the_whole(Twice().double(), run_on(5, 12), 2)
    assert "block.inner.1.both.weight" in plan.cuts


def test_a_weight_whose_uses_cannot_all_be_cut_stays_whole_and_says_why() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.down(F.relu(self.up(x)))
            return result + self.up(x).softmax(-1)[..., :8]

    plan = assert_slices_equal_the_whole(Mixed().double(), run_on(5, 8), 2)
    assert "in several places" in plan.reasons["down"]


class Biased(nn.Module):
    """Attention with a learned number for each head and distance."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(16, 16) for _ in range(4))
        self.near = nn.Parameter(torch.zeros(4, 5, 5))

    def forward(self, x: Tensor) -> Tensor:  # B S W
        q, k, v = (f(x).view(2, 5, 4, 4).transpose(1, 2) for f in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v, self.near * 2)
        result: Tensor = self.out(mixed.transpose(1, 2).reshape(2, 5, 16))
        return result


@pytest.mark.parametrize(
    ("model", "shape", "module", "reason"),
    [
        (
            GroupedAttention(heads=4, groups=1),
            (2, 5, 16),
            "out",
            "attention in the model mixes the channels, to shape (2, 4, 5, 4)",
        ),
        (
            GroupedAttention(heads=6, groups=3, width=30),
            (2, 5, 30),
            "out",
            "attention in the model mixes the channels, whose 3 are not divisible by 2",
        ),
        (
            nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 8)),
            (5, 8),
            "2",
            "layer_norm in 1 mixes the channels",
        ),
        (Biased(), (2, 5, 16), "out", "a value beside it that is learned"),
        (
            nn.Sequential(nn.Linear(8, 1), nn.ReLU(), nn.Linear(1, 8)),
            (5, 8),
            "2",
            "1 channels of 0 are fewer than 2",
        ),
    ],
)
def test_what_cannot_be_cut_stays_whole_and_says_why(
    model: nn.Module, shape: tuple[int, ...], module: str, reason: str
) -> None:
    plan = plan_of(model.double(), run_on(*shape), 2)
    assert not plan.regions
    assert reason in plan.reasons[module]


def test_weights_that_are_to_stay_whole_do() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)).double()
    plan = assert_slices_equal_the_whole(
        model, run_on(5, 8), 2, keep={"0.weight": "the job says so"}
    )
    assert "0.weight" not in plan.cuts
    assert plan.whole["0"] == "the job says so"


def test_a_model_that_looks_at_its_numbers_is_refused_with_the_module() -> None:
    class Looks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(
        UserError, match=r"shapes alone, in 1 \(Looks\): .* the numbers in a tensor"
    ):
        plan_of(nn.Sequential(nn.Linear(8, 8), Looks()).double(), run_on(5, 8), 2)


@pytest.mark.parametrize(("parts", "unit"), [((8,), 1), ((4, 8), 1), ((7, 10), 1), ((15, 30), 3)])
@pytest.mark.parametrize("dim", [0, 1])
def test_pieces_of_a_cut_join_to_the_whole(parts: tuple[int, ...], unit: int, dim: int) -> None:
    shape = [3, 3]
    shape[dim] = sum(parts)
    tensor = torch.arange(float(shape[0] * shape[1])).view(shape)
    cut = Cut(dim, parts, unit)
    pieces = [cut.piece(tensor, 4, index) for index in range(4)]
    assert torch.equal(cut.join(pieces), tensor)
    for index, piece in enumerate(pieces):
        assert torch.equal(cut.lie(tuple(shape), 4, index).take(tensor), piece)
        assert piece.shape[dim] % unit == 0


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.softmax(-1),
        lambda x: x.cumsum(-1),
        lambda x: x.flip(-1),
        lambda x: x.roll(1, -1),
        lambda x: x.sum(-1, keepdim=True) + x,
        lambda x: x.view(5, 4, 4).transpose(1, 2).reshape(5, 16),
    ],
)
def test_a_call_that_mixes_channels_is_found_out(function: Callable[[Tensor], Tensor]) -> None:
    class Between(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return function(x)

    model = nn.Sequential(nn.Linear(8, 16), Between(), nn.Linear(16, 8)).double()
    plan = assert_slices_equal_the_whole(model, run_on(5, 8), 2)
    assert not plan.regions


class Doubled(torch.autograd.Function):
    """Computes where it cannot be seen."""

    @staticmethod
    def forward(context: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Tensor:
        return 2 * gradients[0]


def test_what_cannot_be_followed_is_not_cut_in_silence() -> None:
    class Hidden(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = Doubled.apply(x)  # type: ignore[no-untyped-call]
            return y

    model = nn.Sequential(nn.Linear(8, 16), Hidden(), nn.Linear(16, 8)).double()
    assert_slices_equal_the_whole(model, run_on(5, 8), 2)


class Mute(LoneLink):
    """A link of two of which the other says nothing."""

    def __init__(self, rank: int) -> None:
        super().__init__(rank)
        self.rank, self.members = rank, (0, 1)


def test_dropout_differs_between_slices_inside_a_region_and_agrees_outside() -> None:
    class Drops(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(64, 64), nn.Linear(64, 64)
            self.inside: Tensor
            self.outside: Tensor

        def forward(self, x: Tensor) -> Tensor:
            h = F.dropout(self.up(x) * 0 + 1, 0.5, self.training)
            self.inside = h.detach()
            y: Tensor = F.dropout(self.down(h) * 0 + 1, 0.5, self.training)
            return y

    seen = []
    for index in (0, 1):  # one after the other, since ranks on threads share a generator
        model = Drops()
        plan = plan_of(model, lambda made: made(torch.ones(4, 64)), 2)
        slice_model(model, plan, Slice(Mute(index)))
        torch.manual_seed(0)
        outside = model(torch.ones(4, 64))
        seen.append((model.inside, outside, torch.rand(3)))
    (inside, outside, after), (inside1, outside1, after1) = seen
    assert torch.equal(outside, outside1)
    assert torch.equal(after, after1)
    assert not torch.equal(inside, inside1)
    assert 0.3 < float((inside == 0).float().mean()) < 0.7


def requested(model: nn.Module, **wishes: Any) -> Any:
    request = Request(**{name: tuple(names) for name, names in wishes.items()})
    return plan_of(model, run_on(5, 8), 2, keep=request.kept(model), also=request.also(model))


def blocks() -> nn.Module:
    """Two blocks, and a head that alone is too small to be cut."""
    units = [Residual(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 8)) for _ in range(2)]
    return nn.Sequential(*units, nn.Linear(8, 4)).double()


def test_modules_that_the_job_names_stay_whole_and_say_so() -> None:
    plan = requested(blocks(), keep_whole=["0.inner.0"])
    assert plan.whole["0.inner.0"] == "the job keeps 0.inner.0 whole"
    assert plan.regions == [(("1.inner.0.weight",), ("1.inner.2.weight",))]
    assert not requested(blocks(), keep_whole=["*.inner.2"]).regions


def test_a_small_module_is_cut_where_the_job_says_so() -> None:
    assert "2.weight" not in requested(blocks()).cuts
    assert requested(blocks(), cut_also=["2"]).cuts["2.weight"] == Cut(0, (4,))
    with pytest.raises(UserError, match=r"cut_also: 0 cannot be cut into 2 slices: .*its 1 rows"):
        model = nn.Sequential(nn.Linear(8, 1), nn.Softmax(-1), nn.Linear(1, 8)).double()
        requested(model, cut_also=["0"])


def test_a_norm_that_stays_whole_keeps_its_region_whole() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 8)).double()
    assert requested(model).regions
    plan = requested(model, keep_whole=["1"])
    assert not plan.regions
    assert "1 stays whole" in plan.reasons["2"]


def test_a_tied_weight_stays_whole_by_either_of_its_names() -> None:
    model = CASES["tied words"].model()
    assert set(Request(keep_whole=("head",)).kept(model)) == {"table.weight"}


def test_names_that_the_model_has_not_are_refused_with_those_it_has() -> None:
    with pytest.raises(UserError, match=r"called 'haed'; did you mean 'head'\?; .*table, unit"):
        Request(keep_whole=("haed",)).kept(CASES["tied words"].model())
    with pytest.raises(UserError, match="in both keep_whole"):
        Request(keep_whole=("2",), cut_also=("2",)).also(blocks())
    with pytest.raises(UserError, match=r"Job\(keep_whole='head'\): allowed: a list of names"):
        make_request("Job", "head", ())


@pytest.mark.parametrize("how", ["data", "in place"])
def test_weights_that_the_forward_pass_changes_stay_whole_and_say_so(how: str) -> None:
    class Unit(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                if how == "data":
                    self.weight.data.div_(self.weight.data.norm())
                else:
                    self.weight.div_(self.weight.norm())
            return super().forward(x)

    model = nn.Sequential(Unit(8, 16), nn.ReLU(), nn.Linear(16, 8)).double()
    before = model[0].weight.detach().clone()
    plan = plan_of(model, run_on(5, 8), 2)
    assert torch.equal(before, model[0].weight)
    assert "0.weight" not in plan.cuts
    assert not plan.regions
    if how == "data":
        assert plan.whole["0"] == "0 changes it in place"


def test_sizes_that_are_those_of_whole_values_too_keep_a_region_whole() -> None:
    """Arguments are corrected by what they say: a module must not say the same of both."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            x = x.view(-1, 4, 4).flip(1).reshape(5, 16)
            result: Tensor = self.down(self.up(x).view(-1, 4, 4).mul(2).reshape(5, 16))
            return result

    plan = assert_slices_equal_the_whole(Both().double(), run_on(5, 16), 2)
    assert not plan.regions
    assert "view in the model is called with the same sizes" in plan.reasons["down"]


class Counting(nn.Module):
    """Keeps count of its passes in every way that a module can."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(4, 4)
        self.passes, self.sizes = 0, [0]
        self.seen: Tensor
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        self.sizes.append(len(x))
        self.last = x
        self.seen = self.seen + 1
        y: Tensor = self.map(x) * self.passes
        return y


def test_a_pass_that_is_followed_counts_for_no_counter() -> None:
    model = Counting()
    sizes, seen = model.sizes, model.seen
    record(model, lambda made: made(torch.zeros(2, 4)))
    assert (model.passes, model.sizes) == (0, [0])
    assert model.sizes is sizes
    assert model.seen is seen
    assert not hasattr(model, "last")
