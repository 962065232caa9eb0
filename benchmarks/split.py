"""Plans that cut one model: a step against a script of torch's own APIs, memory per rank, bubble.

Step: both sides train the same decoder, cut in the same places, alive in the same processes and
taking turns of some steps, on this host, with 1 thread each. The scripts are what a person writes:
`parallelize_module` for tensor(2), `fully_shard` of each block and the whole for shard(2), for
data(2) * tensor(2) the former with gradients averaged over a group of its own, and
`Schedule1F1B` of as many microbatches for pipe(2).

Memory: the most that a rank has, from before its model is built to after its second step, over what
it had before; beside that of one process. The formula counts parameters, gradients and the two
moments of AdamW: 16 bytes for each parameter, of which a rank has its part.

Bubble: see `bubble.py`.
"""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bubble
import harness
import models
import torch
import torch.distributed as dist
import torch.nn.functional as F
from together import take_turns
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import allfuse as af
from allfuse.plan import as_plan

STEP_TARGET = 1.05
STEP_PLANS = ("shard(2)", "tensor(2)", "pipe(2)", "data(2) * tensor(2)")
MEMORY_PLANS = {"shard(4)": 0.30, "tensor(4)": 0.35, "pipe(4)": 0.35}
LAUNCHES = 2
SECONDS = 12.0  # in each launch
TURN_S = 0.5
STATE_BYTES = 16  # parameter, gradient, two moments


