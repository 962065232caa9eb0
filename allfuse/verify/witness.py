"""What the workers of a run with servers saw, written down for the comparison afterwards."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from allfuse.job import Job
from allfuse.store.tensorfile import read_tensors, write_tensors
from allfuse.training.loop import train_job
from allfuse.verify.layout import Layout
from allfuse.verify.record import LIMIT_BYTES

if TYPE_CHECKING:
    from allfuse.base.events import Event
    from allfuse.training.session import Session

END = "end"


def train_watched(job: Job, device: str | None, folder: Path, updates: int) -> bool:
    """Train in a worker of a crew, and write down what it sees.

    Args:
        updates: how many there will be, of all workers together.
    """
    witness = Witness(folder, updates)
    result = train_job(job, device=device, prepare=witness.attach)
    held = {n: v for n, v in result.weights.items() if v.is_floating_point()}
    write_tensors(weights_path(folder, END, witness.rank), held, {})
    return True


class Witness:
    """Writes down a worker's loss and gradient norm of every step, and the weights that it got for
    each lease, or for every so many where all of them would be more than `LIMIT_BYTES`."""

    def __init__(self, folder: Path, updates: int) -> None:
        self.folder, self.updates = folder, updates
        self.rank = -1
        self._lease: Any = None
        self._every = 0

    def attach(self, session: Session) -> None:
        """Watch a session from its first step on."""
        self.session = session
        place = session.place
        assert place.world.crew is not None
        self._ranks = place.plan.workers
        self.rank = place.world.crew.index * self._ranks + place.rank
        session.stepper.always_norm = True
        session.on("step", lambda _, event: self._see(event))

    def _see(self, event: Event) -> None:
        apart = self.session.apart
        assert apart is not None
        assert apart.lease is not None
        if apart.lease is not self._lease:
            self._lease = apart.lease
            self._keep_weights()
        line = {
            "lease": self._lease.lease,
            "loss": event.data["loss"] if event.data["samples"] else None,
            "norm": event.data["grad_norm"],
        }
        with open(self.folder / f"steps-{self.rank}.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")

    def _keep_weights(self) -> None:
        """Those that came for the lease, whatever its steps have made of them since.

        Ranks of a model that is cut write what they have of it. Those that heard of weights from
        another rank have kept those that no step changes.
        """
        apart = self.session.apart
        assert apart is not None
        replica = apart.replica
        if replica is None:  # weights of its own, which its losses and norms tell of
            return
        blocks, read = replica.blueprint.blocks, dict[str, Tensor]()
        for block, flat, live in zip(blocks, replica.read, replica.live, strict=True):
            if (apart.is_of_first or flat is live) and replica.rank in block.ranks:
                read |= block.views(flat)
        if not self._every:
            each = sum(block.bytes for block in blocks) * self._ranks
            limit = min(LIMIT_BYTES, shutil.disk_usage(self.folder).free / 2)
            self._every = max(1, math.ceil(self.updates * each / limit))
        if self._lease.lease % self._every == 0:
            path = weights_path(self.folder, str(self._lease.lease), self.rank)
            write_tensors(path, {name: tensor.detach().cpu() for name, tensor in read.items()}, {})


@dataclass
class Seen:
    """What was written down: of each lease and rank, loss and norm of each step.

    layout: how servers held the weights, and so each rank, of `each` in a group; None: whole.
    """

    folder: Path
    figures: dict[int, dict[int, list[tuple[float | None, float | None]]]] = field(
        default_factory=dict
    )
    layout: Layout | None = None
    each: int = 1

    @classmethod
    def read(cls, folder: Path) -> Seen:
        seen = cls(folder)
        for path in sorted(folder.glob("steps-*.jsonl")):
            rank = int(path.stem.removeprefix("steps-"))
            for line in path.read_text().splitlines():
                told = json.loads(line)
                pair = (_number(told["loss"]), _number(told["norm"]))
                seen.figures.setdefault(told["lease"], {}).setdefault(rank, []).append(pair)
        return seen

    def weights(self, moment: str) -> dict[int, Any]:
        """What each rank had, as far as it was kept; of ranks that shared a model the first what
        all had. moment: a lease's number, or "end"."""
        found = {}
        for path in sorted(self.folder.glob(f"weights-{moment}-*.safetensors")):
            found[int(path.stem.rpartition("-")[2])] = read_tensors(path)
        return self._joined(found) if self.layout is not None and self.layout.is_cut else found

    def _joined(self, found: dict[int, dict[str, Tensor]]) -> dict[int, dict[str, Tensor]]:
        assert self.layout is not None
        merged: dict[int, dict[str, Tensor]] = {}
        for rank in sorted(found, reverse=True):
            merged.setdefault(rank // self.each * self.each, {}).update(found[rank])
        return {rank: self.layout.join(held) for rank, held in merged.items()}


def weights_path(folder: Path, moment: str, rank: int) -> Path:
    return folder / f"weights-{moment}-{rank}.safetensors"


def _number(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else value
