"""Fusions over a network, on 4 emulated hosts of 100 Mbit/s: against the wire, and the clock.

a. `ring` over the floor of the wire, 2 (n-1)/n of the payload at the rate of a host. Frames and
   acknowledgements take 5 to 7 % of the rate, which no sum over TCP can have back.
b. 2 ranks on each host: `hierarchy` against a ring that goes host by host, a ring whose neighbours
   all sit on other hosts, and gloo's all_reduce; by the factors that their bytes predict.
c. what `charge` says, from constants that `probe` has measured here, against what it took.
d. what a fusion of 1 KB takes beside the transfers that it makes, for 2 ranks of one host.

a to c need root and iproute2, and are skipped elsewhere.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import harness
import hosts
import torch

import allfuse as af

HOSTS = 4
RATE, BYTES_PER_S = "100mbit", 100e6 / 8
WIRE_SIZES = (5_000_000, 20_000_000)  # bytes of float32, as all sizes here
CHARGED_SIZES = (100_000, 1_000_000, 5_000_000)
DEALT = "ring, ranks dealt over hosts"
LEVELS = {"hierarchy": 1.0, "ring": 7 / 6, DEALT: 7 / 3, "native": 7 / 6}
"""What a host sends, over what it sends with hierarchy: 8 ranks on 4 hosts."""

Times: TypeAlias = dict[str, list[float]]
"""Seconds of each round, by "size/name"."""


def measure(
    each: int, names: Sequence[str], sizes: Sequence[int], rounds: int, probes: bool
) -> dict[str, Any]:
    """Runs in each rank: what a fusion of each size takes by each name; the link's constants."""
    from allfuse.execute import plot, run, segments_of
    from allfuse.launcher.torchrun import join_torchrun
    from allfuse.link.probe import probe
    from allfuse.topology import Layout, Native

    world = join_torchrun(None)
    device = torch.device("cpu")
    link = world.link("benchmark", tuple(range(world.size)), device)
    found: dict[str, Any] = {"times": {}}
    if probes:
        begin = time.perf_counter()
        found["costs"] = probe(link, world.hosts(), device).numbers()
        found["probe_s"] = time.perf_counter() - begin

    def contender(name: str, block: torch.Tensor) -> Callable[[], None]:
        topology = topology_of(name)
        if isinstance(topology, Native):
            return lambda: link.all_reduce(block, name).wait()
        layout = Layout.of(world.size, each)
        if name == DEALT:  # a ring goes from one group to the next: here none holds two of a host
            layout = Layout(tuple(str(rank % each) for rank in range(world.size)))
        mine = plot(topology, layout, link.rank, 0, 0)
        return lambda: run(mine, link, block, name, segments_of(topology, block.nbytes))

    def meet() -> None:
        link.all_reduce(torch.zeros(1), "meet").wait()

    for size in sizes:
        block = torch.zeros(size // 4)
        turns = harness.interleave({name: contender(name, block) for name in names}, rounds, meet)
        found["times"] |= {f"{size}/{name}": turn.wall_s for name, turn in turns.items()}
    meet()
    world.close()
    return found


def topology_of(name: str) -> Any:
    from allfuse.plan import as_plan

    text = "ring" if name == DEALT else name
    return as_plan(f"site(2, topology={text})").axis("site").topology


def run_on_hosts(each: int, count: int = HOSTS, **arguments: Any) -> tuple[Times, dict[str, Any]]:
    """What each round took, until the last rank was done; and what the first rank says."""
    found = hosts.launch(
        "network:measure", {"each": each, **arguments}, hosts=count, each=each, timeout_s=500
    )
    times = {
        key: [max(turn) for turn in zip(*(rank["times"][key] for rank in found), strict=True)]
        for key in found[0]["times"]
    }
    return times, found[0]


def wire_figures(quick: bool) -> Iterator[harness.Figure]:
    sizes = CHARGED_SIZES[:1] if quick else WIRE_SIZES
    times, _ = run_on_hosts(
        1, names=["ring", "native"], sizes=sizes, rounds=2 if quick else 7, probes=False
    )
    for size in sizes:
        floor = 2 * (HOSTS - 1) / HOSTS * size / BYTES_PER_S
        gloo = statistics.median(times[f"{size}/native"]) / floor
        yield harness.figure(
            f"ring, {size / 1e6:g} MB on {HOSTS} hosts: time over the wire's floor",
            [took / floor for took in times[f"{size}/ring"]],
            target=1.10,
            floor=f"floor {floor * 1e3:.0f} ms; gloo's all_reduce {gloo:.3f}",
        )


def level_figures() -> Iterator[harness.Figure]:
    times, _ = run_on_hosts(2, names=list(LEVELS), sizes=WIRE_SIZES, rounds=5, probes=False)
    for size in WIRE_SIZES:
        ours = times[f"{size}/hierarchy"]
        for name, factor in list(LEVELS.items())[1:]:
            found = harness.ratios(times[f"{size}/{name}"], ours)
            yield harness.figure(
                f"{name}, {size / 1e6:g} MB on {HOSTS} hosts of 2 ranks: time over hierarchy's, "
                "off its formula by",
                [abs(ratio / factor - 1) for ratio in found],
                target=0.05,
                floor=f"{statistics.median(found):.3f} where {factor:.3f} is predicted; "
                f"hierarchy {harness.milliseconds(ours)}",
            )


def clock_figures(quick: bool) -> Iterator[harness.Figure]:
    from allfuse.charge import charge
    from allfuse.link.costs import Costs
    from allfuse.topology import TOPOLOGIES, Layout

    names = (
        ["native", "ring"] if quick else [*TOPOLOGIES, "tree(kind=double)", "central(servers=1)"]
    )
    sizes = CHARGED_SIZES[:1] if quick else CHARGED_SIZES
    for count in (2,) if quick else (2, HOSTS):
        rounds = 2 if quick else 5
        times, first = run_on_hosts(1, count, names=names, sizes=sizes, rounds=rounds, probes=True)
        costs, layout = Costs.from_numbers(first["costs"]), Layout.of(count, 1)
        errors = []
        print(f"{count} hosts, probed in {first['probe_s']:.2f} s: {costs.between}")
        for size in sizes:
            for name in names:
                said = charge(topology_of(name), layout, costs, size // 4).seconds
                took = statistics.median(times[f"{size}/{name}"])
                errors.append(abs(said / took - 1))
                print(f"{_line(size, name, said, took)}")
        yield harness.figure(
            f"{count} ranks on {count} hosts: charged against measured, mean absolute error",
            [statistics.mean(errors)],
            target=0.10,
            floor=f"{len(errors)} cases; largest {max(errors):.0%}",
        )


def _line(size: int, name: str, said: float, took: float) -> str:
    return (
        f"  {size / 1e6:5g} MB  {name:20} charged {said * 1e3:8.1f} ms  "
        f"measured {took * 1e3:8.1f} ms  {said / took - 1:+.1%}"
    )


def small(quick: bool) -> Mapping[str, list[float]]:
    """Runs in 2 ranks of one host: seconds of a fusion of 1 KB, and of its bare transfers."""
    from allfuse.fusion import Fuser, Fusion
    from allfuse.launcher import current_world
    from allfuse.topology.ring import Ring

    world = current_world()
    assert world is not None
    bare, owned, meeting = (
        world.link(name, (0, 1), torch.device("cpu")) for name in ("bare", "fuse", "meet")
    )
    fuser = Fuser(Fusion(topology=Ring()), owned)
    block, half, arrived = torch.zeros(256), torch.zeros(128), torch.zeros(128)
    calls = 5 if quick else 100

    def transfers() -> None:
        for _ in range(calls):
            for adds in (True, False):
                works = [bare.receive(arrived, 1 - bare.rank, "x")]
                works.append(bare.send(half, 1 - bare.rank, "x"))
                for work in works:
                    work.wait()
                if adds:
                    half.add_(arrived)

    def fusions() -> None:
        for _ in range(calls):
            fuser.start(block, "x").wait()

    def meet() -> None:
        meeting.all_reduce(torch.zeros(1), "meet").wait()

    contenders = {"fuser": fusions, "bare": transfers}
    harness.interleave(contenders, 1, meet)
    turns = harness.interleave(contenders, 2 if quick else 25, meet)
    meet()
    fuser.close()
    return {name: turn.each(calls).wall_s for name, turn in turns.items()}


def small_figure(quick: bool) -> harness.Figure:
    found = af.launch(small, quick, workers=2, threads=1)
    added = [(f - b) * 1e3 for f, b in zip(found["fuser"], found["bare"], strict=True)]
    return harness.figure(
        "1 KB, 2 ranks of one host: a fusion by ring over its bare transfers",
        added,
        target=0.2,
        unit="ms",
        floor=f"fusion {harness.milliseconds(found['fuser'])}, "
        f"transfers {harness.milliseconds(found['bare'])}",
    )


def main() -> None:
    options = harness.parse_options(__doc__)
    told = [small_figure(options.quick)]
    reason = hosts.why_not()
    if reason is None:
        with hosts.emulated(HOSTS, RATE):
            told += wire_figures(options.quick)
            if not options.quick:
                told += level_figures()
            told += clock_figures(options.quick)
    harness.report("network", told, options, [reason] if reason else [])


if __name__ == "__main__":
    main()
