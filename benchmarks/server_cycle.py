"""A whole update of 20 MB through 1 and 2 servers, against bare ZeroMQ that moves the same bytes.

What a worker waits for from a gradient to the next weights: the push to all servers, the
scheduler's order, the optimizer's step (SGD with momentum) there, the pull. Bare ZeroMQ only moves
20 MB there and 20 MB back between as many processes (see push_pull.py). With a copy of each shard
on the other server 20 MB travel once more, between servers, and each steps 20 MB. Each side is
measured in a launch of its own, launches take turns.
"""

from __future__ import annotations

import functools
import tempfile
import time
from pathlib import Path
from typing import Any

import harness
import push_pull
import torch

import allfuse as af
from allfuse.hosting import launch_with_roles
from allfuse.launcher import current_world
from allfuse.plan import as_plan
from allfuse.roles.agent import Agent
from allfuse.roles.blueprint import Blueprint
from allfuse.roles.messages import Join

ELEMENTS = push_pull.TOTAL_BYTES // 4
CYCLES, WARM = 40, 5


def work(cycles: int) -> list[float]:
    """Seconds of each cycle."""
    world = current_world()
    assert world is not None
    assert world.crew is not None
    torch.set_num_threads(1)
    parameter = torch.nn.Parameter(torch.zeros(ELEMENTS))
    optimizer = torch.optim.SGD([parameter], lr=0.01, momentum=0.9)
    blueprint = Blueprint.of_gradients(optimizer, [("weight", parameter)])
    agent = Agent(world.crew, "worker", 60.0)
    join = Join(
        name=agent.name,
        host="here",
        fingerprint="cycle",
        steps_per_epoch=cycles,
        steps=cycles,
        epochs=None,
        blueprint=blueprint.plain(),
        facts={"out": None, "start": {}, "watching": {"quiet": True}},
    )
    client = agent.join(join, blueprint, as_plan(world.crew.plan).servers, torch.device("cpu"))
    client.replica.load({"weight": parameter.detach()})
    gradient, times = torch.full((ELEMENTS,), 0.001), []
    lease = agent.next_lease()
    while lease.lease >= 0:
        begin = time.perf_counter()
        agent.push({"weight": gradient}, [])
        agent.finish([], loss=0.0, count=1.0, rows=1, seconds=0.0)
        lease = agent.next_lease()
        times.append(time.perf_counter() - begin)
    agent.close()
    return times


def cycle(servers: int, cycles: int, replicas: int = 0) -> float:
    """Median seconds of a cycle."""
    topology = f"central(servers={servers}, replicas={replicas})"
    plan = as_plan(f"data(1, topology={topology}, sync=asp)")
    times: list[float] = launch_with_roles(functools.partial(work, cycles), plan, threads=1)
    return harness.quartiles(times[WARM:])[1]


def bare(servers: int, quick: bool) -> float:
    """Median seconds in which bare ZeroMQ moves 20 MB there and 20 MB back, the better way."""
    with tempfile.TemporaryDirectory() as folder:
        measure = functools.partial(push_pull.measure, str(Path(folder)), quick)
        found: dict[str, Any] = af.launch(measure, workers=1 + servers, threads=1)
    return sum(
        min(harness.quartiles(course[name][0].wall_s)[1] for name in ("bare", "bare pieces"))
        for course in found.values()
    )


def main() -> None:
    options = harness.parse_options(__doc__)
    rounds, cycles = (1, 10) if options.quick else (3, CYCLES)
    told = []
    for servers in (1, 2):
        pairs = [(bare(servers, options.quick), cycle(servers, cycles)) for _ in range(rounds)]
        where = f"{servers} server{'s' if servers > 1 else ''}"
        told.append(
            harness.figure(
                f"an update of 20 MB through {where}: bytes per second over bare ZeroMQ's",
                [seconds / ours for seconds, ours in pairs],
                target=0.8,
                better="higher",
                floor=f"{harness.milliseconds([ours for _, ours in pairs])} with the step, and "
                f"{harness.milliseconds([seconds for seconds, _ in pairs])}",
            )
        )
    kept = [(cycle(2, cycles), cycle(2, cycles, replicas=1)) for _ in range(rounds)]
    told.append(
        harness.figure(
            "an update of 20 MB through 2 servers: time with a copy of each shard over without",
            [with_copies / plain for plain, with_copies in kept],
            floor=f"{harness.milliseconds([each for _, each in kept])} and "
            f"{harness.milliseconds([each for each, _ in kept])}",
        )
    )
    harness.report("server_cycle", told, options)


if __name__ == "__main__":
    main()
