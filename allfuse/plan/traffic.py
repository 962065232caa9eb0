"""What a plan sends from host to host."""

from __future__ import annotations

from allfuse.charge import host_shares
from allfuse.plan.axes import Data, Site
from allfuse.plan.plan import Plan
from allfuse.topology import Layout, Topology
from allfuse.topology.gossip import Gossip


def leaving_hosts(
    plan: Plan, axis: Data | Site, topology: Topology, payload_bytes: float, hosts: int
) -> list[int]:
    """Bytes that leave each host when an axis fuses so many bytes, in all its groups together.

    Ranks fill the hosts evenly, in order. Gossip is counted as in its first round.
    """
    found = [0.0] * hosts
    for peers in sorted({plan.peers(rank, axis.name) for rank in range(plan.workers)}):
        at = tuple(str(_host_of(plan, rank, hosts)) for rank in peers)
        if len(set(at)) > 1:
            for host, share in host_shares(topology, Layout(at)).items():
                found[int(host)] += share * payload_bytes
    return [round(count) for count in found]


def leaving_to_servers(plan: Plan, payload_bytes: float, hosts: int) -> list[int]:
    """Bytes that leave each host when every replica of a plan with servers pushes so many bytes and
    pulls as much: server s is on host s modulo their number, as under torchrun."""
    outer = plan.outer
    assert outer is not None, "a plan without servers"
    first = [index * plan.inner.workers for index in range(outer.n)]
    at = [_host_of(plan, rank, hosts) for rank in first]
    found = []
    for host in range(hosts):
        servers = len(range(host, plan.servers, hosts)) / plan.servers
        here = at.count(host)
        pushed, pulled = here * (1 - servers), (outer.n - here) * servers
        found.append(round((pushed + pulled) * payload_bytes))
    return found


def leaving_in_pairs(plan: Plan, payload_bytes: float, hosts: int) -> list[int]:
    """Bytes that leave each host when every replica of a plan out of step asks its first partner
    for the mean of both: so many go there, and as many come back."""
    outer = plan.outer
    assert outer is not None
    assert isinstance(outer.topology, Gossip), "a plan whose replicas do not gossip"
    at = [_host_of(plan, index * plan.inner.workers, hosts) for index in range(outer.n)]
    found = [0.0] * hosts
    for index in range(outer.n):
        other = outer.topology.partner(index, outer.n, 0, 0)
        if other is not None and at[other] != at[index]:
            found[at[index]] += payload_bytes
            found[at[other]] += payload_bytes
    return [round(count) for count in found]


def _host_of(plan: Plan, rank: int, hosts: int) -> int:
    return rank * hosts // plan.workers
