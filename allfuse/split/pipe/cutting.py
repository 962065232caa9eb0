"""Cuts a model into the stages of a pipeline: which rank has what, and what it computes."""

from __future__ import annotations

import contextlib
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from allfuse.base.tensors import leaves
from allfuse.link import Link
from allfuse.plan import Pipe
from allfuse.split.base import Run
from allfuse.split.pipe.choice import Trial, choose_stages, least_rows
from allfuse.split.pipe.courier import greet
from allfuse.split.pipe.pipeline import Pipeline
from allfuse.split.pipe.sizes import Scaled
from allfuse.split.pipe.stage import Stage
from allfuse.split.pipe.timing import Autocast
from allfuse.split.record import Recording, Ref, record
from allfuse.split.shapes import Shapes


class PipePlan:
    """How a model is cut into stages.

    Args:
        recording: of the first of the runs, before anything was cut.
        runs: forward passes over two numbers of rows.
        pieces: of values that each rank has only a piece of: the dim that is cut, its size here.
        autocast: what the model runs under.
        trial: how parts of the model are timed; None cuts by shapes.
        recompute: blocks will run again in the backward pass.

    Raises:
        PlanError: there are too few places where it can be cut; names them.
    """

    def __init__(
        self,
        axis: Pipe,
        model: nn.Module,
        recording: Recording,
        runs: Sequence[tuple[int, Run]],
        *,
        pieces: Mapping[int, tuple[int, int]] | None = None,
        autocast: Autocast = contextlib.nullcontext,
        trial: Trial | None = None,
        recompute: bool = False,
    ) -> None:
        self.axis, self.recording = axis, recording
        (few, run), (more, run_more) = runs
        self.choice = choose_stages(
            axis,
            model,
            recording,
            inside=pieces or {},
            trial=trial,
            autocast=autocast,
            recompute=recompute,
        )
        self.stages = self.choice.stages
        self.shapes = Shapes(
            recording,
            few,
            record(model, run_more),
            more,
            _find_dtypes(model, run, autocast),
            pieces,
        )
        self.users = self._find_users(model)

    def _find_users(self, model: nn.Module) -> dict[str, tuple[int, ...]]:
        """The ranks that need a parameter or buffer, by its first name.

        What no call takes is the first rank's. Buffers are with the passes through their module,
        where these are in one stage and give something learned; else everybody has them.
        """
        recording, stages = self.recording, range(len(self.stages))
        found = {}
        for name, _ in model.named_parameters():
            own = [at for at in stages if name in self.stages[at].parameters]
            found[name] = self._owners(own or [0])
        learned = recording.learned()
        begins = [stage.first.call for stage in self.stages if stage.first is not None]
        passes: dict[str, set[int]] = {}
        for visit in recording.visits:
            at = bisect_right(begins, visit.begin)
            end = begins[at] if at < len(begins) else len(recording.calls)
            given = {leaf.number for leaf in leaves(visit.result) if isinstance(leaf, Ref)}
            inside = visit.end <= end and given & learned
            passes.setdefault(visit.module, set()).update([at] if inside else stages)
        for name, _ in model.named_buffers():
            found[name] = self._owners(sorted(passes.get(name.rpartition(".")[0], stages)))
        return found

    def _owners(self, stages: Sequence[int]) -> tuple[int, ...]:
        schedule, n = self.axis.schedule, self.axis.n
        return tuple(sorted({schedule.owner(stage, n) for stage in stages}))

    @property
    def begins(self) -> list[str]:
        """The modules before which stages begin, but the first."""
        return [stage.first.module for stage in self.stages if stage.first is not None]

    def tell(self) -> str:
        """Where the stages begin, in words."""
        how = self.choice.how
        return f"{len(self.stages)} stages{how}; cut before {', '.join(self.begins)}"

    def build(self, model: nn.Module, link: Link, device: torch.device) -> Pipeline:
        """This rank's stages of a model, whose modules are changed in place."""
        keep_out_of_fast_path(model)
        schedule, n = self.axis.schedule, self.axis.n
        own = {
            number: Stage(model, stage, self.recording, device)
            for number, stage in enumerate(self.stages)
            if schedule.owner(number, n) == link.rank
        }
        names = [name for name, _ in model.named_parameters()]
        shared = {name: self.users[name] for name in names if len(self.users[name]) > 1}
        least, scaled = least_rows(model), Scaled(self.shapes)
        if device.type == "cuda":
            greet(link, device)
        pipeline = Pipeline(link, self.axis, own, len(self.stages), shared, scaled, model, least)
        model.register_forward_pre_hook(pipeline.enter, with_kwargs=True)
        model.register_forward_hook(pipeline.leave)
        return pipeline


def keep_out_of_fast_path(model: nn.Module) -> None:
    """torch's transformer layers compute in one call where nothing is differentiated, with the
    weights of modules that may be in another stage."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False


def _find_dtypes(model: nn.Module, run: Run, autocast: Autocast) -> list[torch.dtype]:
    """The types of all values, as the model runs."""

    def under(made: nn.Module) -> Any:
        with autocast():
            return run(made)

    return record(model, under).dtypes