class Layer(nn.Module):
    """A transformer block whose projections are separate, as `ColwiseParallel` wants them."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.size = width // heads
        self.norm_attention, self.norm_hidden = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)
        self.hidden, self.back = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, C)
        y = self.norm_attention(x)
        q, k, v = (
            part(y).unflatten(-1, (-1, self.size)).transpose(1, 2)
            for part in (self.q, self.k, self.v)
        )
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).flatten(2))
        return x + self.back(F.gelu(self.hidden(self.norm_hidden(x))))


class Decoder(nn.Module):
    def __init__(self, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(models.VOCABULARY, width)
        self.positions = nn.Embedding(models.CONTEXT, width)
        self.layers = nn.Sequential(*(Layer(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, models.VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:  # (B, T) -> (B, T, V)
        places = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.tokens(tokens) + self.positions(places)
        return self.head(self.norm(self.layers(x)))


SMALL = functools.partial(Decoder, 64, 2, 4)
MIDDLE = functools.partial(Decoder, 512, 4, 8)
"""13 million parameters."""
LARGE = functools.partial(Decoder, 1024, 16, 16)
"""203 million parameters."""


def case_of(model: Callable[[], nn.Module], share: int) -> models.Case:
    return models.Case(
        name="decoder", model=model, data=models.texts, optimizer=models.adamw, share=share
    )


# The scripts of torch's own APIs.


def cut_layers(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """In the same places as tensor(n) does."""
    way: dict[str, Any] = {
        "tokens": RowwiseParallel(input_layouts=Replicate()),
        "head": ColwiseParallel(output_layouts=Replicate()),
    }
    for name in ("q", "k", "v", "hidden"):
        way[f"layers.*.{name}"] = ColwiseParallel()
    for name in ("out", "back"):
        way[f"layers.*.{name}"] = RowwiseParallel()
    return parallelize_module(model, mesh, way)


def shard_layers(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    for layer in model.get_submodule("layers").children():
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


class Averaged(models.PlainLoop):
    """A loop that averages gradients over a group once they are there."""

    group: dist.ProcessGroup | None = None

    def run(self, steps: int) -> None:
        for _ in range(steps):
            rows = next(self._rows)
            batch = (self.data[0].index_select(0, rows), self.data[1].index_select(0, rows))
            loss = models.loss_of(self.forward(batch[0]), batch)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            if self.group is not None:
                found = [p.grad for p in self.forward.parameters() if p.grad is not None]
                grads = [g.to_local() if isinstance(g, DTensor) else g for g in found]
                flat = torch.cat([g.reshape(-1) for g in grads]) / dist.get_world_size(self.group)
                dist.all_reduce(flat, group=self.group)
                parts = flat.split([g.numel() for g in grads])
                torch._foreach_copy_(
                    grads, [p.view_as(g) for p, g in zip(parts, grads, strict=True)]
                )
            self.optimizer.step()
            loss.item()


class Front(nn.Module):
    """The first stage of a decoder, up to a layer."""

    def __init__(self, whole: Decoder, end: int) -> None:
        super().__init__()
        self.tokens, self.positions = whole.tokens, whole.positions
        self.layers = whole.layers[:end]

    def forward(self, tokens: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[1], device=tokens.device)
        return self.layers(self.tokens(tokens) + self.positions(places))


class Piped(models.PlainLoop):
    """A loop over the stages of `Schedule1F1B`, of which this rank has one."""

    def __init__(self, case: models.Case, batch: int, begin: int, microbatches: int) -> None:
        rank, whole = dist.get_rank(), models.build(case)
        assert isinstance(whole, Decoder)
        back = nn.Sequential(whole.layers[begin:], whole.norm, whole.head)
        stage = Front(whole, begin) if rank == 0 else back
        super().__init__(stage, case, case.data(), batch, 1, 0)
        held = PipelineStage(stage, rank, 2, torch.device("cpu"))
        self.schedule = Schedule1F1B(held, microbatches, loss_fn=self._loss)

    def _loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return models.loss_of(outputs, (outputs, targets))

    def run(self, steps: int) -> None:
        for _ in range(steps):
            rows = next(self._rows)
            self.optimizer.zero_grad(set_to_none=True)
            if dist.get_rank() == 0:
                self.schedule.step(self.data[0].index_select(0, rows))
            else:
                losses: list[Tensor] = []
                self.schedule.step(target=self.data[1].index_select(0, rows), losses=losses)
                torch.stack(losses).mean().item()
            self.optimizer.step()


def script(plan: str, case: models.Case, batch: int, session: Any) -> models.PlainLoop:
    """What a person writes for a plan, on the default group; stages are those of the session."""
    if plan == "pipe(2)":
        begin = int(session.choices["pipe"].rpartition("layers.")[2].split(".")[0])
        return Piped(case, batch, begin, session.split.pipeline.microbatches(batch))
    model, rank = models.build(case), dist.get_rank()
    if plan == "shard(2)":
        mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("shard",))
        return Averaged(shard_layers(model, mesh), case, case.data(), batch, 2, rank)
    if plan == "tensor(2)":
        mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tensor",))
        return Averaged(cut_layers(model, mesh), case, case.data(), batch, 1, 0)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    made = Averaged(cut_layers(model, mesh["tensor"]), case, case.data(), batch, 2, rank // 2)
    made.group = mesh.get_group("data")
    return made


# Measuring a step.


def measure_step(plan: str, meeting: str, quick: bool) -> dict[str, harness.Turns]:
    """Runs in each worker, fresh. What a step of each side takes in each turn."""
    from allfuse.launcher import current_world

    world = current_world()
    assert world is not None
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    case = case_of(SMALL if quick else MIDDLE, 4)
    batch = 8
    with af.session(quiet=True) as session:
        ours = models.SessionLoop(session, case, case.data(), batch)
        ours.run(1)
        if dist.is_initialized():
            dist.destroy_process_group()  # the replica's; the script's spans all
        dist.init_process_group(
            "gloo", init_method=f"file://{meeting}", rank=world.rank, world_size=world.size
        )
        theirs = script(plan, case, batch, session)
        loops = {"allfuse": ours.run, "torch": theirs.run}
        found = take_turns(
            loops, theirs, turn_s=TURN_S, seconds=SECONDS, least=4, quick_steps=1 if quick else None
        )
        ours.close()
    return found


def step_figures(plan: str, quick: bool) -> list[harness.Figure]:
    parts = []
    for _ in range(1 if quick else LAUNCHES):
        with tempfile.TemporaryDirectory() as folder:
            work = functools.partial(measure_step, plan, str(Path(folder) / "meeting"), quick)
            parts.append(af.launch(work, workers=as_plan(plan).workers, plan=plan, threads=1))
    turns = harness.gather(parts)
    ours, theirs = turns["allfuse"], turns["torch"]
    told = ", ".join(f"{key} {harness.milliseconds(turn.wall_s)}" for key, turn in turns.items())
    return [
        harness.figure(
            f"{plan}: step over torch's own",
            harness.ratios(ours.wall_s, theirs.wall_s),
            target=STEP_TARGET,
            floor=f"medians: {told}",
        ),
        harness.figure(
            f"{plan}: the same in processor time of a worker",
            harness.ratios(ours.cpu_s, theirs.cpu_s),
        ),
    ]


# Measuring memory.


def peak_bytes(quick: bool) -> float:
    """Runs in each worker: the most bytes that it has for building a model and two steps."""
    from allfuse.launcher import current_world

    world = current_world()
    assert world is not None
    case = case_of(SMALL if quick else LARGE, 4)
    data = case.data()
    warm_up()
    with af.session(quiet=True) as session:
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak is that from here on
        loop = models.SessionLoop(session, case, data, 4)
        loop.run(2)
        peak = resident("VmHWM") - before
        loop.close()
        told = torch.zeros(world.size, dtype=torch.float64)
        told[session.place.mates.rank] = peak
        session.place.mates.all_reduce(told, "tell the peaks").wait()
    return float(told.max())


def warm_up() -> None:
    """What torch loads and keeps when it first computes does not count."""
    model = SMALL()
    optimizer = models.adamw(model)
    models.loss_of(
        model(torch.zeros(1, 4, dtype=torch.long)), (None, torch.zeros(4).long())
    ).backward()  # type: ignore[arg-type]
    optimizer.step()


def resident(field: str) -> int:
    """Bytes of this process, of a field of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def memory_figures(quick: bool) -> list[harness.Figure]:
    work = functools.partial(peak_bytes, quick)
    whole = af.launch(work, workers=1, threads=1)
    count = models.count_parameters(case_of(SMALL if quick else LARGE, 4))
    found = []
    for plan, target in list(MEMORY_PLANS.items())[: 1 if quick else None]:
        part = af.launch(work, workers=as_plan(plan).workers, plan=plan, threads=1)
        found.append(
            harness.figure(
                f"{plan}: most memory of a rank over one process",
                [part / whole],
                target=None if quick else target,
                floor=f"{part / 1e9:.2f} of {whole / 1e9:.2f} GB; by the formula "
                f"{STATE_BYTES * count / 4e9:.2f} of {STATE_BYTES * count / 1e9:.2f} GB, 0.25",
            )
        )
    return found


def main() -> None:
    options = harness.parse_options(__doc__)
    found: list[harness.Figure] = []
    for plan in STEP_PLANS[:1] if options.quick else STEP_PLANS:
        found += step_figures(plan, options.quick)
    found += memory_figures(options.quick)
    found += bubble.figures(SMALL if options.quick else MIDDLE, options.quick)
    harness.report("split", found, options)


if __name__ == "__main__":
    main()
