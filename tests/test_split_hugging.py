"""Models of Hugging Face's transformers, from their configurations: cut, they learn what one
process learns."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_training_split import assert_near, decayed, figures, heavy, recorded
from torch import Tensor, nn
from training_cases import job

from allfuse.job import Job, Stop

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

WIDE = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4}
TOKENS = {"vocab_size": 51, "bos_token_id": 1, "eos_token_id": 2}
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def build(name: str) -> nn.Module:
    match name:
        case "Llama":
            config = transformers.LlamaConfig(**WIDE, **HEADS, **TOKENS, num_key_value_heads=2)
            model = transformers.LlamaForCausalLM(config)
        case "GPT2":
            shape = {"n_embd": 24, "n_layer": 2, "n_head": 3, "n_positions": 8}
            model = transformers.GPT2LMHeadModel(
                transformers.GPT2Config(**shape, **TOKENS, **NO_DROPOUT)
            )
        case "Bert":
            words = {"vocab_size": 51, "max_position_embeddings": 8}
            model = transformers.BertForMaskedLM(
                transformers.BertConfig(**WIDE, **HEADS, **words, **STILL)
            )
        case _:
            config = transformers.ViTConfig(
                **WIDE, **HEADS, **STILL, image_size=8, patch_size=4, num_labels=5
            )
            model = transformers.ViTForImageClassification(config)
    made: nn.Module = model.double()
    return made


def logits(model: nn.Module, batch: Any) -> Tensor:
    x = batch[0]
    name = "pixel_values" if x.is_floating_point() else "input_ids"
    found: Tensor = model(**{name: x}).logits
    return found


def loss(outputs: Tensor, batch: Any) -> Tensor:
    return F.cross_entropy(outputs.flatten(0, -2), batch[1].flatten())


def made_job(name: str) -> Job:
    chance = torch.Generator().manual_seed(7)
    if name == "ViT":
        x = torch.randn(24, 3, 8, 8, generator=chance, dtype=torch.float64)
        y = torch.randint(5, (24,), generator=chance)
    else:
        x, y = (torch.randint(51, (24, 6), generator=chance) for _ in range(2))
    return job(
        model=functools.partial(build, name),
        train=(x, y),
        loss=loss,
        forward=logits,
        optimizer=decayed,
        batch_size=6,
        clip=0.5,
        stop=Stop(steps=20),
    )


@pytest.mark.parametrize(
    "name",
    ["Llama", "Bert", *(pytest.param(each, marks=pytest.mark.slow) for each in ("GPT2", "ViT"))],
)
def test_models_of_transformers_learn_cut_what_they_learn_whole(name: str) -> None:
    whole, told = recorded(made_job(name), "data(1)")
    for plan in ("tensor(2)", "data(2) * tensor(2)", "shard(3)"):
        cut, events = recorded(made_job(name), plan)
        assert_near(cut[0].weights, whole[0].weights)
        assert len(figures(events[0])) == 20
        for own, expected in zip(figures(events[0]), figures(told[0]), strict=True):
            assert own == pytest.approx(expected, rel=1e-9)


def within(model: nn.Module, batch: Any) -> Any:
    return model(input_ids=batch[0], labels=batch[1])


@pytest.mark.parametrize("name", ["Llama", pytest.param("GPT2", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "plan",
    [
        pytest.param("tensor(2)", marks=pytest.mark.slow),
        "tensor(3)",
        pytest.param("pipe(2) * tensor(2)", marks=pytest.mark.slow),
    ],
)
def test_models_that_compute_their_own_loss_learn_cut_what_they_learn_whole(
    name: str, plan: str
) -> None:
    """Their loss, in slices of words, is of the rows but the last, and in fp32."""
    whole, told = recorded(own_loss(name), "data(1)")
    cut, events = recorded(own_loss(name), plan)
    for key, value in whole[0].weights.items():
        torch.testing.assert_close(cut[0].weights[key], value, rtol=1e-5, atol=1e-6, msg=key)
    for own, expected in zip(figures(events[0]), figures(told[0]), strict=True):
        assert own == pytest.approx(expected, rel=1e-5)


def own_loss(name: str) -> Job:
    def loss(outputs: Any, batch: Any) -> Tensor:
        found: Tensor = outputs.loss
        return found

    return replace(made_job(name), forward=within, loss=loss, optimizer=heavy)
