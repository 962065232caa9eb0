"""One state from those of several ranks, for a plan other than the one that saved them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from allfuse.plan import Data, Plan

State = dict[str, Any]


def writers_of(plan: Plan) -> tuple[int, ...]:
    """The ranks that save a checkpoint: one of each site, whose other coordinates are all 0, and
    all of a data axis whose codec keeps something of each."""
    axis = plan.axis("data")
    keeps = isinstance(axis, Data) and axis.n > 1 and not axis.codec.lossless
    own = {"site", "data"} if keeps else {"site"}
    return tuple(
        rank
        for rank in range(plan.workers)
        if not any(c for name, c in plan.coordinates(rank).items() if name not in own)
    )


def is_lead(plan: Plan, rank: int) -> bool:
    """Whether a writer saves all of its site's state; others save what only they keep."""
    return not any(c for name, c in plan.coordinates(rank).items() if name != "site")


def read_merged(
    plan: Plan, rank: int, old: Plan, written: Iterable[int], read: Callable[[int], State]
) -> State:
    """The state that a rank of `plan` goes on from, of a checkpoint that `old` has written.

    Where there are as many sites as before each goes on from its own, else all from the mean. What
    codecs have not sent stays with its rank, or all of it is shared out among the new ones: the
    sum over the ranks of a site is the same.
    """
    here = plan.coordinates(rank)
    leads = {site_of(old, writer): writer for writer in written if is_lead(old, writer)}
    same_sites = len(leads) == _size(plan, "site")
    if same_sites:
        state = read(leads[here.get("site", 0)])
    else:
        state = mean_of_sites([read(w) for w in leads.values()], _size(plan, "site"))
    ranks = list(written)
    if plan == old and rank in ranks:
        state["fusions"] = read(rank)["fusions"]
        return state
    wanted = [w for w in ranks if not same_sites or site_of(old, w) == here.get("site", 0)]
    parts = [read(writer)["fusions"] for writer in wanted]
    share = 1 / _size(plan, "data") / (1 if same_sites else len(leads))
    state["fusions"] = [share_out(kept, share) for kept in zip(*parts, strict=True)]
    return state


def _size(plan: Plan, name: str) -> int:
    axis = plan.axis(name)
    return 1 if axis is None else axis.n


def site_of(plan: Plan, rank: int) -> int:
    return plan.coordinates(rank).get("site", 0)


def share_out(kept: tuple[State | None, ...], share: float) -> State | None:
    """What codecs keep of one fusion: the residuals of all, in equal shares."""
    found = [each for each in kept if each is not None]
    if not found:
        return None
    return {**found[0], "residuals": _sum([each["residuals"] for each in found], share)}


def _sum(named: list[dict[str, Tensor]], factor: float) -> dict[str, Tensor]:
    """By name, the sum times a factor."""
    return {n: torch.stack([each[n] for each in named]).sum(0) * factor for n in named[0]}


def mean_of_sites(states: list[State], sites: int = 1) -> State:
    """One state from those of all sites, for each of so many new ones: their mean, weighted by what
    each learned from since its last round.

    A site that learned from nothing counts only where no other has anything to say. What sites have
    not sent of their weights is shared out. What all agreed on at the last round, the momentum of
    an outer optimizer and what was fused and not taken in yet are the same in all.
    """
    weights = [max(state["rounds"]["samples"]) for state in states]
    told = weights if any(weights) else [1.0] * len(states)
    merged: State = mean_of_states(states, told)
    rounds = states[0]["rounds"]
    fusion = share_out(tuple(state["rounds"]["fusion"] for state in states), 1 / sites)
    if fusion is not None:
        fusion |= {"kept": {}}
    fresh = {"samples": [0.0], "steps_since": 0, "equal": True, "fusion": fusion}
    departed = zip(*(state["rounds"]["departed"] for state in states), strict=True)
    fresh["departed"] = [
        {**same[0], "unsent": _sum([each["unsent"] for each in same], 1 / sites)}
        for same in departed
    ]
    merged["rounds"] = {**rounds, **fresh}
    return merged


def mean_of_states(states: list[Any], weights: list[float]) -> Any:
    """The weighted mean of nested states: floating tensors averaged, all else the first's.

    Entries that not all states have (an optimizer that never stepped has none) are the mean of
    those that have them.
    """
    first = states[0]
    if isinstance(first, dict):
        keys = dict.fromkeys(key for state in states for key in state)
        means = {key: mean_of_states(*_having(key, states, weights)) for key in keys}
        return type(first)(means)
    if isinstance(first, list | tuple) and all(len(state) == len(first) for state in states):
        columns = zip(*states, strict=True)
        return type(first)(mean_of_states(list(column), weights) for column in columns)
    if isinstance(first, Tensor) and first.is_floating_point():
        if all(torch.equal(first, state) for state in states):
            return first  # counters of steps among them stay whole numbers
        total = torch.zeros_like(first, dtype=torch.promote_types(first.dtype, torch.float32))
        for state, weight in zip(states, weights, strict=True):
            total += state * (weight / sum(weights))
        return total.to(first.dtype)
    return first


def _having(key: Any, states: list[Any], weights: list[float]) -> tuple[list[Any], list[float]]:
    pairs = [(state[key], w) for state, w in zip(states, weights, strict=True) if key in state]
    told = [weight for _, weight in pairs]
    return [value for value, _ in pairs], told if any(told) else [1.0] * len(told)
