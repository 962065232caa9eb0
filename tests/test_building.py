"""Models that are built without memory come to the numbers that a plain seed gives, to the bit."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from allfuse.base.errors import UserError
from allfuse.split import building
from allfuse.split.hollow import is_hollow
from allfuse.split.piece import cut_piece
from allfuse.training.building import build_pending
from allfuse.training.start import build_model


@pytest.fixture(autouse=True)
def everything_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small models come by their numbers as large ones do, with no window to keep any."""
    monkeypatch.setattr(building, "LARGE_BYTES", 200)
    monkeypatch.setattr(building, "WINDOW_BYTES", 0)


class Initialized(nn.Module):
    """A linear layer whose weight is what a function makes of it."""

    def __init__(self, init: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.layer = nn.Linear(33, 17)
        init(self.layer.weight)
        self.after = nn.Linear(17, 5)  # draws what comes next


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(40, 16, padding_idx=3)
        layer = nn.TransformerEncoderLayer(16, 4, 32)
        self.trunk = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.head = nn.Linear(16, 40, bias=False)
        self.head.weight = self.table.weight
        self.register_buffer("mask", torch.ones(40, 40).tril(), persistent=False)
        rates = torch.linspace(0, 0.1, 3).tolist()
        self.drops = nn.ModuleList(nn.Dropout(rate) for rate in rates)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        with torch.no_grad():
            self.table.weight[3] = 0.0
            self.trunk.layers[1].linear1.weight.mul_(2.0).add_(self.trunk.layers[0].linear1.weight)


def rotated(weight: Tensor) -> None:
    with torch.no_grad():
        weight.copy_(torch.linalg.qr(torch.randn(33, 33))[0][:17])


def by_a_loop(weight: Tensor) -> None:
    while weight.abs().max().item() > 0.15:
        nn.init.uniform_(weight, -0.2, 0.2)
        weight.data.clamp_(-0.14, 0.14)


def by_its_own_generator(weight: Tensor) -> None:
    nn.init.normal_(weight, generator=torch.Generator().manual_seed(9))


def replaced(weight: Tensor) -> None:
    weight.data = torch.rand(17, 33) @ torch.randn(33, 33)


def from_another(weight: Tensor) -> None:
    other = torch.randperm(weight.numel()).float().view_as(weight)
    with torch.no_grad():
        weight.copy_(other)
        other.zero_()  # after it was copied


def through_numpy(weight: Tensor) -> None:
    weight.detach().numpy()[:] *= 3


def by_a_list(weight: Tensor) -> None:
    torch._foreach_mul_([weight.data, torch.ones(2000)], 2.0)


def weight_normed() -> nn.Module:
    return nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Linear(33, 17)),
        nn.utils.parametrizations.spectral_norm(nn.Linear(17, 9)),
        nn.utils.parametrizations.orthogonal(nn.Linear(9, 9)),
    )


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4)
    ).to(memory_format=torch.channels_last)


def hugging(name: str) -> nn.Module:
    test_split_hugging = pytest.importorskip("test_split_hugging")
    made: nn.Module = test_split_hugging.build(name)
    return made


def drawn_again(name: str) -> Callable[[Tensor], Any]:
    return getattr(nn.init, name)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: nn.Sequential(nn.Linear(33, 17), nn.Tanh(), nn.Linear(17, 3)).double(),
    "convolutions": convolutions,
    "tied transformer": Tied,
    "attention": lambda: nn.MultiheadAttention(16, 4, kdim=8, vdim=24),
    "copied": lambda: nn.Sequential(*(copy.deepcopy(nn.Linear(16, 16)) for _ in range(3))),
    "short": lambda: nn.Linear(33, 17).bfloat16(),
    "parametrized": weight_normed,
    "lstm": lambda: nn.LSTM(16, 12, 2),
    **{
        name: functools.partial(Initialized, drawn_again(name))
        for name in ("orthogonal_", "trunc_normal_", "kaiming_uniform_", "xavier_normal_", "eye_")
    },
    "sparse_": lambda: Initialized(functools.partial(nn.init.sparse_, sparsity=0.3)),
    "cut off at one side": lambda: Initialized(lambda w: nn.init.trunc_normal_(w, 0, 1, 2, 3)),
    **{
        init.__name__: functools.partial(Initialized, init)
        for init in (
            rotated,
            by_a_loop,
            by_its_own_generator,
            replaced,
            from_another,
            through_numpy,
            by_a_list,
        )
    },
    **{name: functools.partial(hugging, name) for name in ("Llama", "GPT2", "Bert", "ViT")},
}


