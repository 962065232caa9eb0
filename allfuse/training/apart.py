"""A group of ranks that a scheduler hands work to: from lease to lease, instead of step to step.

Rank 0 of the group talks to the scheduler and the servers; the other ranks hear from it, so that
all follow one decision.

The course of a lease, for weights of B bytes and a group of m ranks:
  1. the lease and its weights come (B received by rank 0, then B broadcast inside the group);
  2. the group works through the lease's steps: one, whose gradient goes to the servers instead of
     an optimizer here; or `every` of them, after which what they changed goes there;
  3. the update goes out in pieces (B sent by rank 0), and the group asks for the next lease.

Under `delay=d` a site hands its update in d steps before a lease ends, and goes on: what comes of
it is mixed with what it has come to when the next lease begins. Those of the last lease are all in.

Under `fragments=k` a lease is from the step where one fragment of the weights is due to that of the
next. Its update is of that one alone (B / k), of which newer weights are taken in then; the others
are what the site has come to. The last leases bring all.

Where ranks share the model, each brings the servers what it has, and gets what it needs from them:
B is less by as much; see following.py.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import socket
import time
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from allfuse.base.errors import PlanError, UserError
from allfuse.job import check_whole
from allfuse.plan import Site
from allfuse.roles.agent import Agent
from allfuse.roles.limb import Limb
from allfuse.roles.messages import Join, Lease
from allfuse.roles.replica import Replica
from allfuse.roles.rotation import ALL
from allfuse.roles.terms import terms_of
from allfuse.store.run import RunFolder, is_run
from allfuse.training.following import Following
from allfuse.training.holdings import Holdings, make_blueprint
from allfuse.training.keeper import decide_resume
from allfuse.training.leased import LeasedCourse
from allfuse.training.outflow import Outflow
from allfuse.training.rounds import OWN_SHARE
from allfuse.training.worker_part import (
    WorkerPart,
    hand_on,
    names_of,
    restore,
    unsaved_buffers,
)

if TYPE_CHECKING:
    import threading

    import torch
    from torch import Tensor

    from allfuse.base.events import Bus, Event
    from allfuse.launcher.crewmate import Crewmate
    from allfuse.roles.blueprint import Blueprint
    from allfuse.roles.client import Client
    from allfuse.roles.hand import Hand
    from allfuse.split.base import Split
    from allfuse.training.learner import Learner
    from allfuse.training.place import Place
    from allfuse.training.state import State
    from allfuse.training.step import Step

TOLD = ("evaluated", "saved", "not_saved", "note", "warning")
"""Events that the scheduler is told of; steps it counts itself."""


class Apart:
    """A group's side of the scheduler and the servers.

    Attributes:
        facts: what the run is to be told of by the first group that comes.
        export_to: the folder of a run that this group has joined.
        prepare: called with the work that comes next, whose weights are still on their way.
        lease: what the group works on; its number is -1 at the end. None before the first.
        capture: gives the state of the session.
        link: between groups, for people.
    """

    link: ClassVar[str] = "servers"
    steps_one: ClassVar[str] = "servers step one optimizer"

    def __init__(self, place: Place, bus: Bus) -> None:
        outer, crew = place.whole.outer, place.world.crew
        assert outer is not None, "a plan whose ranks are all in step"
        assert crew is not None, "a place without a scheduler"
        self.place, self.outer = place, outer
        self.terms = terms_of(place.whole, place.world.timeout_s)
        self.facts: dict[str, Any] = {}
        self.lease: Lease | None = None
        self.export_to: str | None = None
        self.capture: Callable[[], dict[str, Any]] = dict
        self.replica: Replica | None = None
        self.leads, self.is_of_first = place.rank == 0, place.rank < place.plan.replica_size
        self._agent: Agent | None = None
        if self.leads:
            host = socket.gethostname()
            name, asked = f"worker {crew.index} on {host}", place.world.stop_requested
            self._agent = self._make_agent(crew, name, place.world.timeout_s, asked)
            bus.subscribe(self._tell, TOLD)
        self._following = Following(place, self._agent)
        if self._agent is not None:
            self._agent.waiting = self._following.hold_on
        self._options: Callable[[], list[dict[str, Any]]] = list
        self._loss = self._count = self._begin_s = 0.0
        self._rows = self._done_before = self._steps_done = 0
        self._clip: float | None = None
        self._clips_here = False
        self._fragments: int = getattr(outer, "fragments", 1)
        self._delay: int = getattr(outer, "delay", 0)
        self._limit: int | None = None
        self._is_handed_in = False
        self._outflow: Outflow | None = None
        self.prepare: Callable[[Lease], None] = lambda lease: None
        self._saved: int | None = None
        self._is_scored = False
        self._steps_per_epoch = 1

    def _make_agent(
        self, crew: Crewmate, name: str, timeout_s: float, asked: threading.Event
    ) -> Agent:
        return Agent(crew, name, timeout_s, asked)

    @property
    def is_over(self) -> bool:
        return self.lease is not None and self.lease.lease < 0

    @property
    def pushes_gradients(self) -> bool:
        """Whether a lease is one step, whose gradient is pushed."""
        return not isinstance(self.outer, Site)

    @property
    def last_loss(self) -> float:
        """Of the newest batches of the run, once it is over; NaN before, and where none had
        samples."""
        loss = self.lease.loss if self.lease is not None and self.is_over else None
        return math.nan if loss is None else loss

    # Begin.

    def clip_here(self, largest: float | None) -> float | None:
        """What of clipping this group does by itself: not where it is the gradient that all groups
        make together, whose norm the servers find."""
        if self.pushes_gradients and self.terms.in_step:
            self._clip = largest
            return None
        self._clips_here = largest is not None
        return largest

    def take_over(
        self,
        learner: Learner,
        before: Callable[[], None],
        after: Callable[[], None],
    ) -> None:
        """Have the step of an optimizer push its gradients; servers step instead."""
        if learner.precision.scaler is not None:
            raise UserError(
                f"precision fp16 under {self.outer}: its loss scaling would have to stop servers "
                "from stepping; allowed: bf16, fp32"
            )
        if not self.pushes_gradients:
            return
        if self.is_of_first:
            self._outflow = Outflow(learner, self._push)

        def push(optimizer: torch.optim.Optimizer, closure: None = None) -> None:
            before()
            if self._outflow is not None:
                self._outflow.rest()
            after()

        vars(learner.optimizer)["step"] = types.MethodType(push, learner.optimizer)
        vars(learner.optimizer)["_opt_called"] = True  # what schedulers of torch look for

    def refuse_global_statistics(self, has_norms: bool, batch_statistics: str) -> None:
        """Statistics of a batch cannot meet where its parts are worked on apart.

        Raises:
            PlanError: the plan would be exact, and BatchNorm keeps it from that.
        """
        whole = self.place.whole
        if has_norms and batch_statistics == "global" and whole.promise == "exact":
            raise PlanError(
                str(whole),
                "BatchNorm would need the statistics of the whole batch, whose parts meet at the "
                'servers only; with batch_statistics="local" each worker takes its own',
                f"data({whole.workers})",
            )

    def course(self, *about: Any) -> LeasedCourse:
        """What takes a session from lease to lease; `about` as for `Course`."""
        return LeasedCourse(self, *about)

    def outline(self, state: State) -> None:
        """Take down what is held in common, of models that are whole still.

        Raises:
            UserError: several optimizers, or one that servers cannot step.
        """
        if len(state.learners) != 1:
            raise UserError(
                f"{self.place.whole}: {self.steps_one}, and the session has "
                f"{len(state.learners)}; next: a plan in step"
            )
        learner = state.learners[0]
        self.facts["parameters"] = names_of(learner, state.names())
        self._blueprint = make_blueprint(self.outer, state, learner, in_step=self.terms.in_step)

    def begin(
        self, state: State, split: Split, *, steps_per_epoch: int, steps: int | None,
        epochs: int | None, fingerprints: Mapping[str, str],
    ) -> None:  # fmt: skip
        """Join, and wait for the first lease and weights.

        Args:
            split: how the model lies on the ranks of the group, by now.
        """
        learner = state.learners[0]
        self._steps_per_epoch = steps_per_epoch
        limits = [steps, None if epochs is None else epochs * steps_per_epoch]
        self._limit = min((limit for limit in limits if limit is not None), default=None)
        out, inner = self.facts.get("out"), not self.pushes_gradients
        resumes = decide_resume(self.facts.get("resume", False), out)
        if out is not None and resumes and is_run(out):
            restore(state, learner, Path(out), inner, split.pieces())
        self.holdings = holdings = Holdings(self.place, state, self._blueprint, split)
        blueprint, names = holdings.blueprint, [held.name for held in self._blueprint.tensors]
        unsaved = holdings.whole(unsaved_buffers(state, names) if resumes else ())
        self.facts["unsaved"] = list(unsaved)
        self._following.shares_model = self.place.mates.size > 1
        if self.is_of_first:
            digest = hashlib.sha256(repr(sorted(fingerprints.items())).encode()).hexdigest()[:16]
            join = Join(
                name=self._following.share_name("" if self._agent is None else self._agent.name),
                host=self.place.world.host_identity(),
                fingerprint=f"{digest}-{blueprint.digest}",
                steps_per_epoch=steps_per_epoch,
                steps=steps,
                epochs=epochs,
                blueprint=blueprint.plain(),
                facts=self.facts,
                clip=self._clip,
                tensors=tuple(buffer.detach().cpu().clone() for buffer in unsaved.values()),
            )
            client = self._take_part(join, blueprint)
            client.own_share = OWN_SHARE if self._delay else 0.0
            self.replica = client.replica
        else:
            rank = self.place.mates.rank
            self.replica = Replica(blueprint, self.terms.servers, self.place.device, rank)
        self.replica.load(holdings.own)
        holdings.lay(self.replica.tensors)
        self._part = WorkerPart(state, learner, names, inner)
        if self.pushes_gradients:
            self._options = lambda: blueprint.changed_options(learner.optimizer)
        elif self._fragments > 1:
            self._options = lambda: self._options_of_change(blueprint)
        self._next()

    def _take_part(self, join: Join, blueprint: Blueprint) -> Client:
        """Be a worker, or one of the ranks that share its model."""
        place, servers = self.place, self.terms.servers
        if self._agent is not None:
            return self._agent.join(join, blueprint, servers, place.device)
        crew = place.world.crew
        assert crew is not None
        limb = Limb(crew, join, blueprint, servers, place.mates.rank, place.device)
        self._following.limb = limb
        assert limb.client is not None
        return limb.client

    @property
    def _hand(self) -> Hand | None:
        """What brings servers what this rank has."""
        return self._agent or self._following.limb

    def _options_of_change(self, blueprint: Blueprint) -> list[dict[str, Any]]:
        """Those of the servers' step by what the last update of a site brings: a fragment that is
        not due is averaged, without a step of the outer optimizer, which belongs to a whole
        round."""
        lease = self.lease
        if lease is None or lease.fragment != ALL:
            return []
        due, share = lease.clock % self._fragments, 1.0 if self.terms.in_step else 1 / self.outer.n
        plain = {"lr": share, "momentum": 0.0, "nesterov": False}
        return [
            {name: plain[name] for name in group.options if group.fragment != due}
            for group in blueprint.groups
        ]

    # From lease to lease.

    def count(self, step: Step) -> None:
        """Add a step of the lease to what is told of it."""
        portion, figures = step.portion, step.figures
        assert portion is not None
        self._rows += sum(portion.shares)
        if figures is not None:
            self._loss += sum(figures.losses)
            self._count += figures.total

    def after_step(self, done: int) -> None:
        """So many steps of the lease are done: hand the update in where that is due, and after the
        last one wait for the next lease."""
        lease = self.lease
        assert lease is not None
        delay = 0 if lease.fragment == ALL and self._fragments > 1 else self._delay
        if done == steps_until_handed_in(lease, delay, self._limit):
            self._hand_in()
        self._steps_done = done
        if done == lease.steps:
            self._next()

    def _hand_in(self) -> None:
        if self._outflow is not None:
            self._outflow.forget()
        assert self.lease is not None
        self._collect(self.lease.fragment)
        if self._hand is not None:
            self._hand.finish(
                self._options(),
                loss=self._loss,
                count=self._count,
                rows=self._rows,
                seconds=time.monotonic() - self._begin_s,
            )
            self._hand.is_awaited = True
        self._is_handed_in = True
        self._begin_count()

    def _collect(self, fragment: int = ALL) -> None:
        """What was learned is to travel: of a fragment, or all."""
        self.holdings.collect(fragment)

    @property
    def outflow(self) -> Outflow | None:
        """What takes gradients while backward runs: where no norm is to be known before."""
        return None if self._clips_here else self._outflow

    def _push(self, gradients: Mapping[str, Tensor], scale: float) -> None:
        assert self._hand is not None
        names = self.holdings.pushes
        own = {names[name]: value for name, value in gradients.items() if name in names}
        if own:
            self._hand.push(own, self._options(), scale)

    def _next(self) -> None:
        """The next lease and its weights, on all ranks of the group."""
        before = self.lease
        if before is not None and self._has_others:
            self._collect()  # what has been learned since the update was handed in
        if self._agent is not None:
            self._agent.step = 0 if self.lease is None else self.lease.done
            work = self._agent.next_work()
            if work is not None and self.place.everyone.size == 1:
                self.prepare(work)  # while its weights travel
        self.lease = self._following.next_lease()
        self._begin_lease(before)
        assert self.replica is not None
        self.holdings.spread(self.replica.live, "spread the weights of a lease")

    def _begin_lease(self, before: Lease | None) -> None:
        assert self.lease is not None
        self._done_before = self.lease.done if before is None else before.done
        self._begin_s = time.monotonic()
        self._steps_done = 0
        if self._hand is not None:
            self._hand.is_awaited = False
        if not self._is_handed_in:  # else steps that came after are told with the next update
            self._begin_count()
        self._is_handed_in = False

    def _begin_count(self) -> None:
        self._loss, self._count, self._rows = 0.0, 0.0, 0

    @contextlib.contextmanager
    def as_sent(self) -> Iterator[None]:
        """The weights as the servers sent them last, for a moment, where a site has others: not
        while new ones come in."""
        if not self._has_others or self.lease is None or self.is_over or self._is_handed_in:
            yield
            return
        assert self.replica is not None
        with self.holdings.shown(self.replica):
            yield

    @property
    def _has_others(self) -> bool:
        """Whether a site has other weights than the servers sent last, and keeps some of them."""
        return self._delay > 0 or self._fragments > 1

    def is_due(self, every: int | str | None) -> bool:
        """Whether what is done every so many steps, or every "epoch", falls to this group now.

        What the scheduler was told of falls to one group; what only a script knows of, to each.
        Once for a lease, before its first step.
        """
        lease = self.lease
        if lease is None or every is None or self._steps_done:
            return False
        kinds = [kind for kind in ("evaluate", "save") if self.facts.get(f"{kind}_every") == every]
        if kinds:
            return any(kind in lease.due for kind in kinds)
        if every != "epoch":
            check_whole("due", "every", every)
        steps = self._steps_per_epoch if every == "epoch" else int(every)
        return lease.done // steps > self._done_before // steps

    @property
    def finishes(self) -> bool:
        """Whether it falls to this group to export the model at the end."""
        return self.is_over and self.lease is not None and "finish" in self.lease.due

    @property
    def folder(self) -> RunFolder | None:
        """The run's folder; the scheduler holds it. None where it is out of reach."""
        out = self.facts.get("out") or self.export_to
        return RunFolder.open(out) if out is not None and is_run(out) else None

    def how_to_go_on(self) -> str:
        """Words for an error: where the run goes on."""
        out = self.facts.get("out")
        if out is None:
            return "there is no run folder, so nothing to go on from"
        how = "resume=True" if self.facts.get("job_file") is None else f"--resume {out}"
        return f"what the servers held is in a checkpoint in {out}: go on with {how}"

    def stop(self, reason: str) -> None:
        """Ask that no more work is handed out to anybody."""
        if self._agent is not None:
            self._agent.stop(reason)

    def save(self, score: float | None = None) -> None:
        """Have a checkpoint made: of the weights that this group was sent last, where a save or an
        evaluation was due, else of the next version. Once for each lease.

        Raises:
            CheckpointError: the session holds something that cannot be saved.
        """
        lease, has_folder = self.lease, bool(self.facts.get("out") or self.export_to)
        if lease is None or lease.sequence < 0 or not has_folder:
            return
        if not self.is_of_first:
            return
        is_scored = score is not None
        if lease.lease != self._saved or (lease.lease < 0 and is_scored > self._is_scored):
            self._saved, self._is_scored = lease.lease, is_scored
            messages = self._part.hand_in(
                self.capture(), sequence=lease.sequence, done=lease.done, score=score
            )
            for message in hand_on(messages, self.place.mates, self.place.device):
                if self._agent is not None:
                    self._agent.save(message)

    def note(self, name: str, state: dict[str, Any]) -> None:
        """Hand a state on to the group that needs it next."""
        if self._agent is not None and self.lease is not None and _is_plain(state):
            self._agent.note(name, state, self.lease.done)

    def _tell(self, event: Event) -> None:
        assert self._agent is not None
        if _is_plain(dict(event.data)):
            self._agent.tell(event.name, dict(event.data))

    def close(self) -> None:
        if self._outflow is not None:
            self._outflow.shut()
        if self._hand is not None:
            self._hand.close()


def steps_until_handed_in(lease: Lease, delay: int, limit: int | None) -> int:
    """After how many of a lease's steps its update is handed in.

    limit: steps of the whole run; those of its last block are all in their update.
    """
    is_last = limit is not None and lease.first_step + lease.steps >= limit
    return lease.steps if is_last else max(1, lease.steps - delay)


def _is_plain(value: object) -> bool:
    """Whether a value can travel in a letter's fields."""
    if isinstance(value, dict):
        return all(isinstance(k, str) and _is_plain(v) for k, v in value.items())
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str | bytes)
