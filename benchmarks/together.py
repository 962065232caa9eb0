"""Contenders that are alive in the same ranks and take turns of some steps."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import harness
import models
import torch
import torch.distributed as dist


def take_turns(
    loops: Mapping[str, Callable[[int], None]],
    shortest: models.PlainLoop,
    *,
    turn_s: float,
    seconds: float,
    least: int,
    quick_steps: int | None,
) -> dict[str, harness.Turns]:
    """What a step of each contender takes in each round, once all are warm. All ranks call it.

    Args:
        loops: what does so many steps. shortest: tells how many a turn has.
        turn_s, seconds: about how long one turn takes, and all rounds. least: of rounds.
        quick_steps: of a turn in a smoke run of 2 rounds; None for a run that counts.
    """
    steps = agree(quick_steps or models.steps_in(shortest, turn_s))
    turns = {key: functools.partial(run, steps) for key, run in loops.items()}
    warm = harness.interleave(turns, 1, dist.barrier)
    one_round = sum(turn.wall_s[0] for turn in warm.values())
    rounds = agree(2 if quick_steps else max(least, int(seconds / one_round)))
    found = harness.interleave(turns, rounds, dist.barrier)
    return {key: turn.each(steps) for key, turn in found.items()}


def agree(number: int) -> int:
    """What rank 0 says."""
    said = torch.tensor(number)
    dist.broadcast(said, 0)
    return int(said)