def assert_same(model: nn.Module, plain: nn.Module) -> None:
    for kind in ("named_parameters", "named_buffers"):
        held = dict(getattr(model, kind)())
        for name, value in getattr(plain, kind)():
            assert held[name].dtype == value.dtype
            assert held[name].stride() == value.stride()
            assert torch.equal(held[name], value), name


@pytest.mark.parametrize("name", MODELS)
def test_a_model_gets_the_numbers_of_a_plain_seed(name: str) -> None:
    model, pending = build_pending(MODELS[name], 5)
    drawn = torch.rand(3)
    held = dict(model.named_parameters())
    pending.fill()
    plain = build_model(MODELS[name], 5)
    assert torch.equal(torch.rand(3), drawn)  # the generator is left where building leaves it
    assert_same(model, plain)
    assert all(held[key] is value for key, value in model.named_parameters())


@pytest.mark.parametrize("name", ["tied transformer", "trunc_normal_", "convolutions"])
def test_all_parameters_come_later(name: str) -> None:
    model, pending = build_pending(MODELS[name], 5)
    large = [parameter for parameter in model.parameters() if parameter.nbytes >= 200]
    assert len(pending) == len(large) > 0


def test_one_parameter_can_be_had_in_pieces_and_others_not_at_all() -> None:
    model, pending = build_pending(MODELS["tied transformer"], 5)
    weights = dict(model.named_parameters())
    piece = cut_piece((40, 16), 0, (40,), [(10, 25)])
    pieces: dict[str, Any] = dict.fromkeys(weights)
    pending.fill({**pieces, "table.weight": piece})
    plain = build_model(MODELS["tied transformer"], 5)
    assert isinstance(plain, Tied)
    assert torch.equal(weights["table.weight"], plain.table.weight[10:25])
    others = [p for name, p in weights.items() if name != "table.weight" and p.nbytes >= 200]
    assert all(map(is_hollow, others))


def test_numbers_that_are_not_here_are_refused_with_the_way_out() -> None:
    model, pending = build_pending(MODELS["mlp"], 5)
    pending.guard()
    weight = next(model.parameters())
    for look in (
        lambda: weight.sum(),
        lambda: weight.detach().numpy(),
        lambda: weight.data.fill_(1.0),
        lambda: copy.deepcopy(model),
        lambda: weight.tolist(),
    ):
        with pytest.raises(UserError, match="change weights in the function that builds"):
            look()
    assert weight.shape == (17, 33)
    assert torch.optim.AdamW(model.parameters())


@pytest.mark.parametrize("way", ["run", "load", "load a part"])
def test_a_model_that_is_run_or_loaded_has_all_numbers(way: str) -> None:
    model, pending = build_pending(MODELS["mlp"], 5)
    pending.guard()
    plain = build_model(MODELS["mlp"], 5)
    if way == "run":
        x = torch.randn(2, 33, dtype=torch.float64)
        assert torch.equal(model(x), plain(x))
    else:
        part: nn.Module = model if way == "load" else model.get_submodule("0")
        other = build_model(MODELS["mlp"], 6)
        changed = other if way == "load" else other.get_submodule("0")
        part.load_state_dict(changed.state_dict())
        assert torch.equal(model.get_parameter("0.weight"), other.get_parameter("0.weight"))
        plain = other if way == "load" else plain
    assert not len(pending)
    assert torch.equal(model.get_parameter("2.weight"), plain.get_parameter("2.weight"))


def test_what_was_built_alike_has_one_digest_and_what_was_not_has_others() -> None:
    def built(seed: int, name: str = "mlp") -> int:
        return build_pending(MODELS[name], seed)[1].digest

    assert built(5) == built(5)
    assert len({built(5), built(6), built(5, "short")}) == 3


def test_building_keeps_no_more_than_the_window_and_one_tensor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(building, "WINDOW_BYTES", 300_000)
    most = 0

    class Watched(building.Builder):
        def _empty_others(self, busy: Any) -> None:
            nonlocal most
            super()._empty_others(busy)
            most = max(most, sum(h.memory.nbytes() for h in self._histories.values()))  # type: ignore[union-attr]

    monkeypatch.setattr(building, "Builder", Watched)
    layers = [functools.partial(nn.Linear, 200, 200) for _ in range(30)]  # 160 kB each
    build_pending(lambda: nn.Sequential(*(layer() for layer in layers)), 0)
    assert 160_000 <= most <= 300_000 + 160_000


def test_a_module_that_is_built_already_has_its_numbers() -> None:
    model = nn.Linear(3, 2)
    same, pending = build_pending(model, 0)
    assert same is model
    assert not len(pending)
