"""A model that several ranks hold together."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from allfuse.base.errors import PlanError, UserError
from allfuse.base.units import format_count
from allfuse.link import Link
from allfuse.plan import Pipe, Plan, Shard
from allfuse.plan import Tensor as TensorAxis
from allfuse.split.assembly import Assembly, Held
from allfuse.split.base import Run
from allfuse.split.compiled import blocks_to_compile, compile_blocks, keep_uncompiled
from allfuse.split.piece import Piece, whole_piece
from allfuse.split.pipe.absent import guard
from allfuse.split.pipe.choice import Trial
from allfuse.split.pipe.cutting import PipePlan
from allfuse.split.pipe.timing import Autocast
from allfuse.split.recompute import recompute_blocks, repeated_blocks
from allfuse.split.record import record
from allfuse.split.request import NO_WISHES, Request
from allfuse.split.shard.blocks import find_blocks
from allfuse.split.shard.gather import Block
from allfuse.split.shard.rows import shard_piece
from allfuse.split.shard.sharding import Stages, shard_model
from allfuse.split.tensor.attention import unfold_attention
from allfuse.split.tensor.cut import Cut
from allfuse.split.tensor.search import TensorPlan, find_cuts
from allfuse.split.tensor.slicing import slice_model
from allfuse.split.tensor.traffic import Slice
from allfuse.split.whole import Whole


class Parted(Whole):
    """Cuts a model as the split axes of a plan say.

    Args:
        rank: of this rank in the plan.
        mates: a link to all ranks of the replica, this one among them.
        tensor: a link to those that share its layers.
        pipe: a link to those that have its other stages.
        shard: a link to those that have other rows of what it has.
    """

    cuts = True

    def __init__(
        self,
        plan: Plan,
        rank: int,
        mates: Link,
        *,
        tensor: Link,
        pipe: Link,
        shard: Link,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.device, self.slice = device, Slice(tensor)
        self._blocks: list[Block] = []  # that are brought together
        axis = plan.axis("shard")
        offloads = isinstance(axis, Shard) and axis.offload
        self.home = torch.device("cpu") if offloads else None  # of rows; None: where they are used
        self.meet_mates(plan, rank, mates, tensor=tensor, pipe=pipe, shard=shard)
        self._users: dict[str, tuple[int, ...]] = {}  # coordinates of the stages that need a tensor
        self.held: dict[str, Held] = {}
        self.kept: list[str] = []  # what the state dict of the plain model names
        self.first_names: dict[str, str] = {}  # of tensors that have several

    def cut(
        self,
        model: nn.Module,
        runs: Sequence[tuple[int, Run]],
        request: Request = NO_WISHES,
        autocast: Autocast = contextlib.nullcontext,
        trial: Trial | None = None,
    ) -> dict[str, str]:
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors_of(model).items()}
        self.kept = [name for name in model.state_dict() if name in shapes]
        choices = {}
        cuts = TensorPlan(self.slice.n)
        if self.slice.n > 1:
            unfold_attention(model)
        recording = (
            record(model, runs[0][1], str(self.plan)) if self.slice.n * self.pipe.size > 1 else None
        )
        if self.slice.n > 1 and recording is not None:
            keep, also = request.kept(model), request.also(model)
            cuts = find_cuts(recording, self.slice.n, keep, also)
            self._refuse_uncut(cuts)
            self.sliced = frozenset(cuts.cuts)
            choices["tensor"] = _tell(cuts, model)
        names = self.first_names = self._by_first_name(model)
        axis, stages = self.plan.axis("pipe"), None
        if self.pipe.size > 1 and recording is not None and isinstance(axis, Pipe):
            here = {value: self._size_here(cut) for value, cut in cuts.values.items()}
            stages = PipePlan(
                axis,
                model,
                recording,
                runs,
                pieces=here,
                autocast=autocast,
                trial=trial,
                recompute=request.recompute,
            )
            self.begins = stages.choice.begins
            self._users = stages.users
            choices["pipe"] = stages.tell()
        begins = () if stages is None else stages.begins
        compiled = blocks_to_compile(model, begins) if request.compile else []
        meeting = slice_model(model, cuts, self.slice) if self.slice.n > 1 else []
        if compiled:
            keep_uncompiled(meeting)
            compile_blocks(model, compiled)
            choices["compile"] = f"{len(compiled)} blocks are compiled, each by itself"
        if self.shard.size > 1 or self.home is not None:
            held = (name for name, _ in model.named_parameters() if self._is_here(name))
            self.sliced = frozenset(held)
            choices["shard"] = self._shard(model, runs[0][1], request, autocast, stages)
        for name, tensor in tensors_of(model).items():
            rows = self.shard.size if isinstance(tensor, nn.Parameter) else 1
            pieces = tuple(
                self._piece(cuts, names[name], shapes[name], place, rows) for place in self.places
            )
            self.held[name] = Held(tensor.dtype, pieces)
        if request.recompute:
            recompute_blocks(model, begins)
        if stages is not None:
            self.pipeline = stages.build(model, self.pipe, self.device)
            drop([tensor for name, tensor in tensors_of(model).items() if not self._has(name)])
            guard(model, self._users, self.pipe.rank, str(axis))
        return choices

    def meet_mates(
        self, plan: Plan, rank: int, mates: Link, *, tensor: Link, pipe: Link, shard: Link
    ) -> None:
        self.plan, self.mates = plan, mates
        self.places = [plan.coordinates(member) for member in plan.replica(rank)]
        self.slice.link, self.pipe, self.shard = tensor, pipe, shard
        for block in self._blocks:
            block.link = shard
        if self.pipeline is not None:
            self.pipeline.meet_mates(pipe)

    def _size_here(self, cut: Cut) -> tuple[int, int]:
        """The dim that a cut is along, and the size of this rank's piece in it."""
        runs = cut.runs(self.slice.n, self.slice.index)
        return cut.dim, sum(stop - start for start, stop in runs)

    def _has(self, name: str) -> bool:
        return self.held[name].pieces[self.mates.rank] is not None

    def _refuse_uncut(self, cuts: TensorPlan) -> None:
        if cuts.uses:
            return
        axis = self.plan.axis("tensor")
        assert isinstance(axis, TensorAxis)
        why = [f"{name or 'the model'}: {reason}" for name, reason in cuts.whole.items()]
        raise PlanError(
            str(axis),
            f"no layer of the model can be cut into {axis.n} slices"
            + (f" ({'; '.join(why[:3])})" if why else ""),
            f"data({axis.n})",
        )

    def _is_here(self, name: str) -> bool:
        """Whether a stage of this rank needs a parameter or buffer, given by its first name."""
        return self.pipe.rank in self._users.get(name, (self.pipe.rank,))

    def _shard(
        self,
        model: nn.Module,
        run: Run,
        request: Request,
        autocast: Autocast,
        stages: PipePlan | None,
    ) -> str:
        """Keep this rank's rows of all parameters that it has; what was chosen, in words."""
        try:
            recording = record(model, run)
        except UserError:  # then nobody knows which modules run as one
            recording = None
        begins = [] if stages is None else stages.begins
        blocks = find_blocks(model, recording, self.sliced, begins)
        with autocast():
            shortened = torch.is_autocast_enabled(self.device.type)
        twice = repeated_blocks(model) if request.recompute else []
        made = self._blocks = shard_model(
            model,
            blocks,
            self.shard,
            shortened=shortened,
            twice=[name for name in twice if not any(b.startswith(f"{name}.") for b in begins)],
            home=self.home,
            stages=None if stages is None else self._own_stages(stages),
        )
        if request.compile:
            modules = dict(model.named_modules())
            outer = tuple(f"{name}." for name in repeated_blocks(model))
            keep_uncompiled(modules[name] for name in blocks if name.startswith(outer))
        largest = max((each.numbers for each in made if each.again), default=0)
        rest = sum(each.numbers for each in made if not each.again)
        return (
            f"{len(blocks)} blocks of up to {format_count(largest)} parameters are brought together"
            " when they run" + (f", {format_count(rest)} others for the whole step" if rest else "")
        )

    def _own_stages(self, stages: PipePlan) -> Stages:
        schedule, n = stages.axis.schedule, stages.axis.n
        own = [at for at in range(len(stages.stages)) if schedule.owner(at, n) == self.pipe.rank]
        uses = {at: stages.stages[at].parameters for at in own}

        def running() -> int | None:
            held = {} if self.pipeline is None else self.pipeline.stages
            return next((number for number, stage in held.items() if stage.active), None)

        return Stages(here=self.sliced, uses=uses, running=running)

    def _by_first_name(self, model: nn.Module) -> dict[str, str]:
        """The first name of each parameter and buffer, of which some have several."""
        first: dict[int, str] = {}
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            first.setdefault(id(tensor), name)
        return {name: first[id(tensor)] for name, tensor in tensors_of(model).items()}

    def _piece(
        self,
        cuts: TensorPlan,
        name: str,
        shape: tuple[int, ...],
        place: Mapping[str, int],
        rows: int,
    ) -> Piece | None:
        """What the rank at a place of the replica has of a tensor, whose rows so many share."""
        if place.get("pipe", 0) not in self._users.get(name, (place.get("pipe", 0),)):
            return None
        cut = cuts.cuts.get(name)
        if cut is None:
            piece = whole_piece(shape)
        else:
            piece = cut.lie(shape, cuts.n, place.get("tensor", 0))
        return shard_piece(piece, rows, place["shard"]) if rows > 1 else piece

    def count(self, model: nn.Module) -> int:
        names = [name for name, _ in model.named_parameters()]
        return sum(math.prod(self.held[name].whole) for name in names)

    # Gradients under a pipeline, which come to their end microbatch by microbatch.

    def watch(self, parameters: Sequence[Parameter], final: Callable[[int], None]) -> None:
        if self.pipe.size == 1:
            super().watch(parameters, final)
        elif self.pipeline is not None and self.shard.size == 1:  # rows come when all is done
            self.pipeline.finality.watch(parameters, final)

    def fuses(self, name: str) -> bool:
        shared = {} if self.pipeline is None else self.pipeline.shared
        return name not in shared or self.pipe.rank == shared[name][0]

    def spread(self, parameters: Mapping[str, Parameter]) -> None:
        if self.pipeline is not None:
            self.pipeline.spread(parameters)

    def level(self, model: nn.Module) -> None:
        if self.pipeline is not None:
            self.pipeline.level(dict(model.named_parameters()))

    # What the ranks of a replica settle among themselves.

    @property
    def answers(self) -> bool:
        here, axis = self.places[self.mates.rank], self.plan.axis("pipe")
        ends = not isinstance(axis, Pipe) or axis.teller == here["pipe"]
        return ends and not here.get("tensor", 0)

    def norm(self, gradients: Mapping[str, Tensor]) -> Tensor:
        rank = self.mates.rank
        own = [grad for name, grad in gradients.items() if self.held[name].counts(rank)]
        square = torch.zeros(1, dtype=torch.float64, device=self.device)
        if own:
            square += torch.nn.utils.get_total_norm(own).double().to(self.device) ** 2
        self.mates.all_reduce(square, "sum the squares of gradients").wait()
        return square.sqrt().squeeze(0)

    def strongest(self, numbers: Sequence[float]) -> list[float]:
        slots = torch.zeros(self.mates.size, len(numbers), dtype=torch.float64)
        slots[self.mates.rank] = torch.tensor(numbers, dtype=torch.float64)
        slots = slots.to(self.device)
        self.mates.all_reduce(slots, "agree in a replica").wait()
        largest: list[float] = slots.amax(0).tolist()
        return largest

    def pieces(self) -> dict[str, Piece | None]:
        own = {name: held.pieces[self.mates.rank] for name, held in self.held.items()}
        return {name: p for name, p in own.items() if p is None or p.own != p.whole}

    def whole(self, values: Mapping[str, Any]) -> dict[str, Any]:
        found = dict(values)
        for name in self.kept:
            found[name] = self.assemble(name, values.get(name))
        return found if self.mates.rank == 0 else {}

    def assemble(self, name: str, own: Tensor | None) -> Tensor | None:
        """All of a tensor on the first rank of the replica, from those that speak for a part of it;
        None elsewhere. All ranks ask, in the same order."""
        (found,) = self.assembly.gather({} if own is None else {name: own}, [name])
        return found.get(name)

    @property
    def assembly(self) -> Assembly:
        """What brings the tensors of the replica together."""
        return Assembly(self.held, self.mates, self.device)


def drop(tensors: Iterable[Tensor]) -> None:
    """Take the memory from tensors, which keep their shapes and types, and learn nothing."""
    for tensor in tensors:
        tensor.requires_grad_(False)
        tensor.data = torch.zeros((), dtype=tensor.dtype, device=tensor.device).expand(tensor.shape)


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by all their names; those too that are in no state dict."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return {**parameters, **dict(model.named_buffers(remove_duplicate=False))}


def _tell(cuts: TensorPlan, model: nn.Module) -> str:
    """The share of the parameters that is cut, in words."""
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    cut = sum(size for name, size in sizes.items() if name in cuts.cuts)
    total = max(sum(sizes.values()), 1)
    return (
        f"{cut / total:.1%} of {format_count(total)} parameters are cut into {cuts.n} slices, "
        f"{len(cuts.whole)} modules with maps stay whole"
    )
