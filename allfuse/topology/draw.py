"""A topology as text: who sends what to whom, phase by phase."""

from __future__ import annotations

from allfuse.topology.base import Topology
from allfuse.topology.layout import Layout
from allfuse.topology.schedule import Phase, Schedule

WIDTH = 96  # characters of a line
PHASES = 24  # that are shown
PEERS = 128  # with more nobody reads a drawing, and a schedule may have millions of transfers


def draw(topology: Topology, layout: Layout) -> list[str]:
    """A head line, and a line or more for each phase, of up to `PEERS` peers.

    >>> from allfuse.topology.ring import Ring
    >>> for line in draw(Ring(), Layout.of(2)): print(line)
    ring, 2 peers: 2 phases, 2 chunks; the busiest peer sends 1 x the payload
      1 add      0.5 x  0>1 [0]  1>0 [1]
      2 copy     0.5 x  0>1 [1]  1>0 [0]
    """
    sent = topology.bytes_per_peer(layout, 1.0)
    hosts = len(layout.by_host)
    where = f"{layout.size} peers" + (f" on {hosts} hosts" if hosts > 1 else "")
    if layout.size > PEERS:
        return [
            f"{topology}, {where}: {_count(topology.phases(layout), 'phase')}; the busiest peer "
            f"sends {sent:.3g} x the payload",
            f"  not drawn: more than {PEERS} peers",
        ]
    schedule = topology.schedule(layout)
    lines = [
        f"{topology}, {where}: {_count(len(schedule.phases), 'phase')}, "
        f"{_count(schedule.chunks, 'chunk')}; the busiest peer sends {sent:.3g} x the payload"
    ]
    for number, phase in enumerate(schedule.phases[:PHASES], start=1):
        most = max(Schedule(schedule.peers, schedule.chunks, (phase,)).bytes_sent(1.0))
        lines += _draw_phase(number, phase, most)
    if len(schedule.phases) > PHASES:
        lines.append(f"  and {len(schedule.phases) - PHASES} more phases")
    return lines


def _draw_phase(number: int, phase: Phase, most: float) -> list[str]:
    """What the busiest peer sends, in payloads; the transfers, as many to a line as fit."""
    head = f"{number:3} {phase[0].op:<7}{most:5.3g} x"
    lines = [head]
    for src, dst, start, stop, _, weight in phase:
        chunks = f"[{start}]" if stop == start + 1 else f"[{start}-{stop - 1}]"
        share = f" x {weight:.3g}" if phase[0].op == "mix" else f" {chunks}"
        text = f"  {src}>{dst}{share}"
        if len(lines[-1]) + len(text) > WIDTH:
            lines.append(" " * len(head))
        lines[-1] += text
    return lines


def _count(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
