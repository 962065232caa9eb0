"""Where a rank stands: its world, its plan, its links on each axis and its device."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import torch

from allfuse.base.errors import PlanError
from allfuse.fusion import Fuser, Fusion, choose
from allfuse.fusion.auto import Auto, Notice, candidates, settled
from allfuse.launcher import World, current_world
from allfuse.launcher.base import await_word
from allfuse.plan import Data, Pipe, Plan, Shard, Site, as_plan, check_workers
from allfuse.plan.loss import refuse_survival, without_lost
from allfuse.topology import Layout
from allfuse.training.device import choose_device

if TYPE_CHECKING:
    from allfuse.base.errors import PeerLost
    from allfuse.launcher.generation import Lost
    from allfuse.link import Link


def find_world(plan_text: str | None) -> tuple[World, bool]:
    """The world that a launcher made, torchrun's, or a world of one; and whether it is new here."""
    world = current_world()
    if world is not None:
        return world, False
    from allfuse.launcher.torchrun import join_torchrun, started_by_torchrun

    if started_by_torchrun():
        return join_torchrun(plan_text), True
    from allfuse.launcher.alone import AloneWorld

    return AloneWorld(), True


class Place:
    """One rank's place in a plan.

    Attributes:
        data, site: links to the peers on those axes (a lone link where the plan has no such axis).
        data_fuser, site_fuser: what fuses over them.
        sharers: a link to all in step that this rank's site shares its part of a batch with.
        replicas: the same of all sites.
        mates: a link to the ranks that hold this replica's model together.
        everyone: a link to all ranks that are in step.
        team: a link to those who do each step together: the ranks of a site. Where nobody goes on
            after a loss, those of its data axis.
        index, parts: which of the replicas that divide the batch this rank belongs to.
        plan: of the ranks that are in step. whole: the plan of the job, which is the same where all
            are.
    """

    def __init__(
        self,
        plan: Plan | str | None,
        device: str | None,
        seed: int = 0,
        world: World | None = None,
    ) -> None:
        asked = None if plan is None else as_plan(plan)
        text = None if asked is None else str(asked)
        self.world, self._owns_world = (world, True) if world is not None else find_world(text)
        try:
            self._take_place(asked, device, seed)
        except BaseException as error:
            self.close(error)
            raise

    def _take_place(self, asked: Plan | None, device: str | None, seed: int) -> None:
        world = self.world
        text = world.plan if world.crew is None else world.crew.plan
        told = None if text is None else as_plan(text)
        if asked is not None and told is not None and asked != told:
            raise PlanError(
                f"session(plan={str(asked)!r})", f"the launcher was given {told}", "one of the two"
            )
        self.whole = asked or told or as_plan(f"data({world.size})")
        self.whole.validate_executable()
        if self.whole.outer is not None and world.crew is None:
            why = (
                "a scheduler and servers are started by `allfuse train`, `allfuse run`, af.train "
                "and torchrun, and this process was started otherwise"
            )
            raise PlanError(str(self.whole), why, f"data({self.whole.workers})")
        self.plan = self.whole.inner
        check_workers(self.plan, world.size)
        if world.size > 1 and world.crew is None:
            self._refuse_other_plan()
        self.device, self._seed = choose_device(device, world), seed
        self._refuse_offload()
        if world.goes_on:
            refuse_survival(self.plan, self.device.type)
        self.choices: dict[str, str] = {}
        self._sent_before = 0  # over links that were closed after a loss
        self._meet_peers()
        if world.has_process_groups and world.size > 1:
            backend = "nccl" if self.device.type == "cuda" else "gloo"
            world.form_replica(self.plan.replica(self.rank), backend)

    @property
    def home(self) -> torch.device:
        """Where the parameters of a model are, and their gradients."""
        shard = self.plan.axis("shard")
        offloads = isinstance(shard, Shard) and shard.offload
        return torch.device("cpu") if offloads else self.device

    @property
    def offloads(self) -> bool:
        """Whether that is not where the model runs."""
        return self.home != self.device

    def _refuse_offload(self) -> None:
        """Refuse what moves state between ranks over links of the device, where there is none.

        Raises:
            PlanError: names the axis.
        """
        axes = (axis for axis in self.whole.axes if isinstance(axis, Site | Pipe) and axis.n > 1)
        other = self.whole.outer or next(axes, None)
        if self.offloads and other is not None:
            why = (
                f"on {self.device.type} offload=true is not possible beside {other} in this version"
            )
            raise PlanError(str(self.whole), why, str(self.whole).replace(", offload=true", ""))

    def _meet_peers(self) -> None:
        """Take a rank's place in the plan, and links to its peers."""
        world, seed = self.world, self._seed
        self.rank, self.coordinates = world.rank, self.plan.coordinates(world.rank)
        self.index, self.parts = self.plan.replica_index(world.rank), self.plan.replicas
        self.data = self._link("data", "data")
        self.site = self._link("site", "site")
        self.data_fuser = self._fuser("data", self.data, seed)
        self.site_fuser = self._fuser("site", self.site, seed)
        self.tensor, self.shard = self._link("tensor", "tensor"), self._link("shard", "shard")
        self.pipe = self._link("pipe", "pipe")
        self.sharers = self._link_of("sharers", self.data, self.shard)
        self.replicas = self._link_of("replicas", self.sharers, self.site)
        self.mates = self._link_of("mates", self.tensor, self.pipe, self.shard)
        self.everyone = self.replicas
        if self.mates.size > 1:
            everyone = tuple(range(self.plan.workers))
            self.everyone = world.link("everyone", everyone, self.device)
        self.team = self.data
        if self.mates.size > 1 and world.goes_on:
            in_sites = self.site.size > 1
            self.team = self._link_of("team", self.data, self.mates) if in_sites else self.everyone

    def regroup(self, error: PeerLost | None) -> tuple[Lost, ...]:
        """Take a place among those that are left after a loss; who was lost. The links that were
        are closed; `meet_again` makes those to come.

        Raises:
            PeerLost: the others do not go on, or did not come.
        """
        self._sent_before += sum(link.sent_bytes for link in self.links)
        self._let_go()
        lost = self.world.regroup(error)
        self.whole = self.plan = without_lost(self.plan, self.world.size)
        self.world.plan = str(self.whole)
        return lost

    def meet_again(self) -> None:
        """Make links to those that are left. All do. Raises PeerLost."""
        had_statistics = vars(self).pop("statistics", None) is not None
        self._meet_peers()
        if had_statistics:
            assert self.statistics.size

    def _refuse_other_plan(self) -> None:
        """Scripts may differ from host to host, and codecs or rules that differ would not be felt.

        Raises:
            PlanError: the plan of rank 0 is another one.
        """
        world = self.world
        key = world.new_key("plan")
        if world.rank == 0:
            world.board.set(key, str(self.plan).encode())
            return
        first = await_word(
            world.board,
            key,
            rank=world.rank,
            peer=0,
            operation="compare plans",
            reason="did not say which plan it has",
            timeout_s=world.timeout_s,
        ).decode()
        if first != str(self.plan):
            why = f"rank {world.rank} was given this plan, and rank 0 {first}"
            raise PlanError(str(self.plan), why, first)

    def _fuser(self, name: str, link: Link, seed: int) -> Fuser:
        """What fuses over an axis. What runs beside the caller has a link of its own."""
        axis = self.plan.axis(name)
        if not isinstance(axis, Data | Site):
            return Fuser(Fusion(), link)
        fusion, why = choose(axis.rule, axis.topology, axis.sync, axis.codec, axis.n)
        if link.size == 1:
            return Fuser(fusion, link)
        hosts = self.world.hosts()
        # of the first group, for all: ranks of other groups that hold the same values must sum
        # them in the same order
        layout = Layout(tuple(hosts[member] for member in self.plan.peers(0, name)))
        topologies = candidates(fusion.rule, fusion.codec, axis.n)
        is_open = axis.topology is None and settled(layout, topologies) is None
        if why is not None and not is_open:
            self.choices[f"topology of {name}"] = why
        waits = not (isinstance(axis, Site) and axis.delay)
        if waits and not is_open and not Fuser(fusion, link).needs_own_link and not self.offloads:
            return Fuser(fusion, link)
        own = self._link(name, f"fuse {name}", self.home)
        if not is_open:
            return Fuser(fusion, own, layout, seed)
        notice = Notice(board=self.world.board, key=self.world.new_key(f"costs/{name}"), author=0)
        auto = Auto(
            own,
            layout,
            topologies,
            fusion.codec,
            self.home,
            notice=notice,
            leads=0 in link.members,
        )
        return Fuser(fusion, own, layout, seed, auto)

    def _link_of(self, name: str, *links: Link) -> Link:
        """To all ranks that differ from this one only on axes of some links."""
        several = [link for link in links if link.size > 1]
        if len(several) < 2:
            return several[0] if several else links[0]
        places = [self.plan.coordinates(rank) for rank in range(self.plan.workers)]
        free = {
            axis
            for axis in self.coordinates
            for link in several
            if len({places[member][axis] for member in link.members}) > 1
        }
        groups: dict[tuple[int, ...], list[int]] = {}
        for rank, place in enumerate(places):
            groups.setdefault(tuple(place[axis] for axis in place if axis not in free), []).append(
                rank
            )
        members = next(tuple(group) for group in groups.values() if self.rank in group)
        return self.world.link(name, members, self.device, sorted(map(tuple, groups.values())))

    def _link(self, axis: str, name: str, device: torch.device | None = None) -> Link:
        groups = {self.plan.peers(rank, axis) for rank in range(self.plan.workers)}
        members = self.plan.peers(self.rank, axis)
        return self.world.link(name, members, device or self.device, sorted(groups))

    @cached_property
    def statistics(self) -> Link:
        """A link of its own for batch statistics, of all models: their transfers come in between
        those of gradients, in an order that may differ from rank to rank."""
        if self.shard.size == 1:
            return self._link("data", "statistics")
        return self.world.link("statistics", self.sharers.members, self.device)

    @property
    def replica_index(self) -> int:
        """Which of all replicas this rank belongs to; of one that shares out its batch, which
        part of it has the same samples."""
        return self.rank // self.plan.replica_size * self.shard.size + self.shard.rank

    @property
    def links(self) -> list[Link]:
        """The links that there are by now, each once."""
        names = (
            "data",
            "site",
            "tensor",
            "pipe",
            "shard",
            "sharers",
            "replicas",
            "mates",
            "everyone",
            "team",
            "statistics",
        )
        made = [self.__dict__[name] for name in names if name in self.__dict__]
        made += [fuser.link for fuser in self.fusers]
        return list({id(link): link for link in made}.values())

    @property
    def fusers_by_axis(self) -> dict[str, Fuser]:
        """What fuses, by the name of its axis; while a place is taken some may be missing."""
        names = {"data": "data_fuser", "site": "site_fuser"}
        return {axis: vars(self)[name] for axis, name in names.items() if name in vars(self)}

    @property
    def fusers(self) -> list[Fuser]:
        return list(self.fusers_by_axis.values())

    @property
    def linked_by(self) -> str:
        """What moves the bytes between replicas, and between the ranks of one, for people."""
        several = [self.replicas, self.tensor, self.pipe, self.shard]
        kinds = [link.kind for link in several if link.size > 1]
        return ", ".join(dict.fromkeys(kinds)) or self.replicas.kind

    @property
    def sent_bytes(self) -> int:
        """What this rank has sent to its peers so far."""
        return self._sent_before + sum(link.sent_bytes for link in self.links)

    def close(self, error: BaseException | None = None) -> None:
        """Give links and a world of its own back; peers that wait are told of an error."""
        self._let_go()
        if self._owns_world:
            self.world.close(error)

    def _let_go(self) -> None:
        for fuser in self.fusers:
            fuser.close()
        for link in self.links:
            link.close()
