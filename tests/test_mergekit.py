"""Rules that fuse models on disk, against mergekit 0.1.5, where it is installed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_methods import draw, fuse
from torch import Tensor

from allfuse.rule import METHODS

api = pytest.importorskip(
    "mergekit.merge_methods.api", reason="needs mergekit, an optional peer, which is not installed"
)

WEIGHTS = (1.0, 2.0, 0.5)
EACH = ("density", "gamma")  # what it takes for each model
CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("linear", {}, {}),
    ("linear", {"normalize": False}, {"normalize": False}),
    ("task_arithmetic", {"scale": 0.3}, {"lambda": 0.3}),
    ("ties", {"density": 0.3}, {"density": 0.3}),
    ("ties", {"density": 1.0, "normalize": False}, {"density": 1.0, "normalize": False}),
    ("breadcrumbs", {"density": 0.5, "gamma": 0.01}, {"density": 0.5, "gamma": 0.01}),
    ("breadcrumbs", {"density": 0.995, "gamma": 0.1}, {"density": 0.995, "gamma": 0.1}),
    ("breadcrumbs_ties", {"density": 0.5, "gamma": 0.01}, {"density": 0.5, "gamma": 0.01}),
    ("model_stock", {}, {}),
    ("sce", {}, {"select_topk": 1.0}),
    ("sce", {"density": 0.3}, {"select_topk": 0.3}),
    ("multislerp", {}, {}),
    ("karcher", {}, {}),
    ("slerp", {"t": 0.3}, {"t": 0.3}),
    ("nuslerp", {}, {}),
    ("nearswap", {"t": 0.01}, {"t": 0.01}),
    ("passthrough", {}, {}),
]
UNWEIGHTED = ("model_stock", "sce", "karcher", "slerp", "nearswap", "passthrough")
FROM_THE_FIRST = ("slerp", "nearswap")  # which is the base there


def theirs(name: str, models: list[Tensor], base: Tensor | None, options: dict[str, Any]) -> Tensor:
    given = {key: [value] * len(models) if key in EACH else value for key, value in options.items()}
    if name not in UNWEIGHTED:
        given["weight"] = list(WEIGHTS[: len(models)])
    found: Tensor = api.merge_tensors(
        [*([] if base is None else [base]), *models],
        name,
        parameters=given,
        base_index=0 if base is not None or name in FROM_THE_FIRST else None,
        dtype=torch.float32,
        out_dtype=torch.float32,
    )
    return found


@pytest.mark.parametrize(("name", "ours", "options"), CASES, ids=str)
@pytest.mark.parametrize("seed", [0, 1])
def test_a_rule_equals_mergekits(
    name: str, ours: dict[str, Any], options: dict[str, Any], seed: int
) -> None:
    rule = METHODS[name](**ours)
    base, shared, *models = draw(2 + (rule.models or 3), seed)
    models = [base + 0.1 * (shared + model) for model in models]  # as models of one kind are
    weights = [1.0] * len(models) if name in UNWEIGHTED else WEIGHTS[: len(models)]
    if rule.of_changes:
        found = base + fuse(rule, [model - base for model in models], weights)
    else:
        found = fuse(rule, models, weights)
    want = theirs(name, models, base if rule.of_changes else None, options)
    torch.testing.assert_close(found, want, rtol=0.0, atol=2e-6)


@pytest.mark.parametrize("size", [1e-2, 1e-3, 3e-4, 1e-5])
def test_sce_equals_mergekits_for_small_changes(size: float) -> None:
    base, *models = draw(4)
    models = [base + size * number * model for number, model in enumerate(models, start=1)]
    found = base + fuse(METHODS["sce"](density=0.3), [model - base for model in models])
    want = theirs("sce", models, base, {"select_topk": 0.3})
    torch.testing.assert_close(found, want, rtol=0.0, atol=1e-3 * size + 1e-7)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("dare_linear", {"density": 0.4}),
        ("dare_ties", {"density": 0.4}),
        ("della", {"density": 0.5, "epsilon": 0.2}),
        ("della_linear", {"density": 0.5, "epsilon": 0.2}),
    ],
)
def test_what_is_kept_at_random_is_as_likely_as_in_mergekit(
    name: str, options: dict[str, Any]
) -> None:
    """It draws from another generator, so the masks differ; how often each place is kept does not,
    nor what becomes of the sum of all."""
    change = torch.arange(1.0, 51.0).repeat(4000, 1)
    ours = fuse(METHODS[name](**options), [change], [2.0])
    given = {"weight": [2.0], "density": [options["density"]]}
    given |= {key: value for key, value in options.items() if key == "epsilon"}
    want: Tensor = api.merge_tensors(
        [torch.zeros_like(change), change], name, parameters=given, base_index=0,
        dtype=torch.float32, out_dtype=torch.float32,
    )  # fmt: skip
    torch.testing.assert_close(ours.sum(), want.sum(), rtol=1e-4, atol=0.0)
    kept, expected = ((each != 0).float().mean(0) for each in (ours, want))
    torch.testing.assert_close(kept, expected, rtol=0.0, atol=0.05)
