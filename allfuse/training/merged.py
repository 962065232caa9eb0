"""One state from those of several ranks, for a plan other than the one that saved them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from allfuse.plan import Data, Plan
from allfuse.split.piece import Piece
from allfuse.training.joined import cut_state, join_states

State = dict[str, Any]


def writers_of(plan: Plan) -> tuple[int, ...]:
    """The ranks that save a checkpoint: of each site those of one replica, whose other coordinates
    are all 0; and those of all replicas of a data axis whose codec keeps something of each."""
    axis = plan.axis("data")
    keeps = isinstance(axis, Data) and axis.n > 1 and not axis.codec.lossless
    own = {"site", "data"} if keeps else {"site"}
    return tuple(
        rank for rank in range(plan.workers) if not any(_outside(plan, rank, own).values())
    )


def is_lead(plan: Plan, rank: int) -> bool:
    """Whether a writer saves all that it has of its site's state; others save what only they
    keep."""
    return not any(_outside(plan, rank, {"site"}).values())


def _outside(plan: Plan, rank: int, own: set[str]) -> dict[str, int]:
    """The coordinates of a rank on replica axes other than these."""
    here = plan.coordinates(rank)
    return {a.name: here[a.name] for a in plan.axes if a.replicates and a.name not in own}


def read_merged(
    plan: Plan,
    rank: int,
    old: Plan,
    written: Iterable[int],
    read: Callable[[int], State],
    pieces: Mapping[str, Piece | None] | None = None,
) -> State:
    """The state that a rank of `plan` goes on from, of a checkpoint that `old` has written.

    Where there are as many sites as before each goes on from its own, else all from the mean. What
    codecs have not sent stays with its replica, or all of it is shared out among the new ones: the
    sum over the replicas of a site is the same.

    Args:
        read: gives what a writer has saved; its tensors may lie in a file still.
        pieces: what the rank has of parameters and buffers that it has not whole.

    Raises:
        CheckpointError: a part of the model is missing.
    """
    here, ranks, pieces = plan.coordinates(rank), list(written), pieces or {}
    if plan == old:
        state = _read_own(plan, rank, ranks, read, pieces)
        if state is not None:
            return state
    leads: dict[int, list[int]] = {}
    for writer in ranks:
        if is_lead(old, writer):
            leads.setdefault(site_of(old, writer), []).append(writer)
    same_sites = len(leads) == _size(plan, "site")
    if same_sites:
        state = _read_replica(leads[here.get("site", 0)], read, pieces)
    else:
        sites = [_read_replica(writers, read, pieces) for writers in leads.values()]
        state = mean_of_sites(sites, _size(plan, "site"))
    replicas: dict[int, list[int]] = {}
    for writer in ranks:
        if not same_sites or site_of(old, writer) == here.get("site", 0):
            replicas.setdefault(writer // old.replica_size, []).append(writer)

    def read_fusions(writer: int) -> State:
        return {kind: kept for kind, kept in read(writer).items() if kind in ("fusions", "pieces")}

    each = (_read_replica(writers, read_fusions, pieces) for writers in replicas.values())
    parts = [state["fusions"] for state in each]
    if plan == old and rank // plan.replica_size in replicas:
        state["fusions"] = parts[list(replicas).index(rank // plan.replica_size)]
    else:
        share = 1 / _size(plan, "data") / (1 if same_sites else len(leads))
        state["fusions"] = [share_out(kept, share) for kept in zip(*parts, strict=True)]
    return cut_state(state, pieces)


def _read_own(
    plan: Plan,
    rank: int,
    written: list[int],
    read: Callable[[int], State],
    pieces: Mapping[str, Piece | None],
) -> State | None:
    """What this rank, or one in its place of another replica, has saved; None where the model was
    cut in another way."""
    first = plan.replica(rank)[0]
    mine = plan.coordinates(rank)
    lead = next(
        writer
        for writer in written
        if is_lead(plan, writer)
        and site_of(plan, writer) == mine.get("site", 0)
        and writer % plan.replica_size == rank - first
    )
    state = read(lead)
    saved = state.get("pieces", {})
    if saved != plain_pieces(pieces):
        return None
    if rank == lead:
        return state
    if rank in written:
        state["fusions"] = read(rank)["fusions"]
        return state
    parts = [read(w)["fusions"] for w in written if _stands_beside(plan, w, rank)]
    share = 1 / _size(plan, "data")
    state["fusions"] = [share_out(kept, share) for kept in zip(*parts, strict=True)]
    return state


def plain_pieces(pieces: Mapping[str, Piece | None]) -> dict[str, Any]:
    """What a rank has of tensors, as lists of numbers for files; None where it has nothing."""
    return {name: None if piece is None else piece.plain() for name, piece in pieces.items()}


def _stands_beside(plan: Plan, writer: int, rank: int) -> bool:
    """Whether a writer has the same part of the model of the same site."""
    same_site = site_of(plan, writer) == site_of(plan, rank)
    return same_site and writer % plan.replica_size == rank % plan.replica_size


def _read_replica(
    writers: list[int], read: Callable[[int], State], pieces: Mapping[str, Piece | None]
) -> State:
    return join_states([read(writer) for writer in writers], pieces)


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
